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
from rich.table import Table

from dsv32_plugin.benchmarks import peers, records
from dsv32_plugin.benchmarks.clock import DEVICE, VISITS, Clock, Launch, Timing, ceilings, new_clock
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
    must: float | None = None
    aim: float | None = None
    """The speed over the best peer that was asked for: neither recorded nor shown."""

    @property
    def name(self) -> str:
        return f"{self.operation} {shape_text(self.shape)}"


def shape_text(shape: dict[str, int | str]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def floor_us(work: Work, ceiling: dict[str, Any]) -> tuple[float, str]:
    """The time below which no implementation can go here, and what sets it."""
    by_bytes = work.bytes / ceiling["bytes_per_us"]
    # A device without an fp8 product computes fp8 work in bfloat16; `ceilings_text` says so.
    dtype = "bf16" if work.dtype == "fp8" and "fp8_missing" in ceiling else work.dtype
    by_flops = work.flops / ceiling[f"{dtype}_flops_per_us"]
    return (round(by_bytes, 2), "bytes") if by_bytes >= by_flops else (round(by_flops, 2), "arithmetic")


def ceilings_text(ceiling: dict[str, Any]) -> str:
    """What the floors of a record come from."""
    bf16 = f"{ceiling['bf16_flops_per_us'] / 1e6:.3g} TFLOP/s in bfloat16"
    if "fp8_missing" in ceiling:
        fp8 = f"no fp8 product ({ceiling['fp8_missing']}), so that fp8 work has bfloat16's floor"
    else:
        fp8 = f"{ceiling['fp8_flops_per_us'] / 1e6:.3g} in fp8"
    return f"Ceilings of this run: {ceiling['bytes_per_us'] / 1e6:.3g} TB/s copied, {bf16}, {fp8}."


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
            variants = {"ours": work.ours, **self._fit(work)}
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

    def row(self, case: Case) -> dict[str, Any]:
        """One result row. An error stands in the row instead of a speed."""
        row: dict[str, Any] = {"operation": case.operation, "shape": case.shape}
        row |= {**self.facts, "missing": self.missing}
        if self.error:
            return row | {"error": self.error}
        # A peer that was wrong in one visit has no speed.
        cold = {name: timing for name, timing in self.cold.items() if name not in self.missing}
        row["times"] = {name: timing.json() for name, timing in cold.items()}
        row["warm"] = {name: self.warm[name].json() for name in cold}
        row["rounds"] = len(cold["ours"].samples)
        row["over_floor"] = round(cold["ours"].median_us / row["floor_us"], 2) if row["floor_us"] else None
        peers = {name: timing.median_us for name, timing in cold.items() if name != "ours"}
        if peers:
            row["best_peer"] = min(peers, key=lambda name: peers[name])
            row["speedup"] = round(peers[row["best_peer"]] / cold["ours"].median_us, 3)
        return row


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
                    bar.console.print(line(found[case.name].row(case)), soft_wrap=True, markup=False)
            record["rows"] = [found[case.name].row(case) for case in chosen if found[case.name].begun]
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


def line(row: dict[str, Any]) -> str:
    name = f"{row['operation']} {shape_text(row['shape'])}"
    if "error" in row:
        return f"{name}: {row['error']}"
    parts = [f"{variant} {timing['median_us']}" for variant, timing in row["times"].items()]
    missing = [f"{peer} missing" for peer in row["missing"]]
    return f"{name}: " + ", ".join(parts + missing) + f" us (floor {row['floor_us']})"


HEADINGS = ("operation", "shape", "ours µs", "spread", "warm µs", "best peer", "peer µs", "faster", "floor µs")


def cells(row: dict[str, Any]) -> list[str]:
    name = [row["operation"], shape_text(row["shape"])]
    if "error" in row:
        return [*name, "wrong", *[""] * 6]
    ours = row["times"]["ours"]
    peer = row.get("best_peer", "")
    return [
        *name,
        f"{ours['median_us']:.1f}",
        f"{ours['low_us']:.1f}-{ours['high_us']:.1f}",
        f"{row['warm']['ours']['median_us']:.1f}" if "warm" in row else "",
        peer or "; ".join(row["missing"]),
        f"{row['times'][peer]['median_us']:.1f}" if peer else "missing" if row["missing"] else "",
        f"{row['speedup']:.2f}" if peer else "",
        f"{row['floor_us']:.1f} {row['floor_by']}",
    ]


def table(record: dict[str, Any]) -> Table:
    """The record for the terminal."""
    found = Table(title=f"{record['gpu']}, commit {record['commit']}", title_justify="left", header_style="bold")
    found.add_column("case", min_width=24)
    for heading in ("ours µs", "spread", "warm µs", "best peer", "peer µs", "faster", "floor µs"):
        name = heading == "best peer"
        found.add_column(heading, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    for row in record["rows"]:
        slower = row.get("speedup", 1.0) < 1.0
        style = "red" if "error" in row else "" if "speedup" not in row else "yellow" if slower else "green"
        operation, shape, *rest, floor = cells(row)
        found.add_row(f"{operation}\n{shape}", *rest, floor.partition(" ")[0], style=style)
    return found


def missing(record: dict[str, Any]) -> dict[str, str]:
    """Every peer that some case lacked -> the first reason given."""
    found: dict[str, str] = {}
    for row in record["rows"]:
        for peer, reason in row.get("missing", {}).items():
            found.setdefault(peer, reason)
    return found


def show(record: dict[str, Any]) -> int:
    """Print the record; the exit status: 1 if some result was wrong."""
    stdout.print(table(record))
    stdout.print(f"{ceilings_text(record['ceilings'])} {record['seconds']} s in all.", soft_wrap=True, markup=False)
    for peer, reason in missing(record).items():
        stdout.print(f"missing: {peer} ({reason})", style="yellow", markup=False, soft_wrap=True)
    if record["not_run"]:
        stdout.print("not run: " + ", ".join(record["not_run"]), style="yellow", soft_wrap=True)
    if "meaningless" in record:
        stdout.print(record["meaningless"], style="bold red", soft_wrap=True)
    wrong = [row for row in record["rows"] if "error" in row]
    for row in wrong:
        stdout.print(line(row), style="red", markup=False, soft_wrap=True)
    return int(bool(wrong))


def main(cases: Callable[[], list[Case]], name: str, argv: list[str] | None = None) -> int:
    """The command line every bench script shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words that a case's name must contain, e.g. 'sparse B=64'")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after this long")
    parser.add_argument("--output", type=Path, help="the record")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return handle(cases, parser.parse_args(argv), name)


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
    return show(run(found, output, only=arguments.only, seconds=arguments.seconds, started=started))
