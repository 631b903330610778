"""Argument checks shared by the operations: metadata only (shape, dtype, stride, device), never a tensor's values.

An error names the argument, what was expected, what came and the next step.
"""

from collections.abc import Mapping

import torch

from ..cache_layout import LATENT_BYTES_FP8, LATENT_RANK, PAGE_SIZE_MULTIPLE, ROPE_DIM, SCALE_BYTES

FLOATS = (torch.bfloat16, torch.float32, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.uint8)
"""e4m3fn values, or a view of their bytes where the chip has no such type."""
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
INTS = (torch.int64, torch.int32)

Dim = int | None
"""A size, or None where any size will do."""


def tensor(
    name: str,
    value: torch.Tensor,
    shape: tuple[Dim, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    step: str = "",
) -> None:
    """Check dtype, device, rank and sizes; `step` is the advice at the end of an error."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(_message(name, "must be a tensor", type(value).__name__))
    if value.dtype not in dtypes:
        raise TypeError(_message(name, f"dtype must be {_names(dtypes)}", _names((value.dtype,)), step))
    if value.device != device:
        raise ValueError(_message(name, f"must be on {device}", str(value.device), "move it there"))
    got = value.shape
    if got != shape and not _fits(got, shape):
        raise ValueError(_message(name, f"shape must be {_sizes(shape)}", _sizes(got), step))


def rows(name: str, value: torch.Tensor) -> None:
    """Check that the last dim is contiguous; every other stride is free."""
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        got = f"stride {value.stride(-1)}"
        raise ValueError(_message(name, "last dim must be contiguous", got, "call .contiguous()"))


def contiguous(name: str, value: torch.Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(_message(name, "a contiguous tensor", f"strides {value.stride()}", "call .contiguous()"))


def vector(name: str, value: torch.Tensor, size: Dim, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Check a contiguous tensor of one dim."""
    tensor(name, value, (size,), dtypes, device)
    rows(name, value)


def at_least(name: str, value: int, least: int) -> None:
    """Check a number on the host."""
    if value < least:
        raise ValueError(_message(name, f"must be at least {least}", str(value)))


def one_of(name: str, value: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check a dtype argument."""
    if value not in dtypes:
        raise TypeError(_message(name, f"must be {_names(dtypes)}", _names((value,))))


def together(arguments: Mapping[str, object]) -> None:
    """Check that all of the arguments are given, or none."""
    missing = [name for name, value in arguments.items() if value is None]
    if missing and len(missing) < len(arguments):
        raise ValueError(_message(", ".join(arguments), "give all or none", f"no {', '.join(missing)}"))


def rope_table(name: str, value: torch.Tensor, rope_dim: Dim, device: torch.device) -> None:
    """Check a table of cos | sin rows."""
    tensor(name, value, (None, rope_dim), FLOAT32, device)
    if not value.is_contiguous():
        raise ValueError(_message(name, "must be contiguous", f"strides {value.stride()}", "call .contiguous()"))
    if value.shape[1] % 2:
        raise ValueError(_message(name, "last dim must be even (cos | sin)", str(value.shape[1])))


def index_rope(name: str, index_dim: int, rope_dim: int, rotate: bool) -> None:
    """Check that an index row can hold the rope, and be rotated if it must be."""
    if rope_dim > index_dim:
        raise ValueError(_message(name, f"last dim must hold the {rope_dim} rope dims", str(index_dim)))
    if rotate and index_dim & (index_dim - 1):
        step = "use rotate=False"
        raise ValueError(_message(name, "last dim must be a power of two to be rotated", str(index_dim), step))


def latent_cache(name: str, cache: torch.Tensor, rank: Dim, rope_dim: Dim, device: torch.device) -> None:
    """Check a latent cache of either layout, and that it fits the widths where the caller knows them."""
    _pages(name, cache, device)
    width = cache.shape[2]
    if cache.dtype is torch.uint8:
        if width != LATENT_BYTES_FP8:
            expected = f"last dim must be {LATENT_BYTES_FP8} bytes (fp8 latent layout)"
            raise ValueError(_message(name, expected, str(width), "start the engine with --kv-cache-dtype fp8_ds_mla"))
        if rank not in (None, LATENT_RANK) or rope_dim not in (None, ROPE_DIM):
            expected = f"the fp8 layout holds {LATENT_RANK} latents and {ROPE_DIM} rope elements"
            raise ValueError(_message(name, expected, f"a model with {rank} and {rope_dim}", "use a float cache"))
    elif rank is not None and rope_dim is not None and width != rank + rope_dim:
        raise ValueError(_message(name, f"last dim must be {rank} + {rope_dim} = {rank + rope_dim}", str(width)))


def index_cache(name: str, cache: torch.Tensor, index_dim: Dim, device: torch.device) -> None:
    """Check an index cache of either layout, and that it fits the index keys where the caller knows their width."""
    _pages(name, cache, device)
    if index_dim is None:
        return
    fp8 = cache.dtype is torch.uint8
    width = index_dim + SCALE_BYTES if fp8 else index_dim
    if cache.shape[2] != width:
        layout = f"{width} bytes (fp8 index layout)" if fp8 else str(width)
        raise ValueError(_message(name, f"last dim must be {layout}", str(cache.shape[2])))


def absorbed_query(q_latent_thc: torch.Tensor, q_rope_thr: torch.Tensor) -> tuple[int, int, int, int]:
    """Check both parts of an absorbed query; returns T, H, C, R."""
    device = q_latent_thc.device
    tensor("q_latent_thc", q_latent_thc, (None, None, None), FLOATS, device)
    rows("q_latent_thc", q_latent_thc)
    tokens, heads, rank = q_latent_thc.shape
    tensor("q_rope_thr", q_rope_thr, (tokens, heads, None), (q_latent_thc.dtype,), device)
    rows("q_rope_thr", q_rope_thr)
    return tokens, heads, rank, q_rope_thr.shape[2]


def attention_outputs(
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check the buffers an attention writes, where the caller gives them."""
    if out is not None:
        tensor("out", out, shape, (dtype,), device)
        rows("out", out)
    if lse is not None:
        tensor("lse", lse, shape[:2], FLOAT32, device)
        rows("lse", lse)


def _fits(got: tuple[int, ...], shape: tuple[Dim, ...]) -> bool:
    return len(got) == len(shape) and all(want in (None, size) for size, want in zip(got, shape, strict=True))


def _pages(name: str, cache: torch.Tensor, device: torch.device) -> None:
    tensor(name, cache, (None, None, None), (*FLOATS, torch.uint8), device)
    pages, page_size, width = cache.shape
    if pages == 0:
        raise ValueError(_message(name, "must have at least one page", "none"))
    if page_size == 0 or page_size % PAGE_SIZE_MULTIPLE:
        expected = f"page size must be a multiple of {PAGE_SIZE_MULTIPLE}"
        raise ValueError(_message(name, expected, str(page_size), "start the engine with block size 64"))
    if cache.stride(1) != width or cache.stride(2) != 1:
        raise ValueError(_message(name, "a page must be contiguous", f"strides {cache.stride()}"))
    if cache.dtype is torch.uint8 and (cache.stride(0) % SCALE_BYTES or cache.storage_offset() % SCALE_BYTES):
        got = f"page stride {cache.stride(0)}, storage offset {cache.storage_offset()}"
        raise ValueError(_message(name, f"pages must begin at multiples of {SCALE_BYTES} bytes", got))


def _message(name: str, expected: str, got: str, step: str = "") -> str:
    return f"{name}: {expected}, got {got}" + (f"; {step}" if step else "")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _sizes(shape: tuple[Dim, ...]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
