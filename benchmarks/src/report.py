"""`dsv32 bench report`: every measured table and picture of the documentation, from the records in benchmarks/results.

A document has blocks between `<!-- NAME -->` and `<!-- end -->`; only they are written. Records lie in one folder a
GPU, `benchmarks/results/h100/layer.json`, with their pictures beside them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks import compile_matrix, cost, engine_view, harness, layer_view, plots, recall, records
from dsv32_plugin.benchmarks.layer_record import SIDES, curves
from dsv32_plugin.console import CommandError

DOCUMENTS = ("docs/kernels.md", "docs/benchmarks.md", "docs/engine.md", "README.md")
NOT_MEASURED = "Not measured yet."
Record = dict[str, Any]


def write(root: Path, *, check: bool) -> list[Path]:
    """Rewrite the documents of the checkout `root`; with `check` only say which are out of date.

    Raises:
        CommandError: a document shows a picture that does not exist.
    """
    stale = []
    for name in DOCUMENTS:
        path = root / name
        if not path.exists():
            continue
        old = path.read_text(encoding="utf-8")
        new = rewritten(old, root / "benchmarks" / "results", path.parent)
        for picture in re.findall(r"!\[[^]]*\]\(([^):]+\.png)\)", new):
            if not (path.parent / picture).exists():
                raise CommandError(f"{name}: {picture} is missing; run `dsv32 bench plot` on its record")
        if new != old:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    return stale


def rewritten(text: str, results: Path, folder: Path) -> str:
    """`text` with its blocks written anew; pictures are linked as seen from `folder`."""
    for name, render in blocks(results, folder).items():
        if f"<!-- {name} -->" in text:
            block = f"<!-- {name} -->\n{render()}\n<!-- end -->"
            head, _, rest = text.partition(f"<!-- {name} -->\n")
            text = head + block + rest.partition("<!-- end -->")[2]
    return text


def blocks(results: Path, folder: Path) -> dict[str, Callable[[], str]]:
    """Name of a block -> what stands in it."""

    def single(file: str, render: Callable[[Record], str]) -> Callable[[], str]:
        path = results / file
        return lambda: render(json.loads(path.read_text())) if path.exists() else NOT_MEASURED

    def each(kind: str, render: Callable[[Record, str], str], *, picture: bool = True) -> Callable[[], str]:
        def sections() -> Iterator[str]:
            for path in sorted(results.glob(f"*/{kind}*.json")):
                record = records.read(path, kind)
                yield f"{source(record)}\n"
                if picture:
                    yield from (f"{link}\n" for link in pictures(path, record, folder))
                yield render(record, path.stem) + "\n"

        return lambda: "\n".join(sections()).rstrip() or NOT_MEASURED

    return {
        "compile matrix": single("compile_matrix.json", compile_matrix.markdown),
        "recall": single("recall.json", recall.markdown),
        "engine speed": single("engine.json", engine_view.markdown),
        "speed": each("kernels", kernels_table, picture=False),
        "kernels": each("kernels", kernels_summary),
        "layer": each("layer", layer_table),
        "cost": each("cost", cost_table),
        "serve": each("serve", serve_table),
        "headline": lambda: headline(results) or NOT_MEASURED,
    }


def draw_all(results: Path) -> list[Path]:
    """The pictures of every record, beside it."""
    return [picture for path in sorted(results.glob("*/*.json")) for picture in plots.draw(records.read(path), path)]


def pictures(path: Path, record: Record, folder: Path) -> Iterator[str]:
    for picture in plots.paths(record, path):
        place = Path(os.path.relpath(picture, folder)).as_posix()
        yield f"![{picture.stem} on {record['gpu']}]({place})"


def source(record: Record) -> str:
    """Where a record comes from, in one line."""
    command = f", `{record['command']}`" if "command" in record else ""
    warning = f" **{record['meaningless']}**" if "meaningless" in record else ""
    return f"{record['gpu']}, commit {record['commit']}, {record['date']}{command}.{warning}"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kernels_table(record: Record, name: str) -> str:
    found = markdown(list(harness.HEADINGS), [harness.cells(row) for row in record["rows"]])
    if record["not_run"]:
        found += "\n\nNot run: " + ", ".join(record["not_run"])
    return found + missing(harness.missing(record))


def kernels_summary(record: Record, name: str) -> str:
    """A line an operation: how its cases compare with the best peer of each."""
    speed: dict[str, list[float]] = {}
    wrong: dict[str, int] = {}
    for row in record["rows"]:
        wrong[row["operation"]] = wrong.get(row["operation"], 0) + ("error" in row)
        if "speedup" in row:
            speed.setdefault(row["operation"], []).append(row["speedup"])
    rows = []
    for operation in wrong:
        values = speed.get(operation, [])
        mean = f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}" if values else ""
        limits = f"{min(values):.2f} to {max(values):.2f}" if values else ""
        rows.append([operation, str(len(values)), mean, limits, str(wrong[operation] or "")])
    table = markdown(["operation", "cases with a peer", "speed over the best (mean)", "range", "wrong"], rows)
    return table + missing(harness.missing(record))


def missing(reasons: dict[str, str]) -> str:
    return "".join(f"\n\nMissing: {peer} ({reason})." for peer, reason in reasons.items())


def layer_table(record: Record, name: str) -> str:
    rows = []
    for (mode, batch, heads), sides in curves(record["rows"]).items():
        for context in sorted({n for measured in sides.values() for n in measured}):
            us = {side: sides.get(side, {}).get(context, {}).get("total", {}).get("median_us") for side in SIDES}
            times = [f"{us[side]:.1f}" if us[side] else "" for side in SIDES]
            gains = [f"{us[peer] / us['ours']:.2f}" if us[peer] and us["ours"] else "" for peer in ("dense", "in-tree")]
            rows.append([mode, str(batch), str(heads), str(context), *times, *gains])
    headings = ["step", "sequences", "heads", "context", *(f"{side} µs" for side in SIDES)]
    table = markdown([*headings, "over dense", "over in-tree"], rows)
    crossing = "\n".join(f"- {layer_view.crossover_text(row)}" for row in record["crossovers"])
    reasons = {f"{row['side']}": row["missing"] for row in record["rows"] if "missing" in row}
    whose = dict.fromkeys(
        f"{row['side']} {row['mode']}: {row['kernels']}" for row in record["rows"] if "kernels" in row
    )
    return f"{record['method']} Kernels: {'; '.join(whose)}.\n\n{table}\n\n{crossing}{missing(reasons)}"


def cost_table(record: Record, name: str) -> str:
    contexts = sorted({row["L"] for row in record["rows"]})
    table = markdown(["step", "side", *(f"{context >> 10}K" for context in contexts)], cost.cells_of(record))
    return f"US dollars a million tokens: {record['method']}.\n\n{table}"


def serve_table(record: Record, name: str) -> str:
    rows = []
    for row in record["rows"]:
        start = [row["engine"], row["backend"], str(row["layers"]), row["workload"], row["load"]]
        if "error" in row:
            rows.append([*start, "failed", "", "", "", ""])
            continue
        latencies = [f"{row[key]['median']:.1f} ({row[key]['p90']:.1f})" for key in ("ttft_ms", "tpot_ms")]
        rates = [f"{row[key]:.0f}" for key in ("input_tokens_per_s", "output_tokens_per_s")]
        rows.append([*start, f"{row['completed']} of {row['requests']}", *latencies, *rates])
    headings = ["engine", "backend", "layers", "workload", "load", "answered", "first token ms (p90)"]
    measured = markdown([*headings, "per token ms (p90)", "input tokens/s", "output tokens/s"], rows)
    busy = max((row["client_busy"] for row in record["rows"] if "client_busy" in row), default=0.0)
    return f"{record['method']} The client used at most {busy:.0%} of a core.\n\n{measured}{serve_extended(record)}"


def serve_extended(record: Record) -> str:
    """What two depths say about the whole model, apart from what was measured."""
    deeper = [row for row in record["rows"] if "extrapolated" in row]
    rows = [
        [row["engine"], row["backend"], row["workload"], row["load"]]
        + [f"{row['extrapolated'][key]:.1f}" for key in ("ttft_ms", "tpot_ms")]
        for row in deeper
    ]
    if not rows:
        return ""
    methods = dict.fromkeys(row["extrapolated"]["method"] for row in deeper)
    layers = deeper[0]["extrapolated"]["layers"]
    headings = ["engine", "backend", "workload", "load", "first token ms", "per token ms"]
    return f"\n\nExtended to {layers} layers, not measured: {'; '.join(methods)}.\n\n{markdown(headings, rows)}"


def headline(results: Path) -> str:
    """The longest context of every layer record: one line a mode and batch."""
    rows = []
    for path in sorted(results.glob("*/layer.json")):
        record = records.read(path, "layer")
        for (mode, batch, heads), sides in curves(record["rows"]).items():
            shared = [n for n in sides.get("ours", {}) if n in sides.get("dense", {})]
            if not shared:
                continue
            context = max(shared)
            us = {side: rows_of[context]["total"]["median_us"] for side, rows_of in sides.items() if context in rows_of}
            step = f"{mode}, {heads} heads" + ("" if mode == "prefill" else f", batch {batch}")
            gains = [f"{us[peer] / us['ours']:.2f} ×" if peer in us else "" for peer in ("dense", "in-tree")]
            rows.append([record["gpu"], step, f"{context >> 10}K", f"{us['ours']:.0f}", *gains])
    headings = ["GPU", "one attention layer", "context", "ours µs", "over dense MLA", "over vLLM's sparse"]
    return markdown(headings, rows) if rows else ""
