"""What a record of `dsv32 bench layer` says: its curves, and where they cross. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SIDES = ("dense", "in-tree", "ours")
PROJECTIONS, NORMS, UP, SCORES, SELECTION, INDEXER, ATTENTION = OPERATIONS = (
    "projections",
    "norms, rope and caches",
    "up-projection of the context",
    "index scores",
    "selection",
    "index scores and selection",
    "attention",
)
"""Every stage there is, in the order of a layer."""

Key = tuple[str, int, int]
"""Mode, sequences, heads: one curve of a plot."""


def curves(rows: Sequence[dict[str, Any]]) -> dict[Key, dict[str, dict[int, dict[str, Any]]]]:
    """(mode, B, H) -> side -> context -> the measured row."""
    found: dict[Key, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        if "total" in row:
            sides = found.setdefault((row["mode"], row["B"], row["H"]), {})
            sides.setdefault(row["side"], {})[row["L"]] = row
    return found


def crossovers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """From which context on each sparse side is faster than dense, interpolated between contexts on log axes.

    `context` is None where the side is slower at the longest context; `from_start` says that it is faster at the
    shortest one already.
    """
    found = []
    for (mode, batch, heads), sides in curves(rows).items():
        dense = sides.get("dense", {})
        for name, measured in sides.items():
            shared = sorted(set(dense) & set(measured))
            if name == "dense" or len(shared) < 2:
                continue
            gain = [math.log(dense[n]["total"]["median_us"] / measured[n]["total"]["median_us"]) for n in shared]
            context: float | None = None
            if gain[-1] > 0:
                last_loss = max((i for i, value in enumerate(gain) if value <= 0), default=-1)
                context = float(shared[0])
                if last_loss >= 0:
                    share = -gain[last_loss] / (gain[last_loss + 1] - gain[last_loss])
                    low, high = math.log(shared[last_loss]), math.log(shared[last_loss + 1])
                    context = round(math.exp(low + share * (high - low)))
            found.append(
                {
                    "mode": mode, "B": batch, "H": heads, "side": name, "context": context,
                    "from_start": gain[0] > 0 and context == shared[0],
                    "gain_at_longest": round(math.exp(gain[-1]), 3), "longest": shared[-1],
                }
            )  # fmt: skip
    return found
