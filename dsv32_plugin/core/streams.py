"""A second stream of the GPU, for launches that need not wait for all that was launched before them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class SideStream:
    """Work beside the current stream's; on a device without streams, or where not `enabled`, in its place.

    Graphs capture both streams. A tensor that one stream made and the other reads has to live until the next `join`;
    one made in a block, until the next block.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if enabled and device.type == "cuda":
            self._streams = torch.cuda.current_stream(device), _side_stream(device)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Launches inside the block wait for those made before it, and for none made after it."""
        if self._streams is None:
            yield
            return
        main, side = self._streams
        side.wait_stream(main)
        with torch.cuda.stream(side):
            yield

    def join(self) -> None:
        """Later launches wait for the blocks."""
        if self._streams is not None:
            main, side = self._streams
            main.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process, whose memory is kept apart from the main stream's.

    It goes first where both wait for room: what runs aside is short, and what comes after the join waits for it.
    """
    return torch.cuda.Stream(device, priority=-1)
