"""What the launchers share: one compiled variant whatever the strides and offsets of the caller are."""

import torch

from .target import Target, chip_of

ALIGNMENT = 16


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose rows all begin at multiples of 16 elements and whose last dimension is contiguous.

    Slices of a fused projection of any real model are aligned already; the copy serves odd callers without a second
    compiled variant.
    """
    strides = x.stride()
    if strides[-1] == 1 and x.data_ptr() % ALIGNMENT == 0 and all(s % ALIGNMENT == 0 for s in strides[:-1]):
        return x
    width = x.shape[-1]
    padded = -(-width // ALIGNMENT) * ALIGNMENT if x.ndim > 1 else width
    copy = torch.empty((*x.shape[:-1], padded), dtype=x.dtype, device=x.device)[..., :width]
    return copy.copy_(x)


def require_aligned(name: str, x: torch.Tensor) -> None:
    """A tensor that is written cannot be copied: each of its rows has to begin at a multiple of 16 elements."""
    _require(name, x, x.stride()[:-1])


def require_aligned_pages(name: str, cache: torch.Tensor) -> None:
    """Pages have to begin at multiples of 16 elements; the rows inside follow from the layout."""
    _require(name, cache, cache.stride()[:1])


def _require(name: str, x: torch.Tensor, strides: tuple[int, ...]) -> None:
    if x.data_ptr() % ALIGNMENT or any(stride % ALIGNMENT for stride in strides):
        raise ValueError(
            f"{name}: must begin at a multiple of 16 bytes with strides that are multiples of 16, got offset "
            f"{x.data_ptr() % ALIGNMENT} and strides {x.stride()}; allocate it whole"
        )


def require_power_of_two(name: str, width: int) -> None:
    """Blocks of the kernels are powers of two."""
    if width < 16 or width & (width - 1):
        raise ValueError(
            f"{name}: the Triton kernels need a last dim that is a power of two from 16, got {width}; "
            "set DSV32_KERNELS=reference for a model of this size"
        )


def native_e4m3(device: torch.device) -> bool:
    """The device rounds float32 to e4m3fn itself, to nearest even and saturating."""
    if device.type not in ("cuda", "meta"):
        return False
    chip = chip_of(device)
    return chip is not None and chip.target.is_cuda and chip.target.e4m3


def dependent_launch_on(target: Target) -> bool:
    """Whether a kernel may be set up while the one before it still runs: it waits (`gdc_wait`) before it reads."""
    return target.is_cuda and int(target.arch) >= 90
