"""`dsv32 bench report`: every measured table and picture of the documentation, from the records in benchmarks/results.

A document has blocks between `<!-- NAME -->` and `<!-- end -->`; only they are written. Records lie in one folder a
GPU, `benchmarks/results/h100/layer.json`, with their pictures beside them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks import (
    compile_matrix,
    cost,
    engine_view,
    harness,
    layer_view,
    plots,
    records,
    serve_record,
)
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

    def each(kind: str, render: Callable[[Record], str], *, pictures: bool = False) -> Callable[[], str]:
        """A section for each GPU."""

        def section(path: Path, record: Record) -> str:
            drawn = plots.paths(record, path) if pictures else []
            return "\n\n".join((source(record), *(link(picture, folder) for picture in drawn), render(record)))

        return lambda: "\n\n".join(section(*found) for found in load(results, kind).items()) or NOT_MEASURED

    def together(kind: str, render: Callable[[list[Record]], str]) -> Callable[[], str]:
        """The GPUs side by side: where the records are from, the pictures, the tables."""

        def section() -> str:
            found = load(results, kind)
            if not found:
                return NOT_MEASURED
            sources = "\\\n".join(source(record) for record in found.values())
            alone = [picture for path, record in found.items() for picture in plots.paths(record, path)]
            shared = [results / f"{kind}.png"] if any(map(plots.has_results, found.values())) else []
            return "\n\n".join(
                (sources, *(link(picture, folder) for picture in (*shared, *alone)), render([*found.values()]))
            )

        return section

    return {
        "compile matrix": single("compile_matrix.json", compile_matrix.markdown),
        "recall": single("recall.json", recall_table),
        "engine speed": lambda: (
            "\n\n".join(map(engine_view.markdown, load(results, "engine").values())) or NOT_MEASURED
        ),
        "speed": each("kernels", kernels_table),
        "kernels": together("kernels", kernels_summary),
        "layer": together("layer", layer_tables),
        "cost": together("cost", cost_table),
        "serve": each("serve", serve_table, pictures=True),
        "repeat": lambda: repeats([*load(results, "compare").values()]) or NOT_MEASURED,
        "headline": lambda: headline(list(load(results, "layer").values()), link(results / "layer.png", folder)),
    }


def load(results: Path, kind: str) -> dict[Path, Record]:
    return {path: records.read(path, kind) for path in sorted(results.glob(f"*/{kind}*.json"))}


def draw_all(results: Path) -> list[Path]:
    """The pictures of every record, beside it, and those of several GPUs, beside their folders."""
    found = [picture for path in sorted(results.glob("*/*.json")) for picture in plots.draw(records.read(path), path)]
    for kind in plots.TOGETHER:
        found += plots.draw_together(list(load(results, kind).values()), results / f"{kind}.png")
    return found


PICTURE_TEXTS = {
    "layer-operations": "One attention layer: where the time goes",
    "layer": "One attention layer: time against context",
    "kernels": "Speed over the best peer, case by case",
    "cost": "Dollars a million tokens against the position",
    "serve-vllm": "vLLM's server: latencies and throughput",
    "serve-sglang": "SGLang's server: latencies and throughput",
}
"""How the name of a picture begins -> what it shows."""


def link(picture: Path, folder: Path) -> str:
    place = Path(os.path.relpath(picture, folder)).as_posix()
    text = next((text for name, text in PICTURE_TEXTS.items() if picture.stem.startswith(name)), picture.stem)
    return f"![{text}]({place})"


def source(record: Record) -> str:
    """Where a record comes from, in one line."""
    command = f", `{record['command']}`" if "command" in record else ""
    seconds = f", {record['seconds']} s" if "seconds" in record else ""
    warning = f" **{record['meaningless']}**" if "meaningless" in record else ""
    return f"{record['gpu']}, commit {record['commit']}, {record['date']}{command}{seconds}.{warning}"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kernels_table(record: Record) -> str:
    found = markdown(list(harness.HEADINGS), [harness.cells(row) for row in record["rows"]])
    if record["not_run"]:
        found += "\n\nNot run: " + ", ".join(record["not_run"])
    return f"{harness.ceilings_text(record['ceilings'])}\n\n{found}" + missing(harness.missing(record))


def kernels_summary(found: list[Record]) -> str:
    """A line an operation: how its cases compare with the best peer of each, on each GPU."""
    rows = []
    for operation in dict.fromkeys(row["operation"] for record in found for row in record["rows"]):
        line = [operation]
        for record in found:
            mine = [row for row in record["rows"] if row["operation"] == operation]
            speed = [row["speedup"] for row in mine if "speedup" in row]
            mean = math.exp(sum(map(math.log, speed)) / len(speed)) if speed else math.nan
            wrong = sum("error" in row for row in mine)
            line.append(str(len(speed)) + (f", {wrong} wrong" if wrong else ""))
            line += [f"{mean:.2f}", f"{min(speed):.2f} to {max(speed):.2f}"] if speed else ["", ""]
        rows.append(line)
    gpus = [records.model_of(record["gpu"]) for record in found]
    columns = ("cases with a peer", "speed over the best (mean)", "range")
    table = markdown(["operation", *(f"{gpu}: {column}" for gpu in gpus for column in columns)], rows)
    return table + "".join(missing(harness.missing(record), gpu) for record, gpu in zip(found, gpus, strict=True))


def missing(reasons: dict[str, str], where: str = "") -> str:
    return "".join(f"\n\nMissing{where and f' on {where}'}: {peer} ({reason})." for peer, reason in reasons.items())


def recall_table(record: Record) -> str:
    """What `tests/kernels/recall.py` has measured: a line for the data, a column for how the keys are kept."""
    variants = ("fp8", "fp8 rotated", "bf16")
    shown = [
        [f"{100 * row[v]['mean']:.2f} % (least {100 * row[v]['least']:.2f})" for v in variants]
        for row in record["rows"]
    ]
    return markdown(
        ["data", *variants], [[row["data"], *cells] for row, cells in zip(record["rows"], shown, strict=True)]
    )


def layer_tables(found: list[Record]) -> str:
    """The times of each GPU side by side, a table for each number of heads, and where sparse passes dense."""
    measured = [curves(record["rows"]) for record in found]
    gpus = [records.model_of(record["gpu"]) for record in found]
    keys = list(dict.fromkeys(key for panels in measured for key in panels))
    methods = dict.fromkeys(record["method"] for record in found)
    whose = dict.fromkeys(
        f"{row['side']} {row['mode']}: {row['kernels']}"
        for record in found
        for row in record["rows"]
        if "kernels" in row
    )
    parts = [f"{' '.join(methods)} Kernels: {'; '.join(whose)}."]
    columns = (*(f"{side} µs" for side in SIDES), "over dense", "over in-tree")
    headings = ["step", "sequences", "context", *(f"{gpu}: {column}" for gpu in gpus for column in columns)]
    for heads in sorted({key[2] for key in keys}, reverse=True):
        rows = []
        for mode, batch, _ in (key for key in keys if key[2] == heads):
            sides = [panels.get((mode, batch, heads), {}) for panels in measured]
            for context in sorted({n for each in sides for points in each.values() for n in points}):
                cells = [cell for each in sides for cell in layer_cells(each, context)]
                rows.append([mode, str(batch), str(context), *cells])
        parts += [f"{heads} heads:", markdown(headings, rows)]
    parts += ["Faster than dense from this context on, and how much at the longest:", crossing_table(found, gpus)]
    for record, gpu in zip(found, gpus, strict=True):
        reasons = {row["side"]: row["missing"] for row in record["rows"] if "missing" in row}
        parts[-1] += missing(reasons, gpu)
    return "\n\n".join(parts)


def layer_cells(sides: dict[str, dict[int, Record]], context: int) -> list[str]:
    us = {side: sides.get(side, {}).get(context, {}).get("total", {}).get("median_us") for side in SIDES}
    times = [f"{us[side]:.1f}" if us[side] else "" for side in SIDES]
    gains = [f"{us[peer] / us['ours']:.2f}" if us[peer] and us["ours"] else "" for peer in ("dense", "in-tree")]
    return times + gains


def crossing_table(found: list[Record], gpus: list[str]) -> str:
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for record, gpu in zip(found, gpus, strict=True):
        for row in record["crossovers"]:
            line = rows.setdefault((row["mode"], str(row["B"]), str(row["H"])), {})
            line[f"{gpu}: {row['side']}"] = layer_view.crossover_cell(row)
    headings = list(dict.fromkeys(heading for line in rows.values() for heading in line))
    table = [[*key, *(line.get(heading, "") for heading in headings)] for key, line in rows.items()]
    return markdown(["step", "sequences", "heads", *headings], table)


def cost_table(found: list[Record]) -> str:
    contexts = sorted({row["L"] for record in found for row in record["rows"]})
    rows = [[records.model_of(record["gpu"]), *cells] for record in found for cells in cost.cells_of(record, contexts)]
    table = markdown(["GPU", "step", "side", *(f"{context >> 10}K" for context in contexts)], rows)
    return f"US dollars a million tokens: {'; '.join(dict.fromkeys(record['method'] for record in found))}.\n\n{table}"


def repeats(found: list[Record]) -> str:
    """Each comparison of two runs in a line."""
    lines = []
    for record in found:
        first, second = record["runs"]
        kind = first["kind"]
        where = f"{first['gpu']}, commit {first['commit']}, {first['date']}"
        if second["commit"] != first["commit"]:
            where += f", then commit {second['commit']}, {second['date']}"
        lines.append(f"- `dsv32 bench {kind}` twice on {where}: {record['summary']}.")
    return "\n".join(lines)


SERVE_FIGURES: dict[str, tuple[Callable[[Record], float], str, bool]] = {
    "first token ms": (lambda row: row["ttft_ms"]["median"], ".0f", False),
    "per token ms": (lambda row: row["tpot_ms"]["median"], ".2f", False),
    "tokens/s in and out": (lambda row: row["input_tokens_per_s"] + row["output_tokens_per_s"], ".0f", True),
}
"""Heading -> the figure of a row, how it is written, whether more is better."""


def serve_table(record: Record) -> str:
    """A line a load, the backends side by side, with how many times better the plugin is."""
    same = ("engine", "workload", "load", "layers")
    found = {tuple(row[key] for key in (*same, "backend")): row for row in record["rows"]}
    sides = serve_record.backends(record["rows"])
    engines, workloads, loads, depths = (list(dict.fromkeys(key[i] for key in found)) for i in range(len(same)))
    lines = []
    for load in itertools.product(engines, workloads, loads, sorted(depths)):
        rows = {side: row for side in sides if (row := found.get((*load, side)))}
        if rows:
            cells = [serve_cell(rows.get(side), rows.get("plugin"), kind) for kind in SERVE_FIGURES for side in sides]
            lines.append([records.ENGINES[load[0]], *map(str, load[1:]), *cells])
    headings = [*same, *(f"{kind}: {side}" for kind in SERVE_FIGURES for side in sides)]
    busy = max((row["client_busy"] for row in record["rows"] if "client_busy" in row), default=0.0)
    medians = "Medians; in brackets how many times better the plugin is." if len(sides) > 1 else "Medians."
    return (
        f"{record['method']} The client used at most {busy:.0%} of a core. {medians}\n\n"
        f"{markdown(headings, lines)}{serve_extended(record)}"
    )


def serve_cell(row: Record | None, ours: Record | None, kind: str) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "failed"
    value, form, more_is_better = SERVE_FIGURES[kind]
    shown = f"{value(row):{form}}"
    if row["completed"] < row["requests"]:
        shown += f", {row['completed']} of {row['requests']} answered"
    if ours is None or ours is row or "error" in ours:
        return shown
    ahead = value(ours) / value(row)
    return f"{shown} ({ahead if more_is_better else 1 / ahead:.2f})"


def serve_extended(record: Record) -> str:
    """What two depths say about the whole model, apart from what was measured."""
    deeper = [row for row in record["rows"] if "extrapolated" in row]
    rows = []
    for row in deeper:
        low, high = row["extrapolated"]["tpot_ms_range"]
        first, token = (row["extrapolated"][key] for key in ("ttft_ms", "tpot_ms"))
        names = [row[key] for key in ("engine", "backend", "workload", "load")]
        rows.append([*names, f"{first:.0f}", f"{token:.1f} ({low:.1f} to {high:.1f})"])
    if not rows:
        return ""
    methods = dict.fromkeys(row["extrapolated"]["method"] for row in deeper)
    layers = deeper[0]["extrapolated"]["layers"]
    headings = ["engine", "backend", "workload", "load", "first token ms", "per token ms"]
    return f"\n\nExtended to {layers} layers, not measured: {'; '.join(methods)}.\n\n{markdown(headings, rows)}"


def headline(found: list[Record], picture: str) -> str:
    """The longest context of every layer record: a line a mode, batch and number of heads, the GPUs side by side."""
    lines: dict[tuple[str, int], dict[str, str]] = {}
    gpus = [records.model_of(record["gpu"]) for record in found]
    columns = ("ours µs", "over dense MLA (ahead from)", "over vLLM's sparse")
    for record, gpu in zip(found, gpus, strict=True):
        ahead = {(row["mode"], row["B"], row["H"]): row for row in record["crossovers"] if row["side"] == "ours"}
        for key, sides in curves(record["rows"]).items():
            if key not in ahead:
                continue
            mode, batch, heads = key
            longest, begin = ahead[key]["longest"], ahead[key]["context"]
            _, _, us, over_dense, over_in_tree = layer_cells(sides, longest)
            step = f"{mode}, {heads} heads" + ("" if mode == "prefill" else f", batch {batch}")
            dense = f"{over_dense} × ({'never' if begin is None else f'{begin / 1024:.1f}K'})"
            values = (f"{float(us):.0f}", dense, over_in_tree and f"{over_in_tree} ×")
            line = lines.setdefault((step, longest), {})
            line |= {f"{gpu}: {column}": value for column, value in zip(columns, values, strict=True)}
    if not lines:
        return NOT_MEASURED
    headings = list(dict.fromkeys(heading for line in lines.values() for heading in line))
    rows = [
        [step, f"{context >> 10}K", *(line.get(heading, "") for heading in headings)]
        for (step, context), line in lines.items()
    ]
    commits = "; ".join(f"{record['gpu']}: commit {record['commit']}" for record in found)
    return f"{markdown(['one attention layer', 'context', *headings], rows)}\n\n{commits}.\n\n{picture}"
