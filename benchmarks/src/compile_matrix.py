"""Compile every kernel configuration for every chip and write benchmarks/results/compile_matrix.json. Needs no GPU.

python -m dsv32_plugin.benchmarks.compile_matrix            # compile, write the record
python -m dsv32_plugin.benchmarks.compile_matrix --operation select_topk    # these again, the rest of the record stays
python -m dsv32_plugin.benchmarks.compile_matrix --markdown  # the table of the documentation from the record on disk
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1] / "results" / "compile_matrix.json"


def compile_everything(targets: list[str], operations: list[str]) -> dict:
    import triton

    from dsv32_plugin.kernels.runtime import aot

    records = aot.compile_all([aot.TARGETS[name] for name in targets], operations or aot.OPERATIONS)
    rows = [{k: v for k, v in dataclasses.asdict(r).items() if k != "seconds"} for r in records]
    if operations:
        record = json.loads(RECORD.read_text())
        kept = [r for r in record["rows"] if r["operation"] not in operations or r["target"] not in targets]
        chips, order = list(aot.TARGETS), list(aot.OPERATIONS)
        rows = sorted(kept + rows, key=lambda r: (chips.index(r["target"]), order.index(r["operation"])))
        targets = chips
    limits = {name: aot.TARGETS[name].shared_bytes for name in targets}
    return {"triton": triton.__version__, "shared_limit_bytes": limits, "rows": rows}


def markdown(record: dict) -> str:
    """Operation by chip: configurations, then the most registers, shared KiB and spilled bytes of any of them."""
    chips = list(record["shared_limit_bytes"])
    rows = record["rows"]
    operations = list(dict.fromkeys((r["operation"], r["implementation"]) for r in rows))
    lines = ["| operation | " + " | ".join(chips) + " |", "|" + " --- |" * (len(chips) + 1)]
    for operation, implementation in operations:
        cells = []
        for chip in chips:
            mine = [
                r
                for r in rows
                if (r["operation"], r["implementation"], r["target"]) == (operation, implementation, chip)
            ]
            if not mine:
                cells.append("")
                continue
            registers, spills = max(r["registers"] for r in mine), max(r["spill_bytes"] for r in mine)
            shared_kib = max(r["shared_bytes"] for r in mine) / 1024
            cell = f"{len(mine)}: {registers} / {shared_kib:.0f} / {spills}"
            cells.append(cell + (" fails" if any(r["error"] for r in mine) else ""))
        lines.append(f"| `{operation}` {implementation} | " + " | ".join(cells) + " |")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["spill_bytes"]:
            reasons.setdefault(row["spill_reason"], []).append(f"`{row['operation']}` {row['case']}")
    if reasons:
        lines += ["", "| spills | why they are left |", "| --- | --- |"]
        lines += [f"| {', '.join(sorted(set(cases)))} | {reason} |" for reason, cases in sorted(reasons.items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--target", action="append")
    parser.add_argument("--operation", action="append", default=[])
    args = parser.parse_args()
    if args.markdown:
        print(markdown(json.loads(RECORD.read_text())))
        return 0
    from dsv32_plugin.kernels.runtime.aot import TARGETS

    record = compile_everything(args.target or list(TARGETS), args.operation)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row) for row in record.pop("rows")]
    head = json.dumps(record)[:-1]
    RECORD.write_text(head + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n")
    failed = [row for row in map(json.loads, rows) if row["error"]]
    for row in failed:
        print(f"{row['target']} {row['operation']} {row['case']}: {row['error']}", file=sys.stderr)
    print(f"{len(rows)} configurations, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
