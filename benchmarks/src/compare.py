"""`dsv32 bench compare A B`: the ratio of every time that two records share, and whether it exceeds their spread."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dsv32_plugin.benchmarks import serve_record
from dsv32_plugin.console import CommandError

Spread = tuple[float, float, float]
"""Median, low, high."""


@dataclass(frozen=True)
class Pair:
    """One time in both records. `verdict` is "same" where the two spreads overlap: the runs do not tell them apart."""

    name: str
    before: Spread
    after: Spread

    @property
    def ratio(self) -> float:
        return self.after[0] / self.before[0]

    @property
    def apart(self) -> float:
        """The gap between the spreads, as a share of the time before; 0 where they overlap."""
        return max(self.after[1] - self.before[2], self.before[1] - self.after[2], 0.0) / self.before[0]

    @property
    def verdict(self) -> str:
        if not self.apart:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def times(record: dict[str, Any]) -> dict[str, Spread]:
    """Every time of a record, by a name that is the same in every record of that kind."""
    found: dict[str, Spread] = {}
    for row in record["rows"]:
        if record["kind"] == "kernels":
            shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
            for cache in ("times", "warm"):
                for variant, timing in row.get(cache, {}).items():
                    temperature = "cold" if cache == "times" else "warm"
                    found[f"{row['operation']} {shape} {variant} ({temperature})"] = spread(timing)
        elif record["kind"] == "layer" and "total" in row:
            name = f"{row['mode']} B={row['B']} L={row['L']} H={row['H']} {row['side']}"
            found[name] = spread(row["total"])
        elif record["kind"] == "serve":
            found |= serve_record.times(row)
    return found


def spread(timing: dict[str, float]) -> Spread:
    return timing["median_us"], timing["low_us"], timing["high_us"]


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Pair]:
    """The times that both have, the most changed first.

    Raises:
        CommandError: the records are of different kinds or share nothing.
    """
    if before["kind"] != after["kind"]:
        raise CommandError(f"expected two records of one kind, got {before['kind']} and {after['kind']}")
    first, second = times(before), times(after)
    pairs = [Pair(name, first[name], second[name]) for name in first if name in second]
    if not pairs:
        raise CommandError("the two records share no measurement")
    return sorted(pairs, key=lambda pair: max(pair.ratio, 1 / pair.ratio), reverse=True)


def record(before: dict[str, Any], after: dict[str, Any], pairs: list[Pair]) -> dict[str, Any]:
    """The comparison as a record: which runs, and every pair."""
    runs = [
        {key: run[key] for key in ("kind", "gpu", "commit", "date", "command") if key in run} for run in (before, after)
    ]
    meaningless = next(({"meaningless": run["meaningless"]} for run in (before, after) if "meaningless" in run), {})
    rows = [
        {"name": p.name, "before_us": p.before, "after_us": p.after, "ratio": round(p.ratio, 4), "verdict": p.verdict}
        for p in pairs
    ]
    return {"kind": "compare", **meaningless, "runs": runs, "summary": summary(pairs), "rows": rows}


def table(before: dict[str, Any], after: dict[str, Any], pairs: list[Pair]) -> Table:
    title = f"{before['gpu']} {before['commit']} → {after['gpu']} {after['commit']}"
    found = Table(title=title, title_justify="left", header_style="bold")
    found.add_column("what")
    for heading in ("before µs", "after µs", "ratio"):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("")
    styles = {"same": "dim", "slower": "red", "faster": "green"}
    for pair in pairs:
        cells = (pair.name, f"{pair.before[0]:.1f}", f"{pair.after[0]:.1f}", f"{pair.ratio:.3f}", pair.verdict)
        found.add_row(*cells, style=styles[pair.verdict])
    return found


def summary(pairs: list[Pair]) -> str:
    """After over before, so that below 1 is faster."""
    counts = Counter(pair.verdict for pair in pairs)
    middle = statistics.median(pair.ratio for pair in pairs)
    parts = [f"{counts[verdict]} {verdict}" for verdict in ("faster", "same", "slower")]
    text = f"{len(pairs)} times: {', '.join(parts)} (same: the spreads overlap); median ratio {middle:.3f}"
    apart = max((pair.apart for pair in pairs), default=0.0)
    return text + (f"; the spreads of two lie at most {apart:.1%} apart" if apart else "")
