"""A second stream of the GPU, for launches that need not wait for all that was launched before them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class SideStream:
    """Work beside the current stream's; on a device without streams, or where not `enabled`, in its place.

    Graphs capture both streams. What a block allocates is for blocks alone: only what existed before is shared.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._side = _side_stream(device) if enabled and device.type == "cuda" else None
        self._main = torch.cuda.current_stream(device) if self._side is not None else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """Launches inside the block wait for those made before it, and for none made after it."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """Later launches wait for the blocks."""
        if self._main is not None:
            self._main.wait_stream(self._side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process, whose memory is kept apart from the main stream's."""
    return torch.cuda.Stream(device)
