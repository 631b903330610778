"""Every refusal of the package, its type and its text: code that moves keeps both.

`refusals.txt` holds them, one a line and sorted, without the files that they are in. What is only known when the
program runs is `{}`. A change of the list is a change of what users are told: `python tests/test_refusals.py` writes it
anew, and the diff shows what it was.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("dsv32_plugin", "kernels/src", "parsers/src")
STORED = Path(__file__).with_name("refusals.txt")
UNKNOWN = "{}"
TELLING = ("expected ", "must ", "got {}", "leave it out", "install ")
"""Words of texts that are handed to whoever raises them."""


def refusals() -> list[str]:
    """What the code raises, and all texts that say what was expected: these are raised elsewhere, or shown."""
    files = [path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    texts = _Texts(trees)
    return sorted(line for path, tree in trees.items() for line in _of_module(path, tree, texts))


def _of_module(path: Path, tree: ast.Module, texts: _Texts) -> Iterator[str]:
    raised: set[ast.AST] = set()
    for holder, node in _with_holders(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            local = _assigned(holder)
            arguments = [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]
            yield " | ".join([_name(node.exc.func), *(texts.of(argument, path, local) for argument in arguments)])
            raised.update(ast.walk(node.exc))
            raised.update(
                local[name.id] for name in ast.walk(node.exc) if isinstance(name, ast.Name) and name.id in local
            )
    raised.update(node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))  # docstrings
    for _, node in _with_holders(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and node not in raised:
            text = texts.of(node, path, {})
            if any(word in text for word in TELLING):
                yield f"text | {text}"


def _with_holders(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Every node after the innermost function that it is in; the parts of an f-string are not nodes of their own."""
    todo: list[tuple[ast.AST, ast.AST]] = [(tree, tree)]
    while todo:
        holder, node = todo.pop()
        yield holder, node
        if not isinstance(node, ast.JoinedStr):
            inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else holder
            todo += [(inner, child) for child in ast.iter_child_nodes(node)]


def _assigned(function: ast.AST) -> dict[str, ast.expr]:
    """What a function puts into its variables, those that it sets once."""
    targets = [
        (node.targets[0].id, node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    ]
    times = Counter(name for name, _ in targets)
    return {name: value for name, value in targets if times[name] == 1}


def _name(function: ast.expr) -> str:
    return ast.unparse(function).rpartition(".")[2]


class _Texts:
    """Texts of expressions, with the constants of all modules put in."""

    def __init__(self, trees: dict[Path, ast.Module]) -> None:
        self._constants: dict[str, dict[Path, ast.expr]] = {}
        for path, tree in trees.items():
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self._constants.setdefault(node.targets[0].id, {})[path] = node.value

    def of(self, node: ast.expr, path: Path, local: dict[str, ast.expr]) -> str:
        match node:
            case ast.Constant(value):
                return " ".join(str(value).split("\n"))
            case ast.JoinedStr(values):
                return "".join(self.of(value, path, local) for value in values)
            case ast.FormattedValue(value):
                return self.of(value, path, local)
            case ast.BinOp(left, ast.Add(), right):
                return self.of(left, path, local) + self.of(right, path, local)
            case ast.BoolOp(ast.Or(), values):
                return f"({'|'.join(self.of(value, path, local) for value in values)})"
            case ast.IfExp(body=body, orelse=orelse):
                return f"({self.of(body, path, local)}|{self.of(orelse, path, local)})"
            case ast.Name(name) if name in local:
                # Of a variable that is made of itself nothing is said.
                return self.of(local[name], path, {key: value for key, value in local.items() if key != name})
            case ast.Name(name) | ast.Attribute(attr=name) if name.isupper() or name.strip("_").isupper():
                constant = self._constant(name, path)
                return UNKNOWN if constant is None else self.of(constant, path, {})
            case ast.Call(ast.Name(), arguments, keywords):
                # A function that puts a text together, of what it is given.
                given = [self.of(part, path, local) for part in (*arguments, *(word.value for word in keywords))]
                return f"({', '.join(given)})" if set(given) - {UNKNOWN, ""} else UNKNOWN
        return UNKNOWN

    def _constant(self, name: str, path: Path) -> ast.expr | None:
        """The value of a constant, that of the module itself or of the nearest folder."""
        places = self._constants.get(name, {})
        for folder in (path, *path.parents):
            near = [value for place, value in places.items() if place == folder or folder in place.parents]
            if near and len({ast.dump(value) for value in near}) == 1:
                return near[0]
        return None


def test_no_refusal_is_lost_and_no_text_changes() -> None:
    found, stored = Counter(refusals()), Counter(STORED.read_text(encoding="utf-8").splitlines())
    lost, new = sorted((stored - found).elements()), sorted((found - stored).elements())
    assert not lost, f"refusals that are gone, or say something else: {lost}; new ones: {new}"
    assert not new, f"refusals that {STORED.name} does not have: {new}"


if __name__ == "__main__":
    STORED.write_text("\n".join(refusals()) + "\n", encoding="utf-8")
