"""`dsv32 bench plot`: the records as pictures that read well in a README."""

from __future__ import annotations

import collections
import functools
import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv32_plugin.benchmarks.layer_record import OPERATIONS, SIDES, Key, curves, layer_us
from dsv32_plugin.benchmarks.records import ENGINES, Record, Row, median, model_of
from dsv32_plugin.benchmarks.views import KernelCase, backends, kernel_cases
from dsv32_plugin.console import CommandError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"dense": "#8c8c8c", "in-tree": "#e08214", "ours": "#2166ac"}
LABELS = {"dense": "dense MLA", "in-tree": "vLLM's sparse attention", "ours": "dsv32-plugin"}
LINES = ("-", "--", ":", "-.")
OPERATION_COLOURS = dict(
    zip(OPERATIONS, ("#cccccc", "#7fbf7b", "#b2abd2", "#fdb863", "#e66101", "#f4a14e", "#2166ac"), strict=True)
)
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "figure.dpi": 150, "savefig.bbox": "tight", "svg.hashsalt": "dsv32",
}  # fmt: skip


def draw(record: Record, path: Path) -> list[Path]:
    """The pictures that the record at `path` has for itself, as PNG files beside it.

    Raises:
        CommandError: matplotlib is missing.
    """
    written = paths(record, path)
    for picture in written:
        _save(functools.partial(ALONE[record["kind"]][1], record), picture)
    return written


def draw_together(found: Sequence[Record], picture: Path) -> list[Path]:
    """What records of one kind from several GPUs have in common, in one picture."""
    measured = [record for record in found if has_results(record)]
    if measured:
        _save(functools.partial(TOGETHER[measured[0]["kind"]], measured), picture)
    return [picture] if measured else []


def _save(make: Callable[[], Figure], picture: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise CommandError("the plots need matplotlib; pip install 'dsv32-plugin[bench]'") from error
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        # No version of the library inside: the same record gives the same file.
        make().savefig(picture, metadata={"Software": None})


def has_results(record: Record) -> bool:
    return any("figures" in row for row in record["rows"])


def paths(record: Record, path: Path) -> list[Path]:
    """Where the pictures of the record at `path` alone lie; none for a record without a result."""
    if record["kind"] not in ALONE or not has_results(record):
        return []
    return [path.with_name(f"{path.stem}{ALONE[record['kind']][0]}.png")]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    pyplot.close(figure)  # pyplot forgets it; it can still be saved
    return figure, list(axes.flat)


def _panels(keys: Iterable[Key], width: float, height: float) -> tuple[Figure, dict[Key, Axes]]:
    """A panel for each curve of a layer: a row for each number of heads, prefill first."""
    keys = list(keys)
    rows = sorted({heads for _, _, heads in keys}, reverse=True)
    columns = sorted({(mode != "prefill", mode, batch) for mode, batch, _ in keys})
    figure, axes = _figure(len(rows), len(columns), width * len(columns), height * len(rows))
    found = {}
    for axis, (heads, (_, mode, batch)) in zip(axes, itertools.product(rows, columns), strict=True):
        found[mode, batch, heads] = axis
        axis.set_title(f"{mode}, {heads} heads" if mode == "prefill" else f"decode, batch {batch}, {heads} heads")
        axis.set_visible((mode, batch, heads) in keys)
    return figure, found


def _footer(figure: Figure, records: Sequence[Record], text: str) -> None:
    where = ["; ".join(f"{record['gpu']}, commit {record['commit']}" for record in records)]
    warnings = dict.fromkeys(record["meaningless"] for record in records if "meaningless" in record)
    # As wide as the picture, at about 14 characters an inch.
    wide = int(14 * figure.get_figwidth())
    lines = [*textwrap.wrap(text, wide), *where, *warnings]
    figure.supxlabel("\n".join(lines), fontsize=7.5, color="#555555")


def _legend(figure: Figure, found: Sequence[Record], sides: Sequence[str]) -> None:
    """The colours of the sides and the line styles of the GPUs."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[side], marker="o", ms=2.5, label=LABELS[side]) for side in sides]
    gpus = [model_of(record["gpu"]) for record in found]
    handles += [Line2D([], [], color="black", ls=style, label=gpu) for gpu, style in zip(gpus, LINES, strict=False)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)


def _context_axis(axes: Axes, contexts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    labelled = contexts[::-1][::2]
    axes.set_xticks(labelled, [f"{n >> 10}K" if n >= 1024 else str(n) for n in labelled])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")


def _time_axis(axes: Axes, values: list[float]) -> None:
    """Logarithmic, but from 0 where the times are close to each other."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if max(values) < 3 * min(values):
        axes.set_ylim(0, 1.1 * max(values))
    else:
        axes.set_yscale("log")
        steps = (1, 2, 5) if max(values) > 20 * min(values) else (1, 1.5, 2, 3, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(10, subs=steps))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("ms a layer")


def layers(found: Sequence[Record]) -> Figure:
    """Time against context, a panel for each mode, batch and number of heads; a line style for each GPU."""
    panels = [curves(record["rows"]) for record in found]
    figure, axes = _panels(dict.fromkeys(key for each in panels for key in each), 3.0, 2.6)
    for key, axis in axes.items():
        mine = [each.get(key, {}) for each in panels]
        values = [layer_us(row) / 1e3 for sides in mine for points in sides.values() for row in points.values()]
        if not values:
            continue
        for sides, style in zip(mine, LINES, strict=False):
            for side in (name for name in SIDES if name in sides):
                x, rows = zip(*sorted(sides[side].items()), strict=True)
                y = [layer_us(row) / 1e3 for row in rows]
                axis.plot(x, y, style, marker="o", ms=2.5, lw=1.4, color=COLOURS[side])
        _time_axis(axis, values)
        _context_axis(axis, sorted({n for sides in mine for points in sides.values() for n in points}))
    _legend(figure, found, [side for side in SIDES if any(side in sides for each in panels for sides in each.values())])
    _footer(figure, found, "One attention layer with its projections, cold L2 cache, under a CUDA graph")
    return figure


def layer_operations(record: Record) -> Figure:
    """Where the time goes: stacked by operation at three contexts."""
    panels = curves(record["rows"])
    figure, axes = _panels(panels, 3.4, 2.9)
    used: dict[str, None] = {}
    for key, sides in panels.items():
        contexts = sorted({n for measured in sides.values() for n in measured})
        shown = sorted({contexts[0], contexts[len(contexts) // 2], contexts[-1]})
        place, ticks = 0.0, []
        for context in shown:
            for side in (name for name in SIDES if context in sides.get(name, {})):
                bottom = 0.0
                for operation, us in sides[side][context]["operations"].items():
                    axes[key].bar(place, us / 1e3, 0.85, bottom=bottom, color=OPERATION_COLOURS[operation])
                    bottom += us / 1e3
                    used[operation] = None
                ticks.append((place, f"{side} {context >> 10}K"))
                place += 1
            place += 0.6
        axes[key].set_xticks([at for at, _ in ticks], [text for _, text in ticks], rotation=90, fontsize=7)
        axes[key].set_ylabel("ms a layer")
        axes[key].grid(axis="x", visible=False)
    from matplotlib.patches import Patch

    handles = [Patch(color=OPERATION_COLOURS[name], label=name) for name in OPERATIONS if name in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    _footer(figure, [record], "An operation's time is what it adds to the chain of those before it")
    return figure


def kernels(found: Sequence[Record]) -> Figure:
    """Ours against the best peer, case by case; the bar's end is the speed over it. A shade for each GPU."""
    speed = [{_case(case): case for case in kernel_cases(record) if case.speedup} for record in found]
    names = list(dict.fromkeys(name for rows in speed for name in rows))
    figure, (axis,) = _figure(1, 1, 7.5, 1.2 + (0.06 + 0.1 * len(found)) * len(names))
    height = 0.8 / len(found)
    for i, rows in enumerate(speed):
        for place, name in enumerate(names):
            case = rows.get(name)
            if case is None or case.best is None or case.speedup is None:
                continue
            value, peer = case.speedup, case.best["side"]
            colour = COLOURS["ours"] if value >= 1 else COLOURS["in-tree"]
            at = place + (i - (len(found) - 1) / 2) * height
            axis.barh(at, value - 1, left=1, color=colour, height=height, alpha=1 - 0.45 * i / len(found))
            text = f"{value:.2f}× {peer}" if i == 0 else f"{value:.2f}×"
            axis.annotate(text, (max(value, 1), at), (3, 0), textcoords="offset points", va="center", fontsize=6)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(names)), names, fontsize=6.5)
    axis.invert_yaxis()
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.margins(x=0.3, y=0.01)
    order = ", then ".join(model_of(record["gpu"]) for record in found)
    axis.set_xlabel(f"speed over the best peer ({order}; cold L2; above 1 ours is faster)")
    axis.grid(axis="y", visible=False)
    _footer(figure, found, "Medians of interleaved rounds under CUDA graphs, every result proven right first")
    return figure


def _case(case: KernelCase) -> str:
    return f"{case.ours['case']['operation']}  {case.shape}"


def cost(found: Sequence[Record]) -> Figure:
    """Dollars a million tokens against the position, like the paper's figure 3; a line style for each GPU."""
    figure, axes = _figure(1, 2, 9.0, 3.6)
    for axis, mode in zip(axes, ("prefill", "decode"), strict=True):
        contexts: set[int] = set()
        for record, style in zip(found, LINES, strict=False):
            mine = [row for row in record["rows"] if row["case"]["mode"] == mode]
            contexts |= {row["case"]["L"] for row in mine}
            for side in SIDES:
                points = [(row["case"]["L"], median(row, "usd_per_million")) for row in mine if row["side"] == side]
                if points:
                    axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=COLOURS[side])
        ticks = sorted(contexts)[-3:]
        axis.set_xticks(ticks, [f"{n >> 10}K" for n in ticks])
        axis.set_xlabel("position of the token")
        axis.set_ylabel("US$ a million tokens")
        axis.set_ylim(bottom=0)
        axis.set_title(mode)
    _legend(figure, found, [side for side in SIDES if any(row["side"] == side for r in found for row in r["rows"])])
    _footer(figure, found, "; ".join(dict.fromkeys(record["method"] for record in found)))
    return figure


def _bars(axis: Axes, places: Sequence[str], values: dict[str, dict[str, float]], labels: dict[str, str]) -> None:
    """Side -> place -> value."""
    colours = {"plugin": COLOURS["ours"], "in-tree": COLOURS["in-tree"], "dense": COLOURS["dense"]}
    for i, (side, mine) in enumerate(values.items()):
        at = [places.index(name) + (i - (len(values) - 1) / 2) * 0.25 for name in mine]
        axis.bar(at, list(mine.values()), 0.23, color=colours[side], label=labels[side])
    axis.set_xticks(range(len(places)), places)
    axis.grid(axis="x", visible=False)


def _side_labels(rows: Sequence[Row]) -> dict[str, str]:
    alone = f"{ENGINES[rows[0]['case']['engine']]} alone"
    return {"plugin": LABELS["ours"], "in-tree": alone, "dense": LABELS["dense"]}


def serve(record: Record) -> Figure:
    """Latencies at the first load, throughput at the last one, of the depth that was measured most."""
    rows = [row for row in record["rows"] if "figures" in row]
    labels, sides = _side_labels(rows), backends(rows)
    loads_of = collections.Counter(row["case"]["layers"] for row in rows)
    layers = max(loads_of, key=lambda depth: (loads_of[depth], depth))
    rows = [row for row in rows if row["case"]["layers"] == layers]
    loads, workloads = (list(dict.fromkeys(row["case"][key] for row in rows)) for key in ("load", "workload"))
    panels = (
        ("first token, ms (median)", loads[0], "ttft_ms"),
        ("per token, ms (median)", loads[0], "tpot_ms"),
        ("tokens a second, in and out", loads[-1], "tokens_per_s"),
    )
    figure, axes = _figure(1, len(panels), 3.4 * len(panels), 3.4)
    for axis, (title, load, name) in zip(axes, panels, strict=True):
        shown = [row for row in rows if row["case"]["load"] == load]
        values = {
            side: {row["case"]["workload"]: median(row, name) or 0.0 for row in shown if row["side"] == side}
            for side in sides
        }
        _bars(axis, workloads, values, labels)
        axis.set_title(f"{title}; {load}", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    _footer(figure, [record], f"{layers} layers. {record['method']}")
    return figure


def whole(record: Record) -> Figure:
    """First token and time per token by context and batch, a line of panels for each model and launch."""
    rows = [row for row in record["rows"] if "L" in row["case"] and "figures" in row]
    keys = ("model", "layers", "experts", "launch")
    places = list(dict.fromkeys(tuple(row["case"][key] for key in keys) for row in rows))
    labels, sides = _side_labels(rows), backends(rows)
    figure, axes = _figure(len(places), 2, 9.0, 3.2 * len(places))
    for axis, (place, name) in zip(axes, itertools.product(places, ("ttft_ms", "tpot_ms")), strict=True):
        shown = [row for row in rows if tuple(row["case"][key] for key in keys) == place and name in row["figures"]]
        names = list(dict.fromkeys(_load(row) for row in shown))
        values = {
            side: {_load(row): median(row, name) or 0.0 for row in shown if row["side"] == side} for side in sides
        }
        _bars(axis, names, values, labels)
        axis.set_yscale("log")
        axis.set_ylabel("first token, ms" if name == "ttft_ms" else "ms a token")
        model, layers, experts, launch = place
        axis.set_title(f"{model}, {layers} layers, {experts} experts, {launch}", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    _footer(figure, [record], record["method"])
    return figure


def _load(row: Row) -> str:
    length, size = row["case"]["L"], row["case"]["B"]
    return (f"{length >> 10}K" if length >= 1024 else str(length)) + (f" × {size}" if size > 1 else "")


KINDS = ("kernels", "layer", "cost", "serve", "whole", "compare")
"""What a picture can be asked of; a comparison has none."""
TOGETHER: dict[str, Callable[[Sequence[Record]], Figure]] = {"kernels": kernels, "layer": layers, "cost": cost}
"""Kind of a record -> how those of several GPUs are drawn together."""
ALONE: dict[str, tuple[str, Callable[[Record], Figure]]] = {
    "layer": ("-operations", layer_operations),
    "serve": ("", serve),
    "whole": ("", whole),
}
"""Kind of a record -> what follows its name in that of its own picture, and how it is drawn."""
