"""Print the structure of the package, read from its imports: rooms, floors, arrows, circles and lines.

    python tools/structure.py           # exits with 1 where an arrow leads up or a circle is new
    python tools/structure.py CHECKOUT  # of another checkout, such as a worktree of an older commit

A room is a folder in the package's root, with all below it, or a file that lies loose there. An arrow leads from a room
to a room that it imports, in functions too. The floor of a room is the longest path of arrows below it; rooms of one
circle share a floor. The package's root is no room for an arrow to end in: it has the version only.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tomllib

PACKAGE = "dsv32_plugin"
ORDER: tuple[tuple[str, ...], ...] = (
    ("cli", "vllm_adapter", "sglang_adapter"),
    ("benchmarks",),
    ("tools",),
    ("apis", "training"),
    ("admission", "core"),
    ("installation",),
    ("engines", "kernels"),
    ("console", "settings", "surface"),
    ("parsers", "rollout"),
    (PACKAGE,),
)
"""Every room, from the top of the house to the bottom. An arrow may lead to a lower line only.

The adapters are at the top, as the engines ask for them by their entry points and nothing of ours imports them.
"""

Arrows = Mapping[str, Collection[str]]
"""Who imports -> who is imported."""


@dataclass(frozen=True)
class Structure:
    files: dict[str, Path]
    """Module, by its name below the package -> its file."""
    imports: dict[str, set[str]]
    """Module -> the modules that it imports."""

    @property
    def rooms(self) -> dict[str, set[str]]:
        """Room -> the rooms that it imports."""
        found: dict[str, set[str]] = {self.room(module): set() for module in self.files}
        for module, imported in self.imports.items():
            found[self.room(module)] |= {self.room(other) for other in imported} - {self.room(module)}
        return found

    def room(self, module: str) -> str:
        """`kernels` of `kernels.ops.sparse_mla.api`, `settings` of `settings`."""
        return module.partition(".")[0]


def read(root: Path) -> Structure:
    """The package of the checkout `root`, as setuptools maps its folders."""
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    files = {}
    for package in table["packages"]:
        parent = max((name for name in table["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len)
        folder = (root / table["package-dir"][parent]).joinpath(*package[len(parent) :].split("."))
        for path in sorted(folder.glob("*.py")):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    short = {module: module.removeprefix(f"{PACKAGE}.") for module in files}
    imports = {
        short[module]: {short[other] for other in imported(path, module, files)} for module, path in files.items()
    }
    return Structure({short[module]: path for module, path in files.items()}, imports)


def imported(path: Path, module: str, known: Collection[str]) -> Iterator[str]:
    """Of the known modules those that a file imports, each as exactly as the statement names it."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name not in ("", PACKAGE, module):
                yield name


def circles(arrows: Arrows) -> list[tuple[str, ...]]:
    """Those that can reach each other, the largest circle first."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = set(arrows[todo.pop()]) - seen
            seen |= new
            todo += new
        reached[start] = seen
    found = {tuple(sorted(other for other in seen if start in reached[other])) for start, seen in reached.items()}
    return sorted((circle for circle in found if circle), key=lambda circle: (-len(circle), circle))


def floors(arrows: Arrows) -> dict[str, int]:
    """Room -> the longest path of arrows below it."""
    together = {room: circle for circle in circles(arrows) for room in circle}
    found: dict[str, int] = {}

    def floor(room: str) -> int:
        circle = together.get(room, (room,))
        if room not in found:
            below = {other for each in circle for other in arrows[each]} - set(circle)
            found.update(dict.fromkeys(circle, max((floor(other) + 1 for other in below), default=0)))
        return found[room]

    return {room: floor(room) for room in arrows}


def faults(structure: Structure) -> list[str]:
    """What is not as `ORDER` says, and files that import each other."""
    rooms = structure.rooms
    line = {room: number for number, rooms_of_line in enumerate(ORDER) for room in rooms_of_line}
    if sorted(line) != sorted(rooms):
        new, gone = sorted(rooms.keys() - line.keys()), sorted(line.keys() - rooms.keys())
        return [f"ORDER: expected every room and no other; add {new}, remove {gone}"]
    up = {(room, other) for room, below in rooms.items() for other in below if line[room] >= line[other]}
    found = [
        f"{module} imports {other}, which is not below it: move one of them, or what they share, down"
        for module, imports in structure.imports.items()
        for other in sorted(imports)
        if (structure.room(module), structure.room(other)) in up
    ]
    turning = circles(structure.imports)
    return found + [f"{', '.join(circle)} import each other: move what they share into one file" for circle in turning]


def text(structure: Structure, root: Path) -> str:
    rooms = structure.rooms
    floor = floors(rooms)
    of_rooms, of_files = circles(rooms), circles(structure.imports)
    arrows = sum(map(len, rooms.values()))
    lines = [
        f"{len(rooms)} rooms, {max(floor.values()) + 1} floors, {arrows} arrows, {len(of_rooms)} circles of rooms, "
        f"{len(of_files)} of files"
    ]
    lines += [f"circle: {' '.join(circle)}" for circle in of_rooms]
    lines += [f"circle of files: {' '.join(circle)}" for circle in of_files]
    for height in sorted(set(floor.values()), reverse=True):
        lines += ["", f"floor {height}"]
        for room in sorted(room for room in rooms if floor[room] == height):
            paths = [path for module, path in structure.files.items() if structure.room(module) == room]
            lines.append(f"  {room}: {len(paths)} files, {count(paths)} lines -> {' '.join(sorted(rooms[room]))}")
    lines += ["", "lines of Python"]
    for folder in sorted({path.parent for path in structure.files.values()} | {root / "tests", root / "tools"}):
        found = sorted(folder.rglob("*.py") if folder == root / "tests" else folder.glob("*.py"))
        lines.append(f"  {folder.relative_to(root)}: {count(found)} in {len(found)} files")
    lines.append(f"  the package: {count(structure.files.values())} in {len(structure.files)} files")
    return "\n".join(lines)


def count(paths: Collection[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def main(argv: list[str]) -> int:
    own = Path(__file__).resolve().parents[1]
    root = Path(argv[0]).resolve() if argv else own
    structure = read(root)
    print(text(structure, root))
    found = faults(structure) if root == own else []
    print("\n".join(["", *found]), file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
