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

from dsv32_plugin.benchmarks import peers, records
from dsv32_plugin.benchmarks.clock import DEVICE, Clock, Launch, ceilings, new_clock
from dsv32_plugin.benchmarks.layer_record import SIDES, crossovers
from dsv32_plugin.benchmarks.layer_sides import Inputs, Missing, Side, Step, build

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
    heads: Sequence[int] = (128, 16)
    """All of the model, and those of one of 8 tensor parallel ranks."""
    chunk: int = 4096
    """Tokens of a prefill step; the whole prompt where the context is shorter."""
    hidden: int = 7168

    def steps(self) -> list[Step]:
        found = []
        for heads, context in itertools.product(self.heads, self.contexts):
            found.append(Step(1, context, min(self.chunk, context), heads, self.hidden))
            found += [Step(batch, context, 1, heads, self.hidden) for batch in self.batches]
        return found


TINY = Plan(contexts=(512, 2176), batches=(1, 2), heads=(4,), chunk=4, hidden=256)
"""What the references can do on a CPU in seconds."""


def default_plan(**changes: Any) -> Plan:
    """The whole plan, or the tiny one without a GPU, with some of its fields changed."""
    return replace(Plan() if DEVICE == "cuda" else TINY, **changes)


def run(
    plan: Plan,
    output: Path,
    *,
    seconds: float = math.inf,
    started: float | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure every step of the plan; the record is on disk after each. `started`: when the command did."""
    started = time.monotonic() if started is None else started
    torch.manual_seed(0)
    peers.load()
    clock = new_clock()
    record: dict[str, Any] = {
        **records.provenance("layer"), "method": METHOD, "ceilings": ceilings(clock), "chunk": plan.chunk, "rows": [],
        "not_run": [], "crossovers": [], "seconds": 0,
    }  # fmt: skip
    for step in plan.steps():
        if time.monotonic() - started > seconds:
            record["not_run"].append(describe(step))
            continue
        for row in measure(step, clock):
            record["rows"].append(row)
            on_row(row)
        record["crossovers"] = crossovers(record["rows"])
        record["seconds"] = round(time.monotonic() - started)
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
            row["kernels"] = side.whose
            side.check()
            sides[name] = side
        except Missing as error:
            row["missing"] = str(error)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    try:
        for name, found in timed(sides, clock).items():
            rows[name] |= found
    except Exception as error:
        for name in sides:
            rows[name]["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    del inputs, sides
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def timed(sides: dict[str, Side], clock: Clock) -> dict[str, dict[str, Any]]:
    """The times of each side, all in turn; each must still be right afterwards."""
    chains = {f"{name}:{i}": chain(side, i) for name, side in sides.items() for i in range(len(side.stages))}
    times = clock.time(chains)
    found = {}
    for name, side in sides.items():
        ends = [times[f"{name}:{i}"] for i in range(len(side.stages))]
        operations: dict[str, float] = {}
        for i, (operation, _) in enumerate(side.stages):
            added = ends[i].median_us - (ends[i - 1].median_us if i else 0.0)
            operations[operation] = round(operations.get(operation, 0.0) + added, 2)
        us_per_token = round(ends[-1].median_us / side.inputs.step.tokens, 4)
        side.check()
        found[name] = {"total": ends[-1].json(), "operations": operations, "us_per_token": us_per_token}
    return found


def chain(side: Side, last: int) -> Launch:
    launches = [launch for _, launch in side.stages[: last + 1]]

    def run_chain() -> None:
        for launch in launches:
            launch()

    return run_chain


def describe(step: Step) -> dict[str, Any]:
    mode = "decode" if step.decode else "prefill"
    return {"mode": mode, "B": step.sequences, "T": step.new, "L": step.length, "H": step.heads}
