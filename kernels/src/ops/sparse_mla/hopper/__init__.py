"""sparse_mla on NVIDIA sm90: up to 16 heads by cache, more in blocks of 64. dense_mla runs the same kernels.

docs/notes/kernels.md has the figures that chose the sizes below, and what limits each kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from ....runtime.target import Target
from .. import common
from .few_heads_bf16 import few_heads_bf16_kernel
from .few_heads_fp8 import HEADS as FEW_HEADS
from .few_heads_fp8 import few_heads_fp8_kernel
from .many_heads import HEADS as MANY_HEADS
from .many_heads import many_heads_kernel

NUM_WARPS = 4
"""Of the program; the kernels start more by themselves."""

FEW_REGISTERS = 128
"""Of each of 256 threads for up to 16 heads, so that a multiprocessor holds two programs; the warps share them out."""

LEAST_CHUNK = 128
"""Fewest keys per program: fewer cost more for the queries and the result than they save."""

MANY_CHUNK = 256
"""Keys below which a program of many heads spends more on its queries and its result than it saves."""


def supports(target: Target) -> bool:
    return target.name == "sm90"


def attend(
    call: common.Attention, out: torch.Tensor | None, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    known = call.q_latent_thc.dtype is torch.bfloat16 and (call.fp8 or call.latent_cache.dtype is torch.bfloat16)
    if not known or not _aligned(call.latent_cache):
        return NotImplemented
    out, lse = common.results(call, out, lse)
    tokens, heads, _ = out.shape
    _, processors = common.chip(out.device)
    head_blocks = _head_blocks(heads)
    chunk = common.INVARIANT_CHUNK
    if not call.batch_invariant:
        chunk = _choose_chunk(tokens * head_blocks, call.num_keys, processors, heads)
    kernel, options = _choose(heads, call.fp8)

    def launch(rows: slice, part: torch.Tensor, part_lse: torch.Tensor, splits: int) -> None:
        kernel[((rows.stop - rows.start) * splits * head_blocks,)](
            *call.arguments(rows, part, part_lse, chunk),
            0,
            call.scale * common.LOG2E,
            SPLITS=splits,
            SCAN=0 if call.paged else _scan(chunk, call.num_keys),
            PAGE=call.page_size,
            PAGED=call.paged,
            num_warps=NUM_WARPS,
            launch_pdl=True,
            **options,
        )

    common.in_chunks(call, chunk, launch, out, lse)
    return out, lse


sparse_mla = functools.partial(common.sparse_mla, attend)


def _head_blocks(heads: int) -> int:
    return 1 if heads <= FEW_HEADS.value else triton.cdiv(heads, MANY_HEADS.value)


def _choose_chunk(programs: int, num_keys: int, processors: int, heads: int) -> int:
    """Keys per program, for one program on each multiprocessor.

    With many heads, fewer than MANY_CHUNK keys pay only while half of the multiprocessors are idle.
    """
    chunk = common.choose_chunk(programs, num_keys, processors)
    if heads > FEW_HEADS.value and chunk < MANY_CHUNK:
        chunk = common.choose_chunk(programs, num_keys, processors // 2)
    return max(chunk, LEAST_CHUNK)


def _choose(heads: int, fp8: bool) -> tuple[Any, dict[str, Any]]:
    """(kernel, the arguments of its launch that not all kernels have)."""
    if heads > FEW_HEADS.value:
        return many_heads_kernel, {"HEAD_BLOCKS": _head_blocks(heads), "FP8": fp8}
    return few_heads_fp8_kernel if fp8 else few_heads_bf16_kernel, {"maxnreg": FEW_REGISTERS}


def _scan(chunk: int, num_keys: int) -> int:
    return max(256, common.scan_width(chunk, num_keys))


def _aligned(latent_cache: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as asynchronous copies need, and pages of 16 elements."""
    return latent_cache.data_ptr() % 16 == 0 and latent_cache.stride(0) % 16 == 0
