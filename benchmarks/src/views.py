"""How a record reads: the same tables on the terminal and, as Markdown, in the documentation."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import rich.box
import rich.table

from dsv32_plugin.benchmarks import records
from dsv32_plugin.benchmarks.layer_record import SIDES, Crossover, Curves, crossovers, curves, layer_us
from dsv32_plugin.benchmarks.records import BACKENDS, ENGINES, OURS, Record, Row, median, model_of
from dsv32_plugin.console import stdout

SHORT = 10
"""Characters of a cell that stays on one line in a narrow terminal, and of a line of its heading."""


@dataclass(frozen=True)
class Table:
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        rows = [self.headings, ["---"] * len(self.headings), *self.lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def terminal(self, title: str) -> rich.table.Table:
        found = rich.table.Table(title=title, title_justify="left", header_style="bold", box=rich.box.SIMPLE_HEAD)
        found.padding, found.pad_edge = (0, 1, 0, 0), False
        for heading, *cells in zip(self.headings, *self.lines, strict=True):
            short = textwrap.fill(heading, SHORT, break_long_words=False)
            found.add_column(short, overflow="fold", no_wrap=max(map(len, cells), default=0) <= SHORT)
        for line in self.lines:
            found.add_row(*line)
        return found


Part = str | Table
View = Callable[[Sequence[Record]], list[Part]]


def markdown(parts: Iterable[Part]) -> str:
    return "\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts)


def show(record: Record) -> int:
    """Print the record; the exit status: 1 if a result was wrong, or a server failed or left a request unanswered."""
    made = record["runs"] if record["kind"] == "compare" else [record]
    title = " → ".join(run["gpu"] + (f", commit {run['commit']}" if "commit" in run else "") for run in made)
    for part in VIEWS[record["kind"]]([record]):
        if isinstance(part, Table):
            stdout.print(part.terminal(title))
        else:
            stdout.print(part, soft_wrap=True, markup=False)
    if "seconds" in record:
        stdout.print(f"{record['seconds']} s in all", soft_wrap=True)
    if "meaningless" in record:
        stdout.print(record["meaningless"], style="bold red", soft_wrap=True)
    wrong = {records.line(row): None for row in record["rows"] if "error" in row}
    for row in record["rows"]:
        if row.get("errors") and "error" not in row:
            wrong[f"{records.line(row)}: {'; '.join(row['errors'])}"] = None
    for line in wrong:
        stdout.print(line, style="red", markup=False, soft_wrap=True)
    return int(bool(wrong))


def left_out(found: Sequence[Record]) -> list[Part]:
    """What the time was not enough for, and the sides that some case lacks."""
    parts: list[Part] = []
    for record in found:
        where = f" on {model_of(record['gpu'])}" if len(found) > 1 else ""
        parts += [f"Not run{where}: {', '.join(record['not_run'])}."] if record["not_run"] else []
        parts += [f"Missing{where}: {side} ({reason})." for side, reason in records.missing(record).items()]
    return parts


# -- kernels


@dataclass(frozen=True)
class KernelCase:
    """Our row of a case and those of the peers that were measured; what they are ahead of or behind."""

    ours: Row
    peers: list[Row]

    @property
    def shape(self) -> str:
        return records.name_of({key: value for key, value in self.ours["case"].items() if key != "operation"})

    @property
    def best(self) -> Row | None:
        return min(self.peers, key=lambda row: row["figures"]["cold_us"]["median"], default=None)

    @property
    def speedup(self) -> float | None:
        """Over the best peer."""
        if self.best is None or "figures" not in self.ours:
            return None
        return round(self.best["figures"]["cold_us"]["median"] / self.ours["figures"]["cold_us"]["median"], 3)


def kernel_cases(record: Record) -> list[KernelCase]:
    found: dict[str, list[Row]] = {}
    for row in record["rows"]:
        found.setdefault(records.name_of(row["case"]), []).append(row)
    return [KernelCase(ours, [row for row in rest if "figures" in row]) for ours, *rest in found.values()]


def ceilings_text(ceiling: dict[str, Any]) -> str:
    """What the floors of a record come from."""
    bf16 = f"{ceiling['bf16_flops_per_us'] / 1e6:.3g} TFLOP/s in bfloat16"
    if "fp8_missing" in ceiling:
        fp8 = f"no fp8 product ({ceiling['fp8_missing']}), so that fp8 work has bfloat16's floor"
    else:
        fp8 = f"{ceiling['fp8_flops_per_us'] / 1e6:.3g} in fp8"
    return f"Ceilings of this run: {ceiling['bytes_per_us'] / 1e6:.3g} TB/s copied, {bf16}, {fp8}."


def kernels(found: Sequence[Record]) -> list[Part]:
    """A line a case."""
    (record,) = found
    lines = []
    for case in kernel_cases(record):
        ours, best = case.ours, case.best
        line = [ours["case"]["operation"], case.shape]
        if "error" in ours:
            lines.append([*line, "wrong", *[""] * 6])
            continue
        cold, warm = ours["figures"]["cold_us"], ours["figures"]["warm_us"]
        line += [f"{cold['median']:.1f}", f"{cold['low']:.1f}-{cold['high']:.1f}", f"{warm['median']:.1f}"]
        line += [best["side"], f"{median(best, 'cold_us'):.1f}", f"{case.speedup:.2f}"] if best else [""] * 3
        lines.append([*line, f"{ours['floor_us']:.1f} {ours['floor_by']}"])
    peer = ("best peer", "peer µs", "faster")
    headings = ("operation", "shape", "ours µs", "spread", "warm µs", *peer, "floor µs")
    return [ceilings_text(record["ceilings"]), Table(headings, lines), *left_out(found)]


def kernels_summary(found: Sequence[Record]) -> list[Part]:
    """A line an operation: how its cases compare with the best peer of each, on each GPU."""
    measured = [kernel_cases(record) for record in found]
    lines = []
    for operation in dict.fromkeys(case.ours["case"]["operation"] for cases in measured for case in cases):
        line = [operation]
        for cases in measured:
            mine = [case for case in cases if case.ours["case"]["operation"] == operation]
            speed = [case.speedup for case in mine if case.speedup]
            wrong = sum("error" in case.ours for case in mine)
            line.append(str(len(speed)) + (f", {wrong} wrong" if wrong else ""))
            mean = math.exp(sum(map(math.log, speed)) / len(speed)) if speed else math.nan
            line += [f"{mean:.2f}", f"{min(speed):.2f} to {max(speed):.2f}"] if speed else ["", ""]
        lines.append(line)
    gpus = [model_of(record["gpu"]) for record in found]
    columns = ("cases with a peer", "speed over the best (mean)", "range")
    table = Table(["operation", *(f"{gpu}: {column}" for gpu in gpus for column in columns)], lines)
    return [table, *left_out(found)]


# -- one layer


def layers(found: Sequence[Record]) -> list[Part]:
    """The times of each GPU side by side, a table for each number of heads, and where sparse passes dense."""
    measured = [curves(record["rows"]) for record in found]
    gpus = [f"{model_of(record['gpu'])}: " if len(found) > 1 else "" for record in found]
    keys = list(dict.fromkeys(key for panels in measured for key in panels))
    methods = dict.fromkeys(record["method"] for record in found)
    whose = dict.fromkeys(
        f"{row['side']} {row['case']['mode']}: {row['kernels']}"
        for record in found
        for row in record["rows"]
        if "kernels" in row
    )
    parts: list[Part] = [f"{' '.join(methods)} Kernels: {'; '.join(whose)}."]
    columns = (*(f"{side} µs" for side in SIDES), "over dense", "over in-tree")
    headings = ["step", "sequences", "context", *(gpu + column for gpu in gpus for column in columns)]
    for heads in sorted({key[2] for key in keys}, reverse=True):
        lines = []
        for mode, batch, _ in (key for key in keys if key[2] == heads):
            sides = [panels.get((mode, batch, heads), {}) for panels in measured]
            for context in sorted({n for each in sides for points in each.values() for n in points}):
                cells = [cell for each in sides for cell in layer_cells(each, context)]
                lines.append([mode, str(batch), str(context), *cells])
        parts += [f"{heads} heads:", Table(headings, lines)]
    parts += ["Faster than dense from this context on, and how much at the longest:", crossings(measured, gpus)]
    return [*parts, *left_out(found)]


def layer_cells(sides: dict[str, dict[int, Row]], context: int) -> list[str]:
    us = {side: layer_us(sides[side][context]) for side in SIDES if context in sides.get(side, {})}
    times = [f"{us[side]:.1f}" if side in us else "" for side in SIDES]
    gains = [f"{us[peer] / us[OURS]:.2f}" if peer in us and OURS in us else "" for peer in ("dense", "in-tree")]
    return times + gains


def crossings(measured: Sequence[Curves], gpus: Sequence[str]) -> Table:
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for panels, gpu in zip(measured, gpus, strict=True):
        for ((mode, batch, heads), side), crossing in crossovers(panels).items():
            line = lines.setdefault((mode, str(batch), str(heads)), {})
            line[gpu + side] = crossing_cell(crossing)
    headings = list(dict.fromkeys(heading for line in lines.values() for heading in line))
    table = [[*key, *(line.get(heading, "") for heading in headings)] for key, line in lines.items()]
    return Table(["step", "sequences", "heads", *headings], table)


def crossing_cell(crossing: Crossover) -> str:
    if crossing.context is None:
        return f"not up to {crossing.longest}"
    begin = "always" if crossing.from_start else f"{crossing.context:.0f}"
    return f"{begin} ({crossing.gain_at_longest:.2f} ×)"


def headline(found: Sequence[Record]) -> list[Part]:
    """The longest context of every layer record: a line a mode, batch and number of heads, the GPUs side by side."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    columns = ("ours µs", "over dense MLA (ahead from)", "over vLLM's sparse")
    for record in found:
        panels = curves(record["rows"])
        for (key, side), crossing in crossovers(panels).items():
            if side != OURS:
                continue
            mode, batch, heads = key
            _, _, us, over_dense, over_in_tree = layer_cells(panels[key], crossing.longest)
            step = f"{mode}, {heads} heads" + ("" if mode == "prefill" else f", batch {batch}")
            begin = "never" if crossing.context is None else f"{crossing.context / 1024:.1f}K"
            values = (f"{float(us):.0f}", f"{over_dense} × ({begin})", over_in_tree and f"{over_in_tree} ×")
            line = lines.setdefault((step, f"{crossing.longest >> 10}K"), {})
            line |= {f"{model_of(record['gpu'])}: {name}": text for name, text in zip(columns, values, strict=True)}
    headings = list(dict.fromkeys(heading for line in lines.values() for heading in line))
    table = [[*key, *(line.get(heading, "") for heading in headings)] for key, line in lines.items()]
    commits = "; ".join(f"{record['gpu']}: commit {record['commit']}" for record in found)
    return [Table(["one attention layer", "context", *headings], table), f"{commits}."]


def costs(found: Sequence[Record]) -> list[Part]:
    """A line a GPU, step and side: the dollars at each context."""
    contexts = sorted({row["case"]["L"] for record in found for row in record["rows"]})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for record in found:
        for row in record["rows"]:
            line = lines.setdefault((model_of(record["gpu"]), row["case"]["mode"], row["side"]), {})
            line[row["case"]["L"]] = f"{median(row, 'usd_per_million'):.3f}"
    headings = ["GPU", "step", "side", *(f"{context >> 10}K" for context in contexts)]
    table = [[*key, *(line.get(context, "") for context in contexts)] for key, line in lines.items()]
    methods = "; ".join(dict.fromkeys(record["method"] for record in found))
    return [f"US dollars a million tokens: {methods}.", Table(headings, table)]


# -- servers and engines


@dataclass(frozen=True)
class Figure:
    heading: str
    form: str
    more_is_better: bool = False
    spread: bool = False
    compared: bool = True


FIGURES = {
    "ms_per_step": Figure("ms/step", ".2f", spread=True),
    "first_token_s": Figure("first token s", ".1f"),
    "own_s": Figure("the plugin's kernels s", ".1f"),
    "most_gib": Figure("most memory held by torch, GiB", ".2f"),
    "needles_right": Figure("needles right", ".0f", compared=False),
    "ready_s": Figure("start s", ".0f"),
    "weights_gib": Figure("weights GiB", ".1f", compared=False),
    "planned_weights_gib": Figure("weights GiB, planned", ".1f", compared=False),
    "pool_tokens": Figure("tokens in the caches", ",.0f", more_is_better=True),
    "planned_pool_tokens": Figure("tokens in the caches, planned", ",.0f", compared=False),
    "used_gib": Figure("most memory GiB", ".1f", compared=False),
    "planned_used_gib": Figure("most memory GiB, planned", ".1f", compared=False),
    "ttft_ms": Figure("first token ms", ".0f"),
    "tpot_ms": Figure("per token ms", ".2f"),
    "tokens_per_s": Figure("tokens/s", ",.0f", more_is_better=True, spread=True),
}
"""What is shown of a server or an engine; `tokens_per_s` counts prompts, too."""


def backends(rows: Iterable[Row]) -> list[str]:
    found = {row["side"] for row in rows}
    return [backend for backend in BACKENDS if backend in found]


def side_by_side(rows: Sequence[Row]) -> list[Table]:
    """A table for the cases that are described alike: a line a case, the sides next to each other."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(tuple(row["case"]), []).append(row)
    tables = []
    for keys, mine in alike.items():
        figures = [name for name in FIGURES if any(name in row.get("figures", {}) for row in mine)]
        columns = [
            (name, side)
            for name in figures
            for side in backends(mine)
            if any(row["side"] == side and (name in row.get("figures", {}) or "error" in row) for row in mine)
        ]
        lines: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in mine:
            case = tuple(ENGINES.get(value, str(value)) for value in row["case"].values())
            lines.setdefault(case, {})[row["side"]] = row
        # In the order in which the values first appear, column by column.
        order = [list(dict.fromkeys(column)) for column in zip(*lines, strict=True)]
        cases = sorted(lines, key=lambda case: [seen.index(value) for seen, value in zip(order, case, strict=True)])
        table = [[*case, *(cell(lines[case], name, side) for name, side in columns)] for case in cases]
        tables.append(Table([*keys, *(f"{FIGURES[name].heading}: {side}" for name, side in columns)], table))
    return tables


def cell(sides: dict[str, Row], name: str, side: str) -> str:
    """A side's figure, and how many times better the plugin's is."""
    row, figure = sides.get(side, {}), FIGURES[name]
    if "error" in row:
        return "failed"
    value = median(row, name)
    if value is None:
        return ""
    found = row["figures"][name]
    shown = f"{value:{figure.form}}"
    if figure.spread and "low" in found:
        shown += f" ({found['low']:{figure.form}} to {found['high']:{figure.form}})"
    if row.get("completed", 0) < row.get("requests", 0):
        shown += f", {row['completed']} of {row['requests']} answered"
    ours = median(sides.get(BACKENDS[0], {}), name)
    if side == BACKENDS[0] or ours is None or not figure.compared:
        return shown
    return f"{shown}, {ours / value if figure.more_is_better else value / ours:.2f} ×"


BETTER = "Medians; × is how many times better the plugin is."


def servers(found: Sequence[Record]) -> list[Part]:
    return [*served(found), *extended(found[0])]


def served(found: Sequence[Record]) -> list[Part]:
    """What was measured, without what it was extended to."""
    (record,) = found
    busy = max((row["client_busy"] for row in record["rows"] if "client_busy" in row), default=0.0)
    about = f"{record['method']} The client used at most {busy:.0%} of a core."
    medians = BETTER if len(backends(record["rows"])) > 1 else "Medians."
    return [f"{about} {medians}", *side_by_side(record["rows"])]


def wholes(found: Sequence[Record]) -> list[Part]:
    """Starts and memory, then the loads; the memory is the most that a side was seen to hold."""
    (record,) = found
    most: dict[tuple[Any, ...], float] = {}
    for row in record["rows"]:
        most[_place(row)] = max(most.get(_place(row), 0.0), median(row, "used_gib") or 0.0)
    rows = []
    for row in record["rows"]:
        figures = {name: value for name, value in row.get("figures", {}).items() if name != "used_gib"}
        if row["case"].get("workload") == "start" and most[_place(row)]:
            figures["used_gib"] = {"median": most[_place(row)]}
        rows.append(row | ({"figures": figures} if figures else {}))
    return [f"{record['method']}. {BETTER}", *side_by_side(rows)]


def _place(row: Row) -> tuple[Any, ...]:
    """Whose row it is."""
    return (row["side"], *(row["case"][key] for key in ("model", "layers", "experts", "engine", "launch")))


def extended(record: Record) -> list[Part]:
    """What two depths say about the whole model, apart from what was measured."""
    deeper = [row for row in record["rows"] if "extrapolated" in row]
    lines = []
    for row in deeper:
        low, high = row["extrapolated"]["tpot_ms_range"]
        first, token = (row["extrapolated"][key] for key in ("ttft_ms", "tpot_ms"))
        engine, workload, load = (row["case"][key] for key in ("engine", "workload", "load"))
        lines.append([engine, row["side"], workload, load, f"{first:.0f}", f"{token:.1f} ({low:.1f} to {high:.1f})"])
    if not lines:
        return []
    # The formula; what a reader must know of it besides stands in the page.
    methods = "; ".join(dict.fromkeys(row["extrapolated"]["method"].partition(". ")[0] for row in deeper))
    headings = ["engine", "backend", "workload", "load", "first token ms", "per token ms"]
    layers = deeper[0]["extrapolated"]["layers"]
    return [f"Extended to {layers} layers, not measured: {methods}.", Table(headings, lines)]


def engines(found: Sequence[Record]) -> list[Part]:
    """The figures, then how they were made."""
    (record,) = found
    keys = ["heads", "cache"]
    if any("release" in row["case"] for row in record["rows"]):
        keys.append("release")
    most: dict[tuple[Any, ...], float] = {}
    for row in record["rows"]:
        if peak := median(row, "peak_gib"):
            entry = (row["side"], *(row["case"].get(key, "") for key in keys))
            most[entry] = max(peak, most.get(entry, 0.0))
    memory = [
        {"case": dict(zip(keys, case, strict=True)), "side": side, "figures": {"most_gib": {"median": gib}}}
        for (side, *case), gib in most.items()
    ]
    runs = [
        [run["side"], *(str(run.get(key, "")) for key in (*keys, "commit", "machine", "date"))]
        for run in record["runs"]
    ]
    releases = dict.fromkeys(run.get("release") or record["versions"]["vllm"] for run in record["runs"])
    about = f"{record['gpu']}, driver {record['driver']}, vLLM {', '.join(releases)}. {BETTER}"
    made = Table(["side", *keys, "commit", "machine", "date"], runs)
    return [about, *side_by_side([*record["rows"], *memory]), made]


# -- the rest


def comparisons(found: Sequence[Record]) -> list[Part]:
    """A line a time, after over before, and the summary."""
    (record,) = found
    lines = []
    for row in record["rows"]:
        before, after = (row["figures"][name]["median"] for name in ("before", "after"))
        lines.append([row["case"]["name"], f"{before:.1f}", f"{after:.1f}", f"{row['ratio']:.3f}", row["verdict"]])
    return [Table(["what", "before", "after", "ratio", ""], lines), record["summary"]]


def repeats(found: Sequence[Record]) -> list[Part]:
    """Each comparison of two runs in a line."""
    lines = []
    for record in found:
        first, second = record["runs"]
        where = f"{first['gpu']}, commit {first['commit']}, {first['date']}"
        if second["commit"] != first["commit"]:
            where += f", then commit {second['commit']}, {second['date']}"
        lines.append(f"- `dsv32 bench {first['kind']}` twice on {where}: {record['summary']}.")
    return ["\n".join(lines)]


def recall(found: Sequence[Record]) -> list[Part]:
    """A line for the data, a column for how the keys are kept."""
    (record,) = found
    lines: dict[str, dict[str, str]] = {}
    for row in record["rows"]:
        share = row["figures"]["recall"]
        shown = f"{100 * share['mean']:.2f} % (least {100 * share['low']:.2f})"
        lines.setdefault(row["case"]["data"], {})[row["side"]] = shown
    sides = list(dict.fromkeys(row["side"] for row in record["rows"]))
    return [Table(["data", *sides], [[data, *(line[side] for side in sides)] for data, line in lines.items()])]


def parsers(found: Sequence[Record]) -> list[Part]:
    (record,) = found
    lines = []
    for row in record["rows"]:
        if "missing" in row:
            lines.append([row["side"], "not installed", *[""] * 4])
            continue
        counts = ["{} of {}".format(*row[key]) for key in ("undamaged", "damaged", "steady")]
        stopped = f"more than {record['limit_seconds']} s (stopped)"
        seconds = [median(row, figure) for figure in ("65536_s", "1048576_s")]
        times = [stopped if value is None else f"{value:.2f} s" for value in seconds]
        lines.append([f"{row['side']} {row['version']}", *counts, *times])
    cases = ("undamaged cases right", "damaged cases as in the table above", "stream equals whole")
    return [Table(["parser", *cases, "64 KiB argument", "1 MiB argument"], lines)]


VIEWS: dict[str, View] = {
    "kernels": kernels,
    "layer": layers,
    "cost": costs,
    "serve": servers,
    "whole": wholes,
    "engine": engines,
    "compare": comparisons,
    "recall": recall,
    "parsers": parsers,
}
"""Kind of a record -> how it reads on the terminal."""
