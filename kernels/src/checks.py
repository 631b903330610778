"""Argument checks shared by the operations: metadata only (shape, dtype, stride, device), never a tensor's values.

An error names the argument, what was expected, what came and the next step.
"""

import torch

from ..cache_layout import (
    LATENT_BYTES_FP8,
    LATENT_RANK,
    PAGE_SIZE_MULTIPLE,
    ROPE_DIM,
    SCALE_BYTES,
)

FLOATS = (torch.bfloat16, torch.float32, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.uint8)
"""e4m3fn values, or a view of their bytes where the chip has no such type."""
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
INTS = (torch.int64, torch.int32)

Dim = int | None


def tensor(
    name: str,
    value: torch.Tensor,
    shape: tuple[Dim, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    step: str = "",
) -> None:
    """Check rank, sizes (None is free), dtype and device; `step` is the advice appended to an error."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(_message(name, "must be a tensor", type(value).__name__, step))
    if value.dtype not in dtypes:
        raise TypeError(_message(name, f"dtype must be {_names(dtypes)}", _names((value.dtype,)), step))
    if value.device != device:
        raise ValueError(_message(name, f"must be on {device}", str(value.device), step or "move it there"))
    got = value.shape
    if len(got) == len(shape) and all(want is None or want == size for want, size in zip(shape, got, strict=True)):
        return
    raise ValueError(_message(name, f"shape must be {_shape(shape)}", _shape(tuple(got)), step))


def rows(name: str, value: torch.Tensor) -> None:
    """Check that the last dimension is contiguous; every other stride is free."""
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(_message(name, "last dim must be contiguous", f"stride {value.stride(-1)}", "call .contiguous()"))


def contiguous(name: str, value: torch.Tensor) -> None:
    """Check that the whole tensor is contiguous."""
    if not value.is_contiguous():
        raise ValueError(_message(name, "must be contiguous", f"strides {value.stride()}", "call .contiguous()"))


def latent_cache(name: str, cache: torch.Tensor, rank: Dim, rope_dim: Dim, device: torch.device) -> None:
    """Check a latent cache of either layout against the model's widths (None where the caller cannot know them)."""
    _pages(name, cache, device)
    width = cache.shape[2]
    if cache.dtype is torch.uint8:
        if width != LATENT_BYTES_FP8:
            step = "start the engine with --kv-cache-dtype fp8_ds_mla"
            raise ValueError(_message(name, f"last dim must be {LATENT_BYTES_FP8} bytes (fp8 latent layout)", str(width), step))
        if rank not in (None, LATENT_RANK) or rope_dim not in (None, ROPE_DIM):
            step = "use a float cache for other widths"
            expected = f"fp8 rows hold {LATENT_RANK} latents and {ROPE_DIM} rope elements"
            raise ValueError(_message(name, expected, f"{rank} and {rope_dim}", step))
        _aligned(name, cache, SCALE_BYTES)
    elif rank is not None and rope_dim is not None and width != rank + rope_dim:
        raise ValueError(_message(name, f"last dim must be {rank} + {rope_dim} = {rank + rope_dim}", str(width), ""))


def index_cache(name: str, cache: torch.Tensor, index_dim: Dim, device: torch.device) -> None:
    """Check an index cache of either layout against the width of the index keys (None where the caller cannot know it)."""
    _pages(name, cache, device)
    fp8 = cache.dtype is torch.uint8
    if fp8:
        _aligned(name, cache, SCALE_BYTES)
    if index_dim is None:
        return
    expected = index_dim + SCALE_BYTES if fp8 else index_dim
    if cache.shape[2] != expected:
        layout = f"{expected} bytes (fp8 index layout)" if fp8 else str(expected)
        raise ValueError(_message(name, f"last dim must be {layout}", str(cache.shape[2]), ""))


def _pages(name: str, cache: torch.Tensor, device: torch.device) -> None:
    tensor(name, cache, (None, None, None), (*FLOATS, torch.uint8), device)
    pages, page_size, width = cache.shape
    if pages == 0:
        raise ValueError(_message(name, "must have at least one page", "none", ""))
    if page_size == 0 or page_size % PAGE_SIZE_MULTIPLE:
        step = "set the engine's block size to 64"
        raise ValueError(_message(name, f"page size must be a multiple of {PAGE_SIZE_MULTIPLE}", str(page_size), step))
    if cache.stride(1) != width or cache.stride(2) != 1:
        raise ValueError(_message(name, "a page must be contiguous", f"strides {cache.stride()}", ""))


def _aligned(name: str, cache: torch.Tensor, alignment: int) -> None:
    if cache.stride(0) % alignment or cache.storage_offset() % alignment:
        got = f"page stride {cache.stride(0)}, storage offset {cache.storage_offset()}"
        raise ValueError(_message(name, f"pages must begin at multiples of {alignment} bytes", got, ""))


def _message(name: str, expected: str, got: str, step: str) -> str:
    return f"{name}: {expected}, got {got}" + (f"; {step}" if step else "")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _shape(shape: tuple[Dim, ...]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
