"""The names of a serving record's figures, for those who read one."""

from __future__ import annotations

from typing import Any

BACKENDS = ("plugin", "in-tree", "dense")
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
METRICS = ("ttft_ms", "tpot_ms")


def times(row: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Name -> (median, 10th and 90th percentile over the requests), in microseconds as in the other records."""
    found = {}
    for metric in METRICS:
        if metric in row:
            name = " ".join(str(row[key]) for key in ("engine", "backend", "layers", "workload", "load"))
            name += f" {metric.partition('_')[0]}"
            found[name] = tuple(1e3 * row[metric][key] for key in ("median", "p10", "p90"))
    return found
