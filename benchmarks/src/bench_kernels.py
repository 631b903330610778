"""Every operation over its grid, correct first, beside vLLM's kernels where vLLM is installed.

python -m dsv32_plugin.benchmarks.bench_kernels                       # everything, into benchmarks/results/kernels.json
python -m dsv32_plugin.benchmarks.bench_kernels --only "sparse B=64"  # the cases whose name has these words
python -m dsv32_plugin.benchmarks.bench_kernels --seconds 180         # start no case after three minutes
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

from dsv32_plugin.benchmarks import harness
from dsv32_plugin.benchmarks.harness import Case

MODULES = ("bench_chain", "bench_index", "bench_mla", "bench_cache")
"""In the order in which they run, should the time not be enough for all."""


def cases() -> list[Case]:
    found = []
    for name in MODULES:
        if importlib.util.find_spec(f"dsv32_plugin.benchmarks.{name}"):
            found += importlib.import_module(f"dsv32_plugin.benchmarks.{name}").cases()
    return found


if __name__ == "__main__":
    sys.exit(harness.main(cases, "kernels"))
