"""`dsv32 bench layer`: one attention layer as a function of the context, prefill and decode.

Dense MLA, vLLM's sparse kernels and ours, each proven right on sampled tokens before and after it is timed. The share
of an operation is what it adds to the chain of those before it, so that the operations sum to the measured whole.
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
from dsv32_plugin.benchmarks.clock import DEVICE, VISITS, Clock, Timing, ceilings, new_clock
from dsv32_plugin.benchmarks.layer_inputs import Inputs, Side, Step
from dsv32_plugin.benchmarks.layer_record import SIDES
from dsv32_plugin.benchmarks.layer_sides import Missing, build

METHOD = (
    "One layer under a CUDA graph with a cold L2 cache: norms, rope, cache writes, indexer, selection, attention, and "
    "the layer's projections as bfloat16 products (the same on every side; a served model has them in fp8). Sparse "
    "sides read fp8 latents (656 bytes a token), dense reads bfloat16 (1152). Ours is the layer that serves, on "
    "torch's linear layers: some operations of a decode run at once. Medians of interleaved rounds."
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
    peers.load()
    clock = new_clock()
    record: dict[str, Any] = {
        **records.provenance("layer"), "method": METHOD, "ceilings": ceilings(clock), "chunk": plan.chunk, "rows": [],
        "not_run": [], "seconds": 0,
    }  # fmt: skip
    steps = [LayerVisits(step) for step in plan.steps()]
    for visit, step in itertools.product(range(VISITS), steps):
        if time.monotonic() - started < seconds:
            step.add(clock)
            if visit == VISITS - 1:
                for row in step.rows():
                    on_row(row)
        record["rows"] = [row for step in steps if step.begun for row in step.rows()]
        record["not_run"] = [records.name_of(describe(step.step)) for step in steps if not step.begun]
        record["seconds"] = round(time.monotonic() - started)
        records.write(record, output)
    return record


class LayerVisits:
    """What the visits to a step have found so far, side by side."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.begun = False
        self._about: dict[str, dict[str, Any]] = {name: {} for name in SIDES}
        self._total: dict[str, Timing] = {}
        self._operations: dict[str, dict[str, float]] = {}

    def add(self, clock: Clock) -> None:
        """Build the sides, prove them right, time them in turn, and prove them again; the first visit looks inside."""
        torch.manual_seed(0)  # two runs time the same data
        inputs = Inputs(self.step)
        sides: dict[str, Side] = {}
        for name, about in self._about.items():
            if "error" in about:
                continue
            try:
                side = build(name, inputs)
                about["kernels"] = side.whose
                side.check()
                sides[name] = side
            except Missing as error:
                about["missing"] = str(error)
            except Exception as error:
                about["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        try:
            if self.begun:
                found = clock.time({name: side.whole() for name, side in sides.items()})
            else:
                found, self._operations = inside(sides, clock)
            for name, side in sides.items():
                side.check()
                self._total[name] = self._total[name] + found[name] if name in self._total else found[name]
        except Exception as error:
            for name in sides:
                self._about[name]["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        self.begun = True
        del inputs, sides
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each side; a side that is absent or wrong has a reason in the place of its times."""
        found = []
        for name, about in self._about.items():
            row = {"case": describe(self.step), "side": name, **about}
            if "error" not in about and name in self._total:
                total = self._total[name]
                us_per_token = round(total.median_us / self.step.tokens, 4)
                row |= {
                    "figures": {"layer_us": total.json()},
                    "rounds": len(total.samples),
                    "us_per_token": us_per_token,
                }
                operations = self._operations[name]
                scale = total.median_us / sum(operations.values())
                row["operations"] = {operation: round(scale * us, 2) for operation, us in operations.items()}
            found.append(row)
        return found


def inside(sides: dict[str, Side], clock: Clock) -> tuple[dict[str, Timing], dict[str, dict[str, float]]]:
    """The times of the whole sides, and what each operation adds to the chain of those before it, all in turn."""
    chains = {f"{name}:{i}": side.through(i) for name, side in sides.items() for i in range(len(side.operations))}
    times = clock.time(chains)
    totals: dict[str, Timing] = {}
    operations: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        before, found = 0.0, operations.setdefault(name, {})
        for i, operation in enumerate(side.operations):
            end = times[f"{name}:{i}"].median_us
            found[operation] = round(found.get(operation, 0.0) + end - before, 2)
            before = end
        totals[name] = times[f"{name}:{len(side.operations) - 1}"]
    return totals, operations


def describe(step: Step) -> dict[str, Any]:
    mode = "decode" if step.decode else "prefill"
    return {"mode": mode, "B": step.sequences, "T": step.new, "L": step.length, "H": step.heads}
