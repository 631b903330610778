"""What the launchers share: one compiled variant whatever the strides and offsets of the caller are."""

import torch

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
    """A tensor that is written cannot be copied: it has to be aligned."""
    if x.data_ptr() % ALIGNMENT or x.stride(0) % ALIGNMENT or x.stride(-1) != 1:
        raise ValueError(
            f"{name}: must begin at a multiple of 16 bytes with a contiguous last dim and a stride of dim 0 that is a "
            f"multiple of 16, got offset {x.data_ptr() % ALIGNMENT} and strides {x.stride()}; allocate it whole"
        )


def require_power_of_two(name: str, width: int) -> None:
    """Blocks of the kernels are powers of two."""
    if width < 16 or width & (width - 1):
        raise ValueError(
            f"{name}: the Triton kernels need a last dim that is a power of two from 16, got {width}; "
            "set DSV32_KERNELS=reference for a model of this size"
        )


TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""Triton's names of the types in a signature."""
