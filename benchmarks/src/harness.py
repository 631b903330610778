"""Measure kernels: correct first, variants interleaved, medians and spread, floors from ceilings of the same run.

A bench module has `cases() -> list[Case]`. Each case builds its work on the GPU, proves our result right, then times
ours and the peers in turn under CUDA graphs with a cold L2 cache before every launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROUNDS = 15
"""Each round times every variant once, in turn, so that clocks and neighbours hit all alike."""
ROUND_US = 3000.0
"""One timing covers about this long, so that the clock's resolution does not matter."""
FLUSH_BYTES = 128 << 20


@dataclasses.dataclass
class Work:
    """What one case runs, with all its tensors already on the GPU.

    ours: launches our operation into preallocated outputs; no allocation, no synchronisation (it is captured).
    check: runs `ours` once and raises AssertionError if it differs from the reference. A wrong answer has no speed.
    peers: name -> the same work by another implementation, likewise capturable.
    peer_checks: name -> raises if that peer does not compute what ours does (a comparison of unequal work is void).
    missing: name -> why a peer could not be measured here.
    bytes, flops: the least that any implementation must move and compute; they give the floor.
    dtype: whose matrix ceiling counts, "bf16" or "fp8".
    """

    ours: Callable[[], Any]
    check: Callable[[], None]
    bytes: int
    flops: int = 0
    dtype: str = "bf16"
    peers: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    peer_checks: dict[str, Callable[[], None]] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the results: an operation at one shape. `must`, `aim`: the speed over the best peer asked for."""

    operation: str
    shape: dict[str, int | str]
    setup: Callable[[], Work]
    must: float | None = None
    aim: float | None = None

    @property
    def name(self) -> str:
        return f"{self.operation} " + " ".join(f"{k}={v}" for k, v in self.shape.items())


@dataclasses.dataclass
class Timing:
    median_us: float
    low_us: float
    high_us: float
    """The 10th and the 90th percentile over the rounds."""


class Clock:
    """Times captured launches; every launch meets an L2 cache that holds none of its data."""

    def __init__(self) -> None:
        self._flush_buffer = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._flush_result = torch.empty((), dtype=torch.float32, device="cuda")
        self._flush_us = 0.0
        graph = self._capture([self._flush] * 20)
        self._flush_us = statistics.median(self._replay_us(graph) for _ in range(9)) / 20

    def _flush(self) -> None:
        # Reading leaves clean lines: the measured kernel pays no write-back that is not its own.
        torch.sum(self._flush_buffer, dim=0, out=self._flush_result)

    @staticmethod
    def _capture(launches: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for launch in dict.fromkeys(launches):
                launch()
                launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        graph.replay()
        return graph

    @staticmethod
    def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def time(self, variants: dict[str, Callable[[], Any]], *, cold: bool = True) -> dict[str, Timing]:
        """Time every variant in turn. Flushes are captured between the launches and their time is taken off."""
        graphs = {}
        for name, launch in variants.items():
            once_us = self._replay_us(self._capture([launch]))
            repeats = max(1, round(ROUND_US / (once_us + (self._flush_us if cold else 0.0))))
            launches: list[Callable[[], Any]] = []
            for _ in range(repeats):
                launches += [self._flush, launch] if cold else [launch]
            graphs[name] = (self._capture(launches), repeats)
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(ROUNDS):
            for name, (graph, repeats) in graphs.items():
                us = self._replay_us(graph) / repeats
                samples[name].append(us - self._flush_us if cold else us)
        return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return Timing(round(statistics.median(ordered), 2), round(low, 2), round(high, 2))


def ceilings(clock: Clock) -> dict[str, float]:
    """What this GPU reaches in the largest simple cases: bytes copied (read and written) and matrix products."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = clock.time({"copy": lambda: target.copy_(source)}, cold=False)["copy"].median_us
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    c = torch.empty_like(a)
    flops = 2 * size**3
    found = {"bytes_per_us": 2 * (1 << 30) / copy}
    found["bf16_flops_per_us"] = flops / clock.time({"x": lambda: torch.mm(a, b, out=c)}, cold=False)["x"].median_us
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")

        def product() -> Any:
            return torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)

        found["fp8_flops_per_us"] = flops / clock.time({"x": product}, cold=False)["x"].median_us
    except (RuntimeError, ValueError):  # a chip without an fp8 product: it computes fp8 work in bfloat16
        found["fp8_flops_per_us"] = found["bf16_flops_per_us"]
    return found


def floor_us(work: Work, ceiling: dict[str, float]) -> tuple[float, str]:
    """The time below which no implementation can go here, and what sets it."""
    by_bytes = work.bytes / ceiling["bytes_per_us"]
    by_flops = work.flops / ceiling[f"{work.dtype}_flops_per_us"]
    return (round(by_bytes, 2), "bytes") if by_bytes >= by_flops else (round(by_flops, 2), "arithmetic")


def measure(case: Case, clock: Clock, ceiling: dict[str, float]) -> dict[str, Any]:
    """One result row. An error stands in the row instead of a speed."""
    row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "must": case.must, "aim": case.aim}
    try:
        work = case.setup()
        row |= {"bytes": work.bytes, "flops": work.flops, "notes": work.notes, "missing": dict(work.missing)}
        work.check()
        variants: dict[str, Callable[[], Any]] = {"ours": work.ours}
        for name, launch in work.peers.items():
            try:
                launch()
                torch.cuda.synchronize()
                if name in work.peer_checks:
                    work.peer_checks[name]()
                variants[name] = launch
            except Exception as error:
                row["missing"][name] = f"{type(error).__name__}: {str(error)[:300]}"
        times = clock.time(variants)
        work.check()
        row["times"] = {name: dataclasses.asdict(timing) for name, timing in times.items()}
        row["floor_us"], row["floor_by"] = floor_us(work, ceiling)
        row["over_floor"] = round(times["ours"].median_us / row["floor_us"], 2) if row["floor_us"] else None
        peers = {name: timing.median_us for name, timing in times.items() if name != "ours"}
        if peers:
            row["best_peer"] = min(peers, key=lambda name: peers[name])
            row["speedup"] = round(peers[row["best_peer"]] / times["ours"].median_us, 3)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:1000]}"
    gc.collect()
    torch.cuda.empty_cache()
    return row


def environment() -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    try:
        from importlib.metadata import version

        versions["vllm"] = version("vllm")
    except ImportError:
        versions["vllm"] = "absent"
    commit = os.environ.get("DSV32_COMMIT", "")
    if not commit:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "versions": versions,
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(cases: Iterable[Case], output: Path, *, only: str = "", seconds: float = 1e9) -> int:
    """Measure the cases whose name contains every word of `only`; the record is on disk after every case."""
    deadline = time.monotonic() + seconds
    chosen = [case for case in cases if all(word in case.name for word in only.split())]
    clock = Clock()
    ceiling = ceilings(clock)
    record: dict[str, Any] = {**environment(), "ceilings": ceiling, "rows": [], "not_run": []}
    for case in chosen:
        if time.monotonic() > deadline:
            record["not_run"].append(case.name)
        else:
            record["rows"].append(measure(case, clock, ceiling))
            print(line(record["rows"][-1]), flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    return int(any("error" in row for row in record["rows"]))


def line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    if "error" in row:
        return f"{row['operation']} {shape}: {row['error']}"
    parts = [f"{name} {timing['median_us']}" for name, timing in row["times"].items()]
    missing = [f"{name} missing" for name in row["missing"]]
    return f"{row['operation']} {shape}: " + ", ".join(parts + missing) + f" us (floor {row['floor_us']})"


HEADINGS = ("operation", "shape", "ours us", "spread", "best peer", "peer us", "faster", "must", "aim", "floor us")


def cells(row: dict[str, Any]) -> list[str]:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    if "error" in row:
        return [row["operation"], shape, "wrong", "", "", "", "", "", "", ""]
    ours = row["times"]["ours"]
    peer = row.get("best_peer", "")
    return [
        row["operation"],
        shape,
        f"{ours['median_us']:.1f}",
        f"{ours['low_us']:.1f}-{ours['high_us']:.1f}",
        peer or "; ".join(row["missing"]),
        f"{row['times'][peer]['median_us']:.1f}" if peer else "missing" if row["missing"] else "",
        f"{row['speedup']:.2f}" if peer else "",
        str(row["must"] or ""),
        str(row["aim"] or ""),
        f"{row['floor_us']:.1f} {row['floor_by']}",
    ]


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = [f"{record['gpu']}, commit {record['commit']}, `{record['command']}`", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in record["rows"]]
    if record["not_run"]:
        lines += ["", "Not run: " + ", ".join(record["not_run"])]
    return "\n".join(lines)


def main(cases: Callable[[], list[Case]], name: str, argv: list[str] | None = None) -> int:
    """The command line every bench script shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words that a case's name must contain, e.g. 'sparse B=64'")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this long")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", RESULTS)) / f"{name}.json")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(case.name for case in cases()))
        return 0
    return run(cases(), args.output, only=args.only, seconds=args.seconds)
