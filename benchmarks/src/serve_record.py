"""The names of a serving record's figures, for those who read one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BACKENDS = ("plugin", "in-tree", "dense")
METRICS = ("ttft_ms", "tpot_ms")


def backends(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Those that rows have, in their order."""
    found = {row["backend"] for row in rows}
    return [backend for backend in BACKENDS if backend in found]


def times(row: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Name -> (median, 10th and 90th percentile over the requests), in microseconds as in the other records."""
    found = {}
    for metric in METRICS:
        if metric in row:
            name = " ".join(str(row[key]) for key in ("engine", "backend", "layers", "workload", "load"))
            name += f" {metric.partition('_')[0]}"
            found[name] = tuple(1e3 * row[metric][key] for key in ("median", "p10", "p90"))
    return found
