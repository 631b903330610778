"""Write the measured tables of docs/kernels.md from the records in benchmarks/results.

python -m dsv32_plugin.benchmarks.document            # rewrite the blocks between <!-- NAME --> and <!-- end -->
python -m dsv32_plugin.benchmarks.document --check    # exit with 1 if a block is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from dsv32_plugin.benchmarks import compile_matrix, recall

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
RESULTS = Path(__file__).resolve().parents[1] / "results"


def speed(record: dict) -> str:
    from dsv32_plugin.benchmarks import harness

    return harness.table(record)


BLOCKS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "compile matrix": ("compile_matrix.json", compile_matrix.markdown),
    "recall": ("recall.json", recall.markdown),
    "speed": ("kernels.json", speed),
}
"""Name in the document -> (record, how it becomes a table)."""


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
    old = DOCUMENT.read_text()
    new = rewritten(old)
    if not check:
        DOCUMENT.write_text(new)
    elif new != old:
        print("docs/kernels.md is out of date: run python -m dsv32_plugin.benchmarks.document", file=sys.stderr)
    return int(check and new != old)


if __name__ == "__main__":
    sys.exit(main())
