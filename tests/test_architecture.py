"""Rooms, floors and arrows, read from the imports of the code; `python tests/test_architecture.py` prints them.

A room is a folder or a module of the package, an arrow an import, also one inside a function or for types only. A room
is one floor above the highest that it imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "dsv32_plugin": ROOT / "dsv32_plugin",
    "dsv32_plugin.kernels": ROOT / "kernels" / "src",
    "dsv32_plugin.parsers": ROOT / "parsers" / "src",
    "dsv32_plugin.benchmarks": ROOT / "benchmarks" / "src",
}
Graph = dict[str, set[str]]


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> Graph:
    """Module -> modules."""
    return {name: _imported(name, path) - {name} for name, path in modules().items()}


def _imported(name: str, path: Path) -> set[str]:
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names}
    return found & modules().keys()


def rooms() -> Graph:
    """Room -> rooms; the package itself holds its version only."""
    found: Graph = {}
    for module, targets in imports().items():
        room = _room(module)
        found.setdefault(room, set()).update(_room(target) for target in targets)
    return {room: targets - {room, ""} for room, targets in found.items() if room}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floors(graph: Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        found[room] = max((found[below] + 1 for below in graph[room]), default=0)
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One, if there is one."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_circle() -> None:
    assert not circle(rooms())
    # Kernels and parsers are held by their own tests.
    product = {name: targets for name, targets in imports().items() if _room(name) not in ("kernels", "parsers")}
    assert not circle(product)


def test_a_room_knows_only_what_is_below_it() -> None:
    """What the picture in docs/architecture.md shows."""
    floor = floors(rooms())
    order = ["settings", "kernels", "core", "apis", "vllm_adapter", "benchmarks", "cli"]
    assert [floor[room] for room in order] == list(range(len(order)))
    assert floor["sglang_adapter"] == floor["vllm_adapter"] == floor["tools"]
    assert not {"vllm_adapter", "sglang_adapter"} & set().union(*rooms().values()), "they are asked by name only"


if __name__ == "__main__":
    graph = rooms()
    for room, floor in sorted(floors(graph).items(), key=lambda item: (-item[1], item[0])):
        print(f"{floor}  {room:16} -> {', '.join(sorted(graph[room]))}")
    arrows = sum(map(len, graph.values()))
    print(f"{len(graph)} rooms, {arrows} arrows, {max(floors(graph).values()) + 1} floors", file=sys.stderr)
