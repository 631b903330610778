"""Compile in parallel what a run will launch, before it runs: the first requests of a server then compile nothing."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PACKAGE = __name__.rpartition(".")[0]


class Launches:
    """The kernels of this package that a run wanted to launch and that were not compiled."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[Any, str], str] = {}

    def __len__(self) -> int:
        return len(self._wanted)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside the block such kernels are noted instead of launched, and what they would write stays as it is."""
        from triton import knobs

        before = knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = self._note
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before

    def _note(self, *, fn: Any, key: str, compile: dict[str, Any], **_: Any) -> bool:
        if not fn.module.startswith(PACKAGE):
            return False
        self._wanted[fn.jit_function, key] = compile["specialization_data"]
        return True

    def compile(self, device: torch.device, jobs: int | None = None) -> None:
        """Compile them all with `jobs` threads (default: up to 16), for this process and into Triton's disk cache.

        Most of a compilation runs outside of Python and without its lock.
        """
        wanted, self._wanted = self._wanted, {}

        def compile_one(item: tuple[tuple[Any, str], str]) -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread
            (function, _), specialization = item
            function.preload(specialization)

        with concurrent.futures.ThreadPoolExecutor(jobs or min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, wanted.items()))
