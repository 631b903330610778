"""Every operation over its grid, correct first, beside vLLM's kernels where vLLM is installed.

python benchmarks/bench_kernels.py                       # everything, into benchmarks/results/kernels.json
python benchmarks/bench_kernels.py --only "sparse B=64"  # the cases whose name has these words
python benchmarks/bench_kernels.py --seconds 180         # start no case after three minutes
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import harness
from harness import Case

MODULES = ("bench_chain", "bench_index", "bench_mla", "bench_cache")
"""In the order in which they run, should the time not be enough for all."""


def cases() -> list[Case]:
    found = []
    for name in MODULES:
        if importlib.util.find_spec(name):
            found += importlib.import_module(name).cases()
    return found


if __name__ == "__main__":
    sys.exit(harness.main(cases, "kernels"))
