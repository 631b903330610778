"""Time launches fairly: variants in turn, medians and spread, a cold or a warm L2 cache, no host in the timing."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5
"""Each round times every variant once, in turn, so that clocks and neighbours hit all alike."""
VISITS = 3 if DEVICE == "cuda" else 1
"""So often a run comes to each case, with the others between: new memory, new graphs and another state of the GPU. What
changes between two runs changes between visits, so that the spread over all rounds holds it."""
ROUND_US = 3000.0
"""One timing covers about this long, so that the clock's resolution does not matter."""
FLUSH_BYTES = 128 << 20
FLUSHES = 20
"""So many together tell what one takes."""

Launch = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """The rounds of one variant: what is shown is their median with the 10th and the 90th percentile."""

    samples: tuple[float, ...]

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.samples + other.samples)

    @property
    def median_us(self) -> float:
        return round(statistics.median(self.samples), 2)

    @property
    def low_us(self) -> float:
        return round(sorted(self.samples)[len(self.samples) // 10], 2)

    @property
    def high_us(self) -> float:
        return round(sorted(self.samples)[-1 - len(self.samples) // 10], 2)

    def json(self) -> dict[str, float]:
        return {"median": self.median_us, "low": self.low_us, "high": self.high_us}


class Clock(Protocol):
    def time(self, variants: dict[str, Launch], *, cold: bool = True) -> dict[str, Timing]:
        """Time every variant in turn. `cold`: before each launch the L2 cache holds none of its data."""
        ...


class GpuClock:
    """Launches captured in CUDA graphs, timed with events."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        # One pool for all graphs: none needs what another left in it, and nothing is given back between captures,
        # which would take longer than the measurement. A pool ends with its last graph, so the first one is kept.
        self._pool = torch.cuda.graph_pool_handle()
        self._flush_buffer = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._flush_result = torch.empty((), dtype=torch.float32, device="cuda")
        self._flushes = self._capture([self._flush] * FLUSHES)

    def _flush(self) -> None:
        # Reading leaves clean lines: the measured kernel pays no write-back that is not its own.
        torch.sum(self._flush_buffer, dim=0, out=self._flush_result)

    def _capture(self, launches: list[Launch]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            for launch in dict.fromkeys(launches):
                launch()
                launch()
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool)
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()
            graph.replay()
            self._stream.synchronize()
        return graph

    def _replay_us(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            start.record()
            graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def _flush_us(self) -> float:
        return self._replay_us(self._flushes) / FLUSHES

    def time(self, variants: dict[str, Launch], *, cold: bool = True) -> dict[str, Timing]:
        """Flushes are captured between the launches; what they take in the same rounds is taken off."""
        flush_us = self._flush_us() if cold else 0.0
        graphs = {}
        for name, launch in variants.items():
            once_us = self._replay_us(self._capture([launch]))
            repeats = max(1, round(ROUND_US / (once_us + flush_us)))
            graphs[name] = (self._capture([self._flush, launch] * repeats if cold else [launch] * repeats), repeats)
        flushes: list[float] = []
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(ROUNDS):
            if cold:
                flushes.append(self._flush_us())
            for name, (graph, repeats) in graphs.items():
                samples[name].append(self._replay_us(graph) / repeats)
        flush_us = statistics.median(flushes) if cold else 0.0
        return {name: Timing(tuple(us - flush_us for us in values)) for name, values in samples.items()}


class CpuClock:
    """The same interface without a GPU, for trying the harness out: two rounds, and nothing is flushed."""

    def time(self, variants: dict[str, Launch], *, cold: bool = True) -> dict[str, Timing]:
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(2):
            for name, launch in variants.items():
                started = time.perf_counter()
                launch()
                samples[name].append((time.perf_counter() - started) * 1e6)
        return {name: Timing(tuple(values)) for name, values in samples.items()}


def new_clock() -> Clock:
    # Modules stay: the collections between cases need not look at them again.
    gc.collect()
    gc.freeze()
    return GpuClock() if DEVICE == "cuda" else CpuClock()


def ceilings(clock: Clock) -> dict[str, Any]:
    """What this device reaches in the largest simple cases: bytes copied (read and written) and matrix products.

    A device without an fp8 product has "fp8_missing", the reason, in the place of "fp8_flops_per_us".
    """
    size, copied = (8192, 1 << 30) if DEVICE == "cuda" else (256, 1 << 20)
    source = torch.ones(copied, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    c = torch.empty_like(a)
    variants: dict[str, Launch] = {"copy": lambda: target.copy_(source), "bf16": lambda: torch.mm(a, b, out=c)}
    one = torch.ones((), device=DEVICE)
    missing = {}
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)
        variants["fp8"] = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        missing["fp8_missing"] = str(error).partition("\n")[0]
    us = {name: result.median_us for name, result in clock.time(variants, cold=False).items()}
    products = {f"{name}_flops_per_us": 2 * size**3 / us[name] for name in ("bf16", "fp8") if name in us}
    return {"bytes_per_us": 2 * copied / us["copy"], **products, **missing}
