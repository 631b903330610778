"""How an operation's `calls.py` says what models call: arguments whose tensors have no data, and spills looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..cache_layout import INDEX_BYTES, INDEX_DIM, LATENT_BYTES_FP8, LATENT_WIDTH, PAGE_SIZE
from .ahead import Launch

DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Of what the caches hold."""
PAGES = 64


class Call(NamedTuple):
    """One call that a model makes: an operation and its arguments, whose tensors are on the device "meta".

    `covers` leaves out launches that another one stands for.
    """

    name: str
    operation: str
    arguments: dict[str, Any]
    covers: Callable[[Launch], bool] = lambda launch: True


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data, contiguous and aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Spill(NamedTuple):
    """Spills that were looked at and accepted, of a kernel's variants with these constants."""

    kernel: str
    constants: dict[str, Any]
    spill_bytes: int
    reason: str


def latent_cache(kind: str) -> torch.Tensor:
    if kind == "fp8":
        return empty(PAGES, PAGE_SIZE, LATENT_BYTES_FP8, dtype=torch.uint8)
    return empty(PAGES, PAGE_SIZE, LATENT_WIDTH, dtype=DTYPES[kind])


def index_cache(kind: str) -> torch.Tensor:
    if kind == "fp8":
        return empty(PAGES, PAGE_SIZE, INDEX_BYTES, dtype=torch.uint8)
    return empty(PAGES, PAGE_SIZE, INDEX_DIM, dtype=DTYPES[kind])
