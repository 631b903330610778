"""gather_index_keys and gather_latents on every GPU: each program copies a block of output rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cache_layout import (
    LATENT_BYTES_FP8,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    LATENT_TILE,
    LATENT_WIDTH,
    ROPE_DIM,
    SCALE_BYTES,
)
from ...device.fp8_rope import float32_from_e4m3
from ...runtime.launch import require_aligned_pages
from ...runtime.target import Target

INDEX_ROWS = {True: 32, False: 16}
"""fp8 -> rows a program; with 32 rows of bfloat16 ptxas caps the registers at 32 and spills."""
LATENT_ROWS = 8
WARPS = 4
RUNTIME = ("page_stride", "num_pages", "table_stride", "table_width", "num_seqs", "total")

TILE = tl.constexpr(LATENT_TILE)
ROPE = tl.constexpr(ROPE_DIM)
ROW_BYTES = tl.constexpr(LATENT_BYTES_FP8)
SCALES_AT = tl.constexpr(LATENT_SCALES_OFFSET)
ROPE_AT = tl.constexpr(LATENT_ROPE_OFFSET)


@triton.jit
def _locate(rows, cu_seqlens_ptr, table_ptr, table_stride, table_width, num_seqs, num_pages, total, PAGE: tl.constexpr):
    """(present, page, offset) of output rows: a binary search for the sequence, then the block table."""
    inside = rows < total
    low = tl.zeros_like(rows)
    high = low + num_seqs
    span = num_seqs
    while span > 0:
        # low: the last sequence known to begin at or before the row; high: the first known not to.
        middle = (low + high + 1) // 2
        begin = tl.load(cu_seqlens_ptr + middle, mask=inside, other=0).to(tl.int32)
        found = begin <= rows
        low = tl.where(found, middle, low)
        high = tl.where(found, high, middle - 1)
        span = span // 2
    # A row past the last sequence belongs to none.
    inside = inside & (low < num_seqs)
    position = rows - tl.load(cu_seqlens_ptr + low, mask=inside, other=0).to(tl.int32)
    inside = inside & (position >= 0) & (position // PAGE < table_width)
    page = tl.load(table_ptr + low * table_stride + position // PAGE, mask=inside, other=-1).to(tl.int64)
    present = (page >= 0) & (page < num_pages)
    return present, tl.where(present, page, 0), position % PAGE


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("cu_seqlens_ptr", "table_ptr", "scales_ptr"))
def _gather_index_keys_kernel(
    cache_ptr,
    table_ptr,
    cu_seqlens_ptr,
    keys_ptr,
    scales_ptr,
    page_stride: tl.int64,
    num_pages: tl.int64,
    table_stride: tl.int64,
    table_width: tl.int32,
    num_seqs: tl.int32,
    total: tl.int32,
    PAGE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,
):
    page_stride = tl.multiple_of(page_stride, 16)
    # [ROWS]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present, page, offset = _locate(
        rows, cu_seqlens_ptr, table_ptr, table_stride, table_width, num_seqs, num_pages, total, PAGE
    )
    # [ROWS, INDEX]
    offs_d = tl.arange(0, INDEX)[None, :]
    source_ptrs = cache_ptr + page[:, None] * page_stride + offset[:, None] * INDEX + offs_d
    keys = tl.load(source_ptrs, mask=present[:, None], other=0)
    mask = rows < total
    tl.store(keys_ptr + rows[:, None].to(tl.int64) * INDEX + offs_d, keys, mask=mask[:, None])
    if FP8:
        page_scales_ptr = (cache_ptr + page * page_stride + PAGE * INDEX).to(tl.pointer_type(tl.float32), bitcast=True)
        scale = tl.load(page_scales_ptr + offset, mask=present, other=0.0)
        tl.store(scales_ptr + rows, scale, mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("cu_seqlens_ptr", "table_ptr"))
def _gather_latents_kernel(
    cache_ptr,
    table_ptr,
    cu_seqlens_ptr,
    out_ptr,
    page_stride: tl.int64,
    num_pages: tl.int64,
    table_stride: tl.int64,
    table_width: tl.int32,
    num_seqs: tl.int32,
    total: tl.int32,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,
):
    page_stride = tl.multiple_of(page_stride, 16)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # [ROWS]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present, page, offset = _locate(
        rows, cu_seqlens_ptr, table_ptr, table_stride, table_width, num_seqs, num_pages, total, PAGE
    )
    mask = (rows < total)[:, None]
    row_out_ptr = out_ptr + rows[:, None].to(tl.int64) * WIDTH
    if FP8:
        row_ptr = cache_ptr + page * page_stride + offset * ROW_BYTES
        for tile in tl.static_range((WIDTH - ROPE) // TILE):
            # [ROWS, TILE]
            offs_c = tile * TILE + tl.arange(0, TILE)[None, :]
            codes = tl.load(row_ptr[:, None] + offs_c, mask=present[:, None], other=0)
            row_scales_ptr = (row_ptr + SCALES_AT).to(tl.pointer_type(tl.float32), bitcast=True)
            scale = tl.load(row_scales_ptr + tile, mask=present, other=0.0)
            tl.store(row_out_ptr + offs_c, (float32_from_e4m3(codes) * scale[:, None]).to(dtype), mask=mask)
        # [ROWS, ROPE]
        offs_r = tl.arange(0, ROPE)[None, :]
        rope_key_ptr = (row_ptr + ROPE_AT).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        rope_key = tl.load(rope_key_ptr[:, None] + offs_r, mask=present[:, None], other=0.0)
        tl.store(row_out_ptr + (WIDTH - ROPE) + offs_r, rope_key.to(dtype), mask=mask)
    else:
        # [ROWS, BLOCK]
        offs_w = tl.arange(0, BLOCK)[None, :]
        source_ptrs = cache_ptr + page[:, None] * page_stride + offset[:, None] * WIDTH + offs_w
        values = tl.load(source_ptrs, mask=present[:, None] & (offs_w < WIDTH), other=0.0)
        tl.store(row_out_ptr + offs_w, values.to(dtype), mask=mask & (offs_w < WIDTH))


def supports(target: Target) -> bool:
    return True


def gather_index_keys(
    index_cache: torch.Tensor, block_table_bp: torch.Tensor, cu_seqlens_b1: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    fp8 = index_cache.dtype == torch.uint8
    index = index_cache.shape[2] - (SCALE_BYTES if fp8 else 0)
    device = index_cache.device
    keys = torch.empty(total, index, dtype=torch.float8_e4m3fn if fp8 else index_cache.dtype, device=device)
    scales = torch.empty(total, dtype=torch.float32, device=device) if fp8 else None
    if total == 0:
        return keys, scales
    require_aligned_pages("index_cache", index_cache)
    table = block_table_bp
    _gather_index_keys_kernel[(triton.cdiv(total, INDEX_ROWS[fp8]),)](
        index_cache,
        table,
        cu_seqlens_b1.contiguous(),
        keys.view(torch.uint8) if fp8 else keys,
        scales,
        index_cache.stride(0),
        index_cache.shape[0],
        table.stride(0),
        table.shape[1],
        table.shape[0],
        total,
        PAGE=index_cache.shape[1],
        INDEX=index,
        ROWS=INDEX_ROWS[fp8],
        FP8=fp8,
        num_warps=WARPS,
    )
    return keys, scales


def gather_latents(
    latent_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    cu_seqlens_b1: torch.Tensor,
    total: int,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    fp8 = latent_cache.dtype == torch.uint8
    width = LATENT_WIDTH if fp8 else latent_cache.shape[2]
    out = torch.empty(total, width, dtype=dtype, device=latent_cache.device)
    if total == 0:
        return out
    require_aligned_pages("latent_cache", latent_cache)
    table = block_table_bp
    _gather_latents_kernel[(triton.cdiv(total, LATENT_ROWS),)](
        latent_cache,
        table,
        cu_seqlens_b1.contiguous(),
        out,
        latent_cache.stride(0),
        latent_cache.shape[0],
        table.stride(0),
        table.shape[1],
        table.shape[0],
        total,
        PAGE=latent_cache.shape[1],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ROWS=LATENT_ROWS,
        FP8=fp8,
        num_warps=WARPS,
    )
    return out
