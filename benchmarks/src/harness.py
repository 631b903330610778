"""Measure kernels: correct first, variants interleaved, medians and spread, floors from ceilings of the same run.

A bench module has `cases() -> list[Case]`. Each case builds its work on the device, proves our result right, then times
ours and the peers in turn, with a cold and with a warm L2 cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsv32_plugin.benchmarks import peers, records, views
from dsv32_plugin.benchmarks.clock import DEVICE, VISITS, Clock, Launch, Timing, ceilings, new_clock
from dsv32_plugin.benchmarks.records import OURS, Row, name_of
from dsv32_plugin.console import stderr, stdout


@dataclasses.dataclass
class Work:
    """What one case runs, with all its tensors already on the device.

    ours: launches our operation into preallocated outputs; no allocation, no synchronisation (it is captured).
    check: runs `ours` once and raises AssertionError if it differs from the reference. A wrong answer has no speed.
    peers: name -> the same work by another implementation, likewise capturable.
    peer_checks: name -> raises if that peer does not compute what ours does (a comparison of unequal work is void).
    missing: name -> why a peer could not be measured here.
    bytes, flops: the least that any implementation must move and compute; they give the floor.
    dtype: whose matrix ceiling counts, "bf16" or "fp8".
    """

    ours: Launch
    check: Callable[[], None]
    bytes: int
    flops: int = 0
    dtype: str = "bf16"
    peers: dict[str, Launch] = dataclasses.field(default_factory=dict)
    peer_checks: dict[str, Callable[[], None]] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the results: an operation at one shape."""

    operation: str
    shape: dict[str, int | str]
    setup: Callable[[], Work]

    @property
    def name(self) -> str:
        return name_of({"operation": self.operation, **self.shape})


def floor_us(work: Work, ceiling: dict[str, Any]) -> tuple[float, str]:
    """The time below which no implementation can go here, and what sets it."""
    by_bytes = work.bytes / ceiling["bytes_per_us"]
    # A device without an fp8 product computes fp8 work in bfloat16; the record says so.
    dtype = "bf16" if work.dtype == "fp8" and "fp8_missing" in ceiling else work.dtype
    by_flops = work.flops / ceiling[f"{dtype}_flops_per_us"]
    return (round(by_bytes, 2), "bytes") if by_bytes >= by_flops else (round(by_flops, 2), "arithmetic")


@dataclasses.dataclass
class Visits:
    """What the visits to a case have found so far."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    cold: dict[str, Timing] = dataclasses.field(default_factory=dict)
    warm: dict[str, Timing] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def begun(self) -> bool:
        return bool(self.facts or self.error)

    def add(self, case: Case, clock: Clock, ceiling: dict[str, Any]) -> None:
        """Build the case, prove it right, time it, and prove it again. After an error there is no other visit."""
        if self.error:
            return
        try:
            torch.manual_seed(0)  # two runs time the same data
            work = case.setup()
            floor, floor_by = floor_us(work, ceiling)
            self.facts = {"bytes": work.bytes, "flops": work.flops, "notes": work.notes}
            self.facts |= {"floor_us": floor, "floor_by": floor_by}
            self.missing |= work.missing
            work.check()
            variants = {OURS: work.ours, **self._fit(work)}
            cold, warm = clock.time(variants), clock.time(variants, cold=False)
            work.check()
            for found, timings in ((self.cold, cold), (self.warm, warm)):
                for name, timing in timings.items():
                    found[name] = found[name] + timing if name in found else timing
        except Exception as error:
            self.error = f"{type(error).__name__}: {str(error)[:1000]}"
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def _fit(self, work: Work) -> dict[str, Launch]:
        """The peers that run and compute what ours does; the others are missing."""
        found: dict[str, Launch] = {}
        for name, launch in work.peers.items():
            try:
                launch()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                if name in work.peer_checks:
                    work.peer_checks[name]()
                found[name] = launch
            except Exception as error:
                self.missing[name] = f"{type(error).__name__}: {str(error)[:300]}"
        return found

    def rows(self, case: Case) -> list[Row]:
        """Ours, then the peers; an error or a reason stands in the place of a speed."""
        about = {"case": {"operation": case.operation, **case.shape}}
        ours = {**about, "side": OURS, **self.facts}
        if self.error:
            return [ours | {"error": self.error}]
        ours["rounds"] = len(self.cold[OURS].samples)
        found = []
        for side in self.cold:
            # A peer that was wrong in one visit has no speed.
            if side not in self.missing:
                figures = {"cold_us": self.cold[side].json(), "warm_us": self.warm[side].json()}
                found.append({**(ours if side == OURS else about | {"side": side}), "figures": figures})
        return found + [{**about, "side": side, "missing": reason} for side, reason in self.missing.items()]


def run(
    cases: Iterable[Case], output: Path, *, only: str = "", seconds: float = math.inf, started: float | None = None
) -> dict[str, Any]:
    """Measure the cases whose name contains every word of `only`; the record is on disk after every visit to a case.

    `started`: when the command did, if that was before, for the seconds that it took and may take.
    """
    started = time.monotonic() if started is None else started
    chosen = [case for case in cases if is_chosen(case, only)]
    peers.load()
    clock = new_clock()
    record: dict[str, Any] = {**records.provenance("kernels"), "ceilings": ceilings(clock), "rows": [], "not_run": []}
    found = {case.name: Visits() for case in chosen}
    with progress() as bar:
        task = bar.add_task("", total=VISITS * len(chosen))
        for visit, case in itertools.product(range(VISITS), chosen):
            bar.update(task, description=f"{case.name}, {visit + 1} of {VISITS}")
            if time.monotonic() - started < seconds:
                found[case.name].add(case, clock, record["ceilings"])
                if visit == VISITS - 1:
                    for row in found[case.name].rows(case):
                        bar.console.print(records.line(row), soft_wrap=True, markup=False)
            record["rows"] = [row for case in chosen if found[case.name].begun for row in found[case.name].rows(case)]
            record["not_run"] = [case.name for case in chosen if not found[case.name].begun]
            record["seconds"] = round(time.monotonic() - started)
            records.write(record, output)
            bar.advance(task)
    return record


def is_chosen(case: Case, only: str) -> bool:
    return all(word in case.name for word in only.split())


def progress() -> Progress:
    """A bar on standard error, gone when the work is done."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=stderr, transient=True)


def handle(
    cases: Callable[[], list[Case]], arguments: argparse.Namespace, name: str, started: float | None = None
) -> int:
    if arguments.list:
        stdout.print("\n".join(case.name for case in cases()), markup=False)
        return 0
    found = cases()
    if not any(is_chosen(case, arguments.only) for case in found):
        stdout.print(f"--only: expected words of a case's name, got {arguments.only!r}; --list prints the cases")
        return 2
    whole = not arguments.only and arguments.seconds == math.inf
    output = arguments.output or records.default_path(name, whole=whole)
    return views.show(run(found, output, only=arguments.only, seconds=arguments.seconds, started=started))
