"""`dsv32 bench kernels`: every operation over its grid, correct first, beside the kernels that are installed."""

from __future__ import annotations

import importlib

from dsv32_plugin.benchmarks.clock import DEVICE
from dsv32_plugin.benchmarks.harness import Case

MODULES = ("bench_chain", "bench_index", "bench_mla", "bench_cache", "bench_dense")
"""In the order in which they run, should the time not be enough for all."""


def cases() -> list[Case]:
    """The grid; without a GPU a few tiny shapes of each operation."""
    modules = [importlib.import_module(f"dsv32_plugin.benchmarks.{name}") for name in MODULES]
    return [case for module in modules for case in (module.cases() if DEVICE == "cuda" else module.tiny_cases())]
