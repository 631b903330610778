"""What changed inside the places that an adapter hooks into, from one release of an engine to another.

`upstream --check` compares names and signatures; whether a hook still mends what it is for only the code tells:

    python tools/places.py sglang /tmp/old/sglang /tmp/new/sglang
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def code(root: Path, target: str) -> list[str]:
    """The lines of a function, method or class in the files of a release, without comments; none where it is gone."""
    parts = target.split(".")[1:]
    for modules in range(len(parts), 0, -1):
        base = root.joinpath(*parts[:modules])
        path = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
        if path is None:
            continue
        node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
        for name in parts[modules:]:
            found = [part for part in ast.walk(node) if getattr(part, "name", None) == name and hasattr(part, "body")]
            if not found:
                return []
            node = found[0]
        return ast.unparse(node).splitlines()
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description="What changed inside the places that an adapter hooks into.")
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument("old", type=Path, help="folder of an unpacked release")
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    places = import_module(f"dsv32_plugin.{given.engine}_adapter.upstream").PLACES
    for target in sorted({target for place in places.values() for target in place.targets}):
        old, new = code(given.old, target), code(given.new, target)
        if old != new:
            print(f"\n{target}: {'new' if not old else 'gone' if not new else 'changed'}")
            if old and new:
                print("\n".join(list(difflib.unified_diff(old, new, lineterm="", n=2))[2:]))


if __name__ == "__main__":
    main()
