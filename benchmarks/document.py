"""Write the measured tables of the documents from the records in benchmarks/results.

python benchmarks/document.py            # rewrite the blocks between <!-- NAME --> and <!-- end -->
python benchmarks/document.py --check    # exit with 1 if a block is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import compile_matrix
import recall

DOCS = Path(__file__).parent.parent / "docs"
DOCUMENTS = ("kernels.md", "engine.md")
RESULTS = Path(__file__).parent / "results"


def speed(record: dict) -> str:
    import harness

    return harness.table(record)


def engine_speed(record: dict) -> str:
    import engine

    return engine.markdown(record)


BLOCKS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "compile matrix": ("compile_matrix.json", compile_matrix.markdown),
    "recall": ("recall.json", recall.markdown),
    "speed": ("kernels.json", speed),
    "engine speed": ("engine.json", engine_speed),
}
"""Name in a document -> (record, how it becomes a table)."""


def rewritten(text: str) -> str:
    for name, (file, render) in BLOCKS.items():
        path = RESULTS / file
        body = render(json.loads(path.read_text())) if path.exists() else "Not measured yet."
        block = f"<!-- {name} -->\n{body}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name in DOCUMENTS:
        old = (DOCS / name).read_text()
        new = rewritten(old)
        if not check:
            (DOCS / name).write_text(new)
        elif new != old:
            print(f"docs/{name} is out of date: run python benchmarks/document.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
