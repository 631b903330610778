"""What a record of `dsv32 bench layer` says: its curves, and where they cross. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


Curves = dict[Key, dict[str, dict[int, dict[str, Any]]]]


def curves(rows: Sequence[dict[str, Any]]) -> Curves:
    """(mode, B, H) -> side -> context -> the measured row."""
    found: Curves = {}
    for row in rows:
        if "figures" in row:
            case = row["case"]
            sides = found.setdefault((case["mode"], case["B"], case["H"]), {})
            sides.setdefault(row["side"], {})[case["L"]] = row
    return found


def layer_us(row: dict[str, Any]) -> float:
    us: float = row["figures"]["layer_us"]["median"]
    return us


@dataclass(frozen=True)
class Crossover:
    """From which context on a side is faster than dense, interpolated between contexts on log axes."""

    context: float | None
    """None where the side is slower at the longest context."""
    from_start: bool
    """It is faster at the shortest context already."""
    gain_at_longest: float
    longest: int


def crossovers(found: Curves) -> dict[tuple[Key, str], Crossover]:
    """Of each curve's sparse sides."""
    crossings = {}
    for key, sides in found.items():
        dense = sides.get("dense", {})
        for name, measured in sides.items():
            shared = sorted(set(dense) & set(measured))
            if name == "dense" or len(shared) < 2:
                continue
            gain = [math.log(layer_us(dense[n]) / layer_us(measured[n])) for n in shared]
            context: float | None = None
            if gain[-1] > 0:
                last_loss = max((i for i, value in enumerate(gain) if value <= 0), default=-1)
                context = float(shared[0])
                if last_loss >= 0:
                    share = -gain[last_loss] / (gain[last_loss + 1] - gain[last_loss])
                    low, high = math.log(shared[last_loss]), math.log(shared[last_loss + 1])
                    context = round(math.exp(low + share * (high - low)))
            from_start = gain[0] > 0 and context == shared[0]
            crossings[key, name] = Crossover(context, from_start, round(math.exp(gain[-1]), 3), shared[-1])
    return crossings
