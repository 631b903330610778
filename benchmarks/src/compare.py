"""`dsv32 bench compare A B`: the ratio of every time that two records share, and whether it exceeds their spread."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass

from dsv32_plugin.benchmarks.records import Record, name_of
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
        more_is_better = self.name.endswith("_per_s")
        return "faster" if (self.ratio > 1) == more_is_better else "slower"


def times(record: Record) -> dict[str, Spread]:
    """Every figure of a record that has a spread, by a name that is the same in every record of that kind."""
    return {
        f"{name_of(row['case'])} {row['side']} {figure}": (value["median"], value["low"], value["high"])
        for row in record["rows"]
        for figure, value in row.get("figures", {}).items()
        if "low" in value
    }


def compare(before: Record, after: Record) -> list[Pair]:
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


def record(before: Record, after: Record, pairs: list[Pair]) -> Record:
    """The comparison as a record: which runs, and every pair."""
    runs = [
        {key: run[key] for key in ("kind", "gpu", "commit", "date", "command") if key in run} for run in (before, after)
    ]
    meaningless = next(({"meaningless": run["meaningless"]} for run in (before, after) if "meaningless" in run), {})
    rows = [
        {
            "case": {"name": pair.name}, "side": "after over before",
            "figures": {"before": figure(pair.before), "after": figure(pair.after)},
            "ratio": round(pair.ratio, 4), "verdict": pair.verdict,
        }
        for pair in pairs
    ]  # fmt: skip
    return {"kind": "compare", **meaningless, "runs": runs, "summary": summary(pairs), "rows": rows}


def figure(spread: Spread) -> dict[str, float]:
    return dict(zip(("median", "low", "high"), spread, strict=True))


def summary(pairs: list[Pair]) -> str:
    """After over before, so that below 1 is faster."""
    counts = Counter(pair.verdict for pair in pairs)
    middle = statistics.median(pair.ratio for pair in pairs)
    parts = [f"{counts[verdict]} {verdict}" for verdict in ("faster", "same", "slower")]
    text = f"{len(pairs)} times: {', '.join(parts)} (same: the spreads overlap); median ratio {middle:.3f}"
    apart = max((pair.apart for pair in pairs), default=0.0)
    return text + (f"; the spreads of two lie at most {apart:.1%} apart" if apart else "")
