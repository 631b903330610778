"""`dsv32 bench layer`: one attention layer as a function of the context, prefill and decode.

Dense MLA, vLLM's sparse kernels and ours, each proven right on sampled tokens before it is timed. The time of an
operation is what it adds to the chain of those before it, so that the operations sum to the measured whole.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsv32_plugin.benchmarks import records
from dsv32_plugin.benchmarks.clock import DEVICE, Clock, Launch, ceilings, new_clock
from dsv32_plugin.benchmarks.layer_sides import SIDES, Inputs, Side, Step, build

METHOD = (
    "One layer under a CUDA graph with a cold L2 cache: norms, rope, cache writes, indexer, selection, attention, and "
    "the layer's projections as bfloat16 products (the same on every side; a served model has them in fp8). Sparse "
    "sides read fp8 latents (656 bytes a token), dense reads bfloat16 (1152). Medians of interleaved rounds."
)


@dataclass(frozen=True)
class Plan:
    """Which steps are measured."""

    contexts: Sequence[int] = tuple(1 << n for n in range(10, 18))
    batches: Sequence[int] = (1, 16, 64)
    heads: Sequence[int] = (128,)
    chunk: int = 4096
    """Tokens of a prefill step; the whole prompt where the context is shorter."""

    def steps(self) -> list[Step]:
        found = []
        for heads, context in itertools.product(self.heads, self.contexts):
            found.append(Step(1, context, min(self.chunk, context), heads))
            found += [Step(batch, context, 1, heads) for batch in self.batches]
        return found


TINY = Plan(contexts=(1024, 4096), batches=(1, 2), heads=(16,), chunk=16)
"""What the references can do on a CPU in seconds."""


def default_plan(**changes: Sequence[int]) -> Plan:
    return replace(Plan() if DEVICE == "cuda" else TINY, **changes)


def run(
    plan: Plan,
    output: Path,
    *,
    seconds: float = math.inf,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure every step of the plan; the record is on disk after each."""
    deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    clock = new_clock()
    record: dict[str, Any] = {
        **records.provenance("layer"), "method": METHOD, "ceilings": ceilings(clock), "chunk": plan.chunk, "rows": [],
        "not_run": [], "crossovers": [],
    }  # fmt: skip
    for step in plan.steps():
        if time.monotonic() > deadline:
            record["not_run"].append(describe(step))
            continue
        for row in measure(step, clock):
            record["rows"].append(row)
            on_row(row)
        record["crossovers"] = crossovers(record["rows"])
        records.write(record, output)
    records.write(record, output)
    return record


def measure(step: Step, clock: Clock) -> list[dict[str, Any]]:
    """A row for each side; a side that is absent or wrong has a reason in the place of its times."""
    inputs = Inputs(step)
    rows = {name: {**describe(step), "side": name} for name in SIDES}
    sides: dict[str, Side] = {}
    for name, row in rows.items():
        try:
            side = build(name, inputs)
            row["kernels"] = side.kernels
            side.check()
            sides[name] = side
        except RuntimeError as error:
            row["missing"] = f"{type(error).__name__}: {str(error)[:300]}"
        except AssertionError as error:
            row["error"] = f"wrong result: {str(error)[:300]}"
    try:
        chains = {(name, i): chain(side, i) for name, side in sides.items() for i in range(len(side.stages))}
        times = clock.time({f"{name}:{i}": launch for (name, i), launch in chains.items()})
        for name, side in sides.items():
            ends = [times[f"{name}:{i}"] for i in range(len(side.stages))]
            operations: dict[str, float] = {}
            for i, (operation, _) in enumerate(side.stages):
                added = ends[i].median_us - (ends[i - 1].median_us if i else 0.0)
                operations[operation] = round(operations.get(operation, 0.0) + added, 2)
            rows[name] |= {
                "total": ends[-1].json(),
                "operations": operations,
                "us_per_token": round(ends[-1].median_us / step.tokens, 4),
            }
    except (RuntimeError, AssertionError) as error:
        for name in sides:
            rows[name]["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    del inputs, sides
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def chain(side: Side, last: int) -> Launch:
    launches = [launch for _, launch in side.stages[: last + 1]]

    def run_chain() -> None:
        for launch in launches:
            launch()

    return run_chain


def describe(step: Step) -> dict[str, Any]:
    mode = "decode" if step.decode else "prefill"
    return {"mode": mode, "B": step.sequences, "T": step.new, "L": step.length, "H": step.heads}


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
