"""The record of the engine comparison: what a case is called, how parts make a whole, and how it reads as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

SIDES = {
    "plugin": "this plugin",
    "in-tree": "vLLM's own sparse attention (DSV32_PLUGIN=0)",
    "dense": "vLLM's own dense MLA: the same sizes without the indexer, as DeepSeek-V3",
}
LENGTHS = (2048, 32768, 131072)
BATCHES = (1, 16, 64)
LONGEST_DENSE = 32768
"""Longer prompts take the dense side longer than all the others' cases together."""
MOST_DISTINCT = {2048: 64, 32768: 8, 131072: 2}
"""Distinct prompts of a decode case: filling the cache with more would take longer than all the measurements."""
PREFILL, DECODE, GRAPH = "prefill", "decode", "graph"
ROUNDS = {PREFILL: 4, DECODE: 4, GRAPH: 1}
"""Of each case, in each of which every side takes its turn. The first one warms up."""
LONG_ROUNDS = 3
"""Of prefills of more than LONGEST_DENSE tokens."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One engine: what is compared is what differs in `side` alone."""

    side: str
    heads: int
    kv_cache_dtype: str

    @property
    def name(self) -> str:
        return f"{self.side}, {self.heads} heads, {self.kv_cache_dtype} cache"


KEY = tuple(field.name for field in dataclasses.fields(Run))


def cases(only: str) -> list[dict[str, Any]]:
    """Those whose names have every word of `only`; short before long, so that a run that is cut off has most rows."""
    found: list[dict[str, Any]] = []
    for length in LENGTHS:
        rounds = LONG_ROUNDS if length > LONGEST_DENSE else ROUNDS[PREFILL]
        found.append({"kind": PREFILL, "L": length, "seed": 10_000_000 + length, "rounds": rounds})
        for kind in (DECODE, GRAPH):
            for batch in BATCHES:
                distinct = min(batch, MOST_DISTINCT[length])
                found.append({"kind": kind, "B": batch, "L": length, "distinct": distinct, "rounds": ROUNDS[kind]})
    return [case for case in found if set(only.split()) <= set(case_name(case).split())]


def takes(side: str, case: dict[str, Any]) -> bool:
    """Whether a case is measured on a side."""
    return side != "dense" or case["L"] <= LONGEST_DENSE


def case_name(case: dict[str, Any]) -> str:
    return " ".join([case["kind"], *(f"{key}={case[key]}" for key in ("B", "L") if key in case)])


def summarise(case: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's row of a case, of what its rounds gave."""
    row = case | {"peak_gib": max(found["peak_gib"] for found in rounds)}
    # The first round warms up, where there are others.
    counted = rounds[1:] or rounds
    if case["kind"] == PREFILL:
        seconds = [found["seconds"] for found in counted]
        tokens = rounds[0]["prompts"] * case["L"]
        return row | {
            "prompts": rounds[0]["prompts"],
            "warm_up_s": rounds[0]["seconds"],
            "seconds": seconds,
            "tokens_per_s": round(tokens / statistics.median(seconds)),
            "low": round(tokens / max(seconds)),
            "high": round(tokens / min(seconds)),
        }
    steps = sorted(ms for found in counted for ms in found["steps_ms"])
    return row | {
        "steps": len(steps),
        "ms_per_step": round(statistics.median(steps), 3),
        "low": round(steps[len(steps) // 10], 3),
        "high": round(steps[-1 - len(steps) // 10], 3),
        "rounds_ms": [round(statistics.median(found["steps_ms"]), 3) for found in counted],
    }


def find(record: dict[str, Any], run: Run) -> dict[str, Any] | None:
    """The record's entry of this run."""
    return next((entry for entry in record["runs"] if run == Run(**{key: entry[key] for key in KEY})), None)


def merge(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Add what another record of the same GPU and versions holds; its rows replace those of the same case."""
    if any(record[key] != other[key] for key in ("gpu", "versions")):
        names = [f"{found['gpu']}, {found['versions']}" for found in (record, other)]
        raise SystemExit(f"expected a record of {names[0]}, got one of {names[1]}; give another --output")
    for entry in other["runs"]:
        mine = find(record, Run(**{key: entry[key] for key in KEY}))
        if mine is None:
            record["runs"].append(entry)
        else:
            mine |= entry | {name: {**mine.get(name, {}), **entry.get(name, {})} for name in ("rows", "startup")}


def rows(record: dict[str, Any]) -> list[list[str]]:
    """Heads, cache, case, a figure for each side, and how many times better ours is than vLLM's own."""
    lines = []
    for heads, cache in sorted({(entry["heads"], entry["kv_cache_dtype"]) for entry in record["runs"]}, reverse=True):
        sides = [find(record, Run(side, heads, cache)) or {} for side in SIDES]
        for case in cases(""):
            measured = [entry.get("rows", {}).get(case_name(case), {}) for entry in sides]
            is_prefill = case["kind"] == PREFILL
            shared = any(row.get("distinct", 0) < row.get("B", 0) for row in measured)
            name = case_name(case) + (" (pages shared)" if shared else "")
            unit = "tokens/s" if is_prefill else "ms/step"
            values = [row.get("tokens_per_s" if is_prefill else "ms_per_step") for row in measured]
            if any(values):
                cells = [_cell(value, _spread(row)) for value, row in zip(values, measured, strict=True)]
                lines.append([str(heads), cache, name, unit, *cells, _ratio(values, more_is_better=is_prefill)])
        for label, unit, get in OF_THE_ENGINE:
            values = [get(entry) for entry in sides]
            if any(values):
                lines.append([str(heads), cache, label, unit, *map(_cell, values), _ratio(values)])
    return lines


def _spread(row: dict[str, Any]) -> tuple[float, float] | None:
    """The range of a prefill's rounds, the 10th and 90th percentile of the steps."""
    return (row["low"], row["high"]) if "low" in row else None


def _cell(value: float | None, spread: tuple[float, float] | None = None) -> str:
    if not value:
        return ""
    shown = [f"{x:,.0f}" if x >= 1000 else f"{x:.2f}" for x in (value, *(spread or ()))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if spread else shown[0]


def _ratio(values: list[Any], *, more_is_better: bool = False) -> str:
    ours, theirs = values[0], values[1]
    if not (ours and theirs):
        return ""
    return f"{ours / theirs if more_is_better else theirs / ours:.2f}"


def _peak(entry: dict[str, Any]) -> float | None:
    return max((row.get("peak_gib", 0.0) for row in entry.get("rows", {}).values()), default=None)


def _startup(state: str, figure: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda entry: entry.get("startup", {}).get(state, {}).get(figure)


OF_THE_ENGINE: tuple[tuple[str, str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("start to first token, nothing compiled before", "s", _startup("cold", "first_token_s")),
    ("start to first token, again", "s", _startup("warm", "first_token_s")),
    ("of a start, the plugin's kernels, nothing compiled before", "s", _startup("cold", "own_s")),
    ("of a start, the plugin's kernels, again", "s", _startup("warm", "own_s")),
    ("most memory held by torch", "GiB", _peak),
)
HEADINGS = ("heads", "cache", "case", "unit", *SIDES, "plugin over in-tree")


def markdown(record: dict[str, Any]) -> str:
    """The record as Markdown tables: figures, then how they were made."""
    lines = [f"{record['gpu']}, driver {record['driver']}, vLLM {record['versions']['vllm']}", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(record)]
    lines += ["", "| run | commit | machine | date |", "| --- | --- | --- | --- |"]
    for entry in record["runs"]:
        name = Run(**{key: entry[key] for key in KEY}).name
        made = entry["environment"]
        lines.append(f"| {name} | {made['commit']} | {made['machine']} | {made['date']} |")
    return "\n".join(lines)


def show(record: dict[str, Any]) -> None:
    table = Table(*HEADINGS, title=record["gpu"])
    for cells in rows(record):
        table.add_row(*cells)
    Console(width=160).print(table)
