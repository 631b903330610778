"""The chips: what a kernel's configuration may depend on, which one a device is, and one made up to record launches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel's configuration may depend on: nothing else about a chip is asked for."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    e4m3: bool
    """Triton converts and multiplies e4m3fn here; elsewhere its bytes are converted by hand."""

    @property
    def is_cuda(self) -> bool:
        return self.backend == "cuda"


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", "cuda", 80, 32, 163 << 10, e4m3=False),
        Target("sm86", "cuda", 86, 32, 99 << 10, e4m3=False),
        Target("sm89", "cuda", 89, 32, 99 << 10, e4m3=True),
        Target("sm90", "cuda", 90, 32, 227 << 10, e4m3=True),
        Target("sm100", "cuda", 100, 32, 227 << 10, e4m3=True),
        Target("sm120", "cuda", 120, 32, 99 << 10, e4m3=True),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, e4m3=False),
        Target("gfx950", "hip", "gfx950", 64, 160 << 10, e4m3=True),
    )
}


@functools.cache
def target_of_device(index: int) -> Target:
    """The target of one GPU of this process; a chip outside TARGETS gets its measured limits and its own name."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return TARGETS.get(arch, Target(arch, "hip", arch, properties.warp_size, 64 << 10, e4m3=False))
    capability = properties.major * 10 + properties.minor
    known = TARGETS.get(f"sm{capability}")
    if known is not None:
        return known
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Target(f"sm{capability}", "cuda", capability, 32, shared, e4m3=capability >= 89)


class Chip(NamedTuple):
    """What a launcher asks of the device of its tensors."""

    target: Target
    processors: int
    """Multiprocessors."""


_pretended: Chip | None = None


@contextmanager
def pretend(target: Target, processors: int = 132) -> Iterator[None]:
    """Inside the block tensors of the device "meta" are on a chip of this target."""
    global _pretended
    before, _pretended = _pretended, Chip(target, processors)
    try:
        yield
    finally:
        _pretended = before


def chip_of(device: torch.device) -> Chip | None:
    """The chip whose memory holds the tensors; None for the CPU, where only Triton's interpreter runs kernels."""
    if device.type == "cpu":
        return None
    if device.type == "meta":
        assert _pretended is not None, "tensors without data are for `pretend`"
        return _pretended
    return _chip_of(device)


@functools.cache
def _chip_of(device: torch.device) -> Chip:
    index = torch.cuda.current_device() if device.index is None else device.index
    return Chip(target_of_device(index), torch.cuda.get_device_properties(index).multi_processor_count)
