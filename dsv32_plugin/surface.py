"""What an adapter uses of its engine, read from the files of a release: nothing of the engine is imported.

A name is `package.module:Name`, or the dotted path of a function, a class or a method. The surface says of each
what it is and what it takes; of a class, those of its members that the adapter names, too; of `package.module:Name.*`,
the fields of a class and their defaults. So that a new release is a short list of differences before any server starts:

    python -m dsv32_plugin.vllm_adapter.upstream --check /path/to/unpacked/vllm
"""

from __future__ import annotations

import argparse
import ast
import json
import pkgutil
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

_ASKING = ("getattr", "hasattr", "setattr")
Surface = dict[str, Any]
"""Name -> "value", a signature, or of a class its members; None where a release has no such name."""


class Place(NamedTuple):
    """Where the adapter's own code is called in the place of the engine's, or around it."""

    targets: tuple[str, ...]
    """Dotted paths, that of the newest release first."""
    parameters: tuple[str, ...] | None = None
    """Names of the leading parameters that our code counts on; None for a class that is replaced."""


def names_in(modules: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Name of ours -> "module:name", of the names in each module, `ours=theirs` where these differ.

    Where they have moved, the modules of all releases are named, that of the newest first: "new.module old.module".
    """
    found: dict[str, tuple[str, ...]] = {}
    for places, names in modules.items():
        for name in names.split():
            ours, _, theirs = name.partition("=")
            found[ours] = (*found.get(ours, ()), *(f"{module}:{theirs or ours}" for module in places.split()))
    return found


def lookup(names: Mapping[str, tuple[str, ...]], name: str) -> Any:
    """What one of `names` stands for, imported when it is asked for; AttributeError where there is no such thing."""
    if name not in names:
        raise AttributeError(f"no name of the engine that this adapter uses: {name}")
    return pkgutil.resolve_name(first_of(*names[name]))


def has(names: Mapping[str, tuple[str, ...]], name: str) -> bool:
    """Whether this release has what one of `names` stands for."""
    try:
        lookup(names, name)
    except (ImportError, AttributeError):
        return False
    return True


def targets_of(names: Mapping[str, tuple[str, ...]], places: Mapping[str, Place]) -> list[str]:
    """All that an adapter uses, for a comparison with a release."""
    found = [target for targets in names.values() for target in targets]
    return [*found, *(target for place in places.values() for target in place.targets)]


def first_of(*targets: str) -> str:
    """The first of these names, the newest release's first, at which there is something; else the last."""
    for target in targets[:-1]:
        with suppress(ImportError, AttributeError):
            pkgutil.resolve_name(target)
            return target
    return targets[-1]


class Release:
    """The files of one release of an engine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tree = cache(self._read)

    @property
    def version(self) -> str:
        """As its package says; "unknown" where it says nothing."""
        for name in ("_version.py", "version.py"):
            path = self.root / name
            found = re.search(r"version = ['\"]([^'\"]+)", path.read_text(encoding="utf-8")) if path.exists() else None
            if found:
                return found[1]
        return "unknown"

    def surface(self, names: Iterable[str], used: set[str]) -> Surface:
        """Of these names; `used` are the members that the adapter names."""
        found: Surface = {}
        for name in sorted(names):
            module, _, path = name.partition(":") if ":" in name else self._split(name)
            first, *rest = path.split(".")
            where = self._find(module, first)
            if rest == ["*"]:
                found[name] = None if where is None else _fields(where[1])
                continue
            for member in rest:
                where = self._member(where, member) if where else None
            found[name] = None if where is None else self._describe(where, used)
        return found

    def is_module(self, name: str) -> bool:
        """Whether a name stands for a module, of which anything could be used."""
        return self._path(name.replace(":", ".")) is not None

    def _split(self, dotted: str) -> tuple[str, str, str]:
        """The module that a dotted path begins with, and what follows."""
        parts = dotted.split(".")
        most = max((n for n in range(1, len(parts)) if self._path(".".join(parts[:n]))), default=len(parts) - 1)
        return ".".join(parts[:most]), ":", ".".join(parts[most:])

    def _path(self, module: str) -> Path | None:
        package, _, inner = module.partition(".")
        base = self.root.joinpath(*inner.split(".")) if inner else self.root
        if package != self.root.name:
            return None
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)

    def _read(self, module: str) -> ast.Module | None:
        path = self._path(module)
        return None if path is None else ast.parse(path.read_text(encoding="utf-8"))

    def _find(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """Where a name is defined, whatever re-exports it: the module and the statement."""
        tree = self._tree(module)
        if tree is None or depth > 8:
            return None
        imported: tuple[str, str] | None = None
        stars = []
        for statement in _statements(tree):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if statement.name == name:
                    return module, statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return module, statement
            elif isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        imported = self._absolute(module, statement), alias.name
                    elif alias.name == "*":
                        stars.append(self._absolute(module, statement))
        if imported is not None:
            return self._find(*imported, depth + 1) or (module, ast.Pass())
        for star in stars:
            if (found := self._find(star, name, depth + 1)) is not None:
                return found
        # Made when it is asked for.
        return (module, ast.Pass()) if self._names_lazily(tree, name) else None

    def _names_lazily(self, tree: ast.Module, name: str) -> bool:
        has_getattr = any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)
        return has_getattr and any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree))

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        path = self._path(module)
        parts = module.split(".") if path is not None and path.name == "__init__.py" else module.split(".")[:-1]
        parts = parts[: len(parts) - statement.level + 1]
        return ".".join([*parts, *([statement.module] if statement.module else [])])

    def _member(self, where: tuple[str, ast.AST], name: str) -> tuple[str, ast.AST] | None:
        """Of a class, or of what it is derived from."""
        module, node = where
        if not isinstance(node, ast.ClassDef):
            return None
        for statement in _statements(node):
            if getattr(statement, "name", None) == name:
                return module, statement
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, statement
        for base in node.bases:
            while isinstance(base, ast.Subscript):
                base = base.value
            found = self._find(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None and found[1] is not node and (member := self._member(found, name)) is not None:
                return member
        return None

    def _describe(self, where: tuple[str, ast.AST], used: set[str]) -> Any:
        node = where[1]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _signature(node)
        if not isinstance(node, ast.ClassDef):
            return "value"
        members = {name: self._member(where, name) for name in sorted({*used, "__init__"})}
        return {name: self._describe(member, set()) for name, member in members.items() if member is not None}


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Those of a module or a class, whatever they depend on."""
    for statement in getattr(node, "body", []):
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from _statements(statement)
            for other in (getattr(statement, "orelse", []), getattr(statement, "finalbody", [])):
                yield from (inner for part in other for inner in (part, *_statements(part)))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler)


def _fields(node: ast.AST) -> dict[str, str]:
    """Field of a dataclass -> its default."""
    fields = [part for part in getattr(node, "body", []) if isinstance(part, ast.AnnAssign)]
    return {
        field.target.id: "required" if field.value is None else ast.unparse(field.value)
        for field in fields
        if isinstance(field.target, ast.Name) and "ClassVar" not in ast.unparse(field.annotation)
    }


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Names and order of what a function takes; = where it may be left out."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    first_default = len(positional) - len(given.defaults)
    parts = [argument.arg + "=" * (index >= first_default) for index, argument in enumerate(positional)]
    if given.vararg:
        parts.append(f"*{given.vararg.arg}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [
        argument.arg + "=" * (default is not None)
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg:
        parts.append(f"**{given.kwarg.arg}")
    return f"({', '.join(parts)})"


def members_used(folder: Path) -> set[str]:
    """What the code of a folder names of objects: attributes, keywords, and methods that it overrides."""
    used: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                used.add(node.arg)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
                used |= {str(part.value) for part in node.args if isinstance(part, ast.Constant)}
            elif isinstance(node, ast.ClassDef):
                used |= {part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}
    return used


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a release has otherwise than another, a line for each name or member."""
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{name.replace(':', '.')}.{line}" for line in differences(old, new)]
        elif old is None or new is None:
            lines.append(f"{name.replace(':', '.')}: {'new' if old is None else 'gone'}")
        else:
            lines.append(f"{name.replace(':', '.')}: {_shown(old)} -> {_shown(new)}")
    return lines


def missing(before: Mapping[str, Any], after: Mapping[str, Any], used: Container[str]) -> list[str]:
    """What a release lacks of what a served one has, a line for each name, member or parameter.

    Of `differences` those that would be an error: a name or member that is gone; a parameter that is gone and that we
    give, or must have given; one that is new and must be given. The rest shows in what comes out, if at all.
    """
    lines = []
    for name, old in sorted(before.items()):
        new, shown = after.get(name), name.replace(":", ".")
        if old is None or (new is None and name == "__init__"):
            continue  # a dataclass has no __init__ to be read
        if new is None:
            lines.append(f"{shown}: gone")
        elif isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{shown}.{line}" for line in missing(old, new, used)]
        elif str(old).startswith("(") and str(new).startswith("("):
            lines += [f"{shown}: {line}" for line in _unlike(_parameters(old), _parameters(new), used)]
    return lines


def _unlike(old: Mapping[str, bool], new: Mapping[str, bool], used: Container[str]) -> Iterator[str]:
    """What no longer fits between the parameters of a call or of a method in our place; name -> may be left out."""
    takes_any = any(name.startswith("**") for name in new)
    for name, optional in old.items():
        if name not in new and not takes_any and not name.startswith("*") and (not optional or name in used):
            yield f"takes no {name}"
    for name, optional in new.items():
        if name not in old and not optional and not name.startswith("*"):
            yield f"must be given {name}"
    kept = [name for name, optional in old.items() if not optional and name in new]
    if kept != [name for name in new if name in kept]:
        yield f"takes {', '.join(kept)} in another order"


def _parameters(signature: str) -> dict[str, bool]:
    """Name -> whether it may be left out, of what `_signature` writes."""
    parts = (part for part in signature[1:-1].split(", ") if part not in ("", "*"))
    return {part.removesuffix("="): part.endswith("=") for part in parts}


def _shown(described: Any) -> str:
    return "class" if isinstance(described, dict) else str(described)


def stored(folder: Path) -> dict[str, Surface]:
    """Release -> its surface, of those that the adapter in `folder` is written for, the oldest first."""
    files = sorted(
        folder.glob("surface-*.json"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)]
    )
    return {path.stem.partition("-")[2]: json.loads(path.read_text(encoding="utf-8")) for path in files}


def main(package: str, folder: Path, names: Iterable[str], argv: list[str] | None = None) -> int:
    """`--check [FOLDER]`: what is otherwise than in the releases that the adapter in `folder` is written for.

    Returns:
        0 where nothing is, else 1.
    """
    parser = argparse.ArgumentParser(description=f"The names of {package} that the plugin uses, in a release of it.")
    parser.add_argument("--check", nargs="?", const="", metavar="FOLDER", help="the release: installed, or unpacked")
    parser.add_argument("--write", action="store_true", help="keep the surface of the release that is checked")
    arguments = parser.parse_args(argv)
    release = Release(Path(arguments.check) if arguments.check else installed(package))
    surface = release.surface(names, members_used(folder))
    known = stored(folder)
    if arguments.write:
        text = json.dumps(surface, indent=1, sort_keys=True)
        (folder / f"surface-{release.version}.json").write_text(text + "\n", encoding="utf-8")
        return 0
    nearest = release.version if release.version in known else list(known)[-1]
    lines = differences(known[nearest], surface)
    print(f"{package} {release.version}, compared with {nearest}: {len(surface)} names, {len(lines)} differences")
    print("\n".join(lines))
    return 1 if lines else 0


def installed(package: str) -> Path:
    """Its folder, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed here; name the folder of a release")
    return Path(next(iter(spec.submodule_search_locations)))
