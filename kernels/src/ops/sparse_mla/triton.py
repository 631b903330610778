"""sparse_mla on every GPU that Triton compiles for: one program attends one token's heads to one chunk of its keys.

The heads are the rows of every product: 16 fill an mma.sync or MFMA tile exactly, 64 a wgmma. Fewer programs than the
chip holds are avoided by splitting the keys into chunks; a second kernel adds the chunks' results in ascending order.
dense_mla runs the same kernel with the block table in place of a list of slots.
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...cache_layout import (
    LATENT_BYTES_FP8,
    LATENT_RANK,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    LATENT_TILES,
    LATENT_WIDTH,
    ROPE_DIM,
)
from ...runtime.target import Target
from .common import INVARIANT_CHUNK, LOG2E, Attention, chip, choose_chunk, in_chunks, results, scan_width
from .common import sparse_mla as sparse_mla_by

RANK = tl.constexpr(LATENT_RANK)
ROPE = tl.constexpr(ROPE_DIM)
WIDTH = tl.constexpr(LATENT_WIDTH)
FP8_BYTES = tl.constexpr(LATENT_BYTES_FP8)
FP8_SCALES = tl.constexpr(LATENT_SCALES_OFFSET)
FP8_ROPE = tl.constexpr(LATENT_ROPE_OFFSET)
SCALE_BYTES = tl.constexpr(4)
LN2 = tl.constexpr(0.6931471805599453)

# The bits of an e4m3fn code, moved under a bfloat16's exponent, are the value times 2^-120. Half of the way back is put
# on the query and half on the tile's scale, so that neither product comes near float32's subnormal numbers.
LIFT = tl.constexpr(2.0**60)


class Config(NamedTuple):
    """One way to run the kernel."""

    block_h: int
    block_n: int
    tiles: int
    """Parts into which the 512 latents are cut; an fp8 row has a scale for each of its four."""
    num_warps: int
    num_stages: int


@triton.jit
def _widen(raw, DTYPE: tl.constexpr, LIFTED: tl.constexpr):
    """e4m3fn bytes -> DTYPE by their bits; times 2^-120 where LIFTED."""
    if LIFTED:
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, low_shifted, high_shifted;
            prmt.b32 low, 0, $2, 0x5040;
            prmt.b32 high, 0, $2, 0x7060;
            shr.u32 low_shifted, low, 4;
            shr.u32 high_shifted, high, 4;
            and.b32 low_shifted, low_shifted, 0x07f007f0;
            and.b32 high_shifted, high_shifted, 0x07f007f0;
            lop3.b32 $0, low, 0x80008000, low_shifted, 0xea;
            lop3.b32 $1, high, 0x80008000, high_shifted, 0xea;
            }
            """,
            "=r,=r,r",
            [raw],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        bits = raw.to(tl.uint32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        value = (bits.to(tl.float32, bitcast=True) * (2.0**120)).to(DTYPE)
    return value


@triton.jit
def _keys_of(
    t,
    split,
    index_ptr,
    seq_ptr,
    visible_ptr,
    stride_index,
    num_slots,
    num_keys,
    chunk,
    SCAN: tl.constexpr,
    PAGED: tl.constexpr,
):
    """(the token's row of the index, begin, end): the keys of one chunk, without absent ones at its end."""
    begin = split * chunk
    end = tl.minimum(begin + chunk, num_keys)
    if PAGED:
        index_ptr += tl.load(seq_ptr + t).to(tl.int64) * stride_index
        end = tl.minimum(end, tl.load(visible_ptr + t).to(tl.int32))
    else:
        # Absent slots at the end of the chunk are no work: most lists end with them.
        index_ptr += t * stride_index
        offs_scan = begin + tl.arange(0, SCAN)
        scan = tl.load(index_ptr + offs_scan, mask=offs_scan < end, other=-1)
        end = tl.max(tl.where((scan >= 0) & (scan < num_slots), offs_scan + 1, begin), 0)
    return index_ptr, begin, end


@triton.jit
def _locate(index_ptr, offs_k, mask_k, num_slots, table_pages, PAGE: tl.constexpr, PAGED: tl.constexpr):
    """(page, offset in it, whether it is there) of keys: by the block table, or by a list of slots."""
    if PAGED:
        page_index = offs_k // PAGE
        page = tl.load(index_ptr + page_index, mask=mask_k & (page_index < table_pages), other=-1)
        present = (page >= 0) & (page < num_slots // PAGE)
        offset = offs_k % PAGE
    else:
        slot = tl.load(index_ptr + offs_k, mask=mask_k, other=-1)
        present = (slot >= 0) & (slot < num_slots)
        page = slot // PAGE
        offset = slot % PAGE
    return page, offset, present


@triton.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads", "table_pages"])
def _attend_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    index_ptr,
    seq_ptr,
    visible_ptr,
    out_ptr,
    lse_ptr,
    stride_q_latent_t,
    stride_q_latent_h,
    stride_q_rope_t,
    stride_q_rope_h,
    stride_page,
    stride_index,
    stride_out_t,
    stride_out_h,
    num_slots,
    num_keys,
    chunk,
    heads,
    table_pages,
    scale,
    SPLITS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    SCAN: tl.constexpr,
    FP8: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    LIFTED: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILE: tl.constexpr = RANK // TILES
    Q_LIFT: tl.constexpr = LIFT if LIFTED else 1.0
    pid = tl.program_id(0)
    head_block = pid % HEAD_BLOCKS
    split = (pid // HEAD_BLOCKS) % SPLITS
    t = (pid // (HEAD_BLOCKS * SPLITS)).to(tl.int64)
    offs_h = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < heads
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, TILE)
    offs_r = tl.arange(0, ROPE)

    index_ptr, begin, end = _keys_of(
        t, split, index_ptr, seq_ptr, visible_ptr, stride_index, num_slots, num_keys, chunk, SCAN, PAGED
    )

    # q, acc [BLOCK_H, TILE], once for each tile; q_rope [BLOCK_H, ROPE]; running_max, running_sum [BLOCK_H]. An fp8 row
    # has a scale for each tile, so its products are scaled one by one.
    qs = ()
    accs = ()
    q_rows = q_latent_ptr + t * stride_q_latent_t + offs_h[:, None].to(tl.int64) * stride_q_latent_h
    for j in tl.static_range(TILES):
        q = tl.load(q_rows + (j * TILE + offs_d[None, :]), mask=mask_h[:, None], other=0.0)
        qs += ((q * Q_LIFT).to(DTYPE),)
        accs += (tl.zeros((BLOCK_H, TILE), tl.float32),)
    q_rope_rows = q_rope_ptr + t * stride_q_rope_t + offs_h[:, None].to(tl.int64) * stride_q_rope_h
    q_rope = tl.load(q_rope_rows + offs_r[None, :], mask=mask_h[:, None], other=0.0).to(DTYPE)

    running_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_H,), tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        offs_k = start + offs_n
        mask_k = offs_k < end
        page, offset, present = _locate(index_ptr, offs_k, mask_k, num_slots, table_pages, PAGE, PAGED)
        page = tl.where(present, page, 0).to(tl.int64)
        offset = tl.where(present, offset, 0)
        mask_row = present[:, None]

        # k [BLOCK_N, TILE], once for each tile, serves both products; k_rope [BLOCK_N, ROPE]; absent rows are 0
        ks = ()
        k_scales = ()
        if FP8:
            row = cache_ptr + page * stride_page + offset * FP8_BYTES
            k_rope_ptr = (row + FP8_ROPE).to(tl.pointer_type(tl.bfloat16))
            scale_ptr = (row + FP8_SCALES).to(tl.pointer_type(tl.float32))
            for j in tl.static_range(TILES):
                raw = tl.load(row[:, None] + (j * TILE + offs_d[None, :]), mask=mask_row, other=0)
                ks += (_widen(raw, DTYPE, LIFTED),)
                k_scales += (tl.load(scale_ptr + j, mask=present, other=0.0) * Q_LIFT,)
        else:
            row = cache_ptr + page * stride_page + offset * WIDTH
            k_rope_ptr = row + RANK
            for j in tl.static_range(TILES):
                k = tl.load(row[:, None] + (j * TILE + offs_d[None, :]), mask=mask_row, other=0.0)
                ks += (k.to(DTYPE),)
        k_rope = tl.load(k_rope_ptr[:, None] + offs_r[None, :], mask=mask_row, other=0.0).to(DTYPE)

        # scores [BLOCK_H, BLOCK_N]
        scores = tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
        for j in tl.static_range(TILES):
            if FP8:
                scores += tl.dot(qs[j], tl.trans(ks[j]), input_precision="ieee") * k_scales[j][None, :]
            else:
                scores = tl.dot(qs[j], tl.trans(ks[j]), scores, input_precision="ieee")
        scores = tl.where(present[None, :], scores * scale, float("-inf"))

        # The online softmax, in powers of two: `scale` has log2(e) in it. A head that has seen no key keeps -inf, and 0
        # is subtracted, as -inf minus -inf would be NaN.
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(running_max - shift)
        running_max = new_max
        running_sum = running_sum * decay + tl.sum(p, 1)
        updated = ()
        for j in tl.static_range(TILES):
            if FP8:
                # The scale of a row's tile goes to the weight, so that the codes are multiplied as they are.
                weights = (p * k_scales[j][None, :]).to(DTYPE)
            else:
                weights = p.to(DTYPE)
            updated += (tl.dot(weights, ks[j], accs[j] * decay[:, None], input_precision="ieee"),)
        accs = updated

    norm = Q_LIFT / tl.where(running_sum == 0.0, 1.0, running_sum)
    out_rows = out_ptr + t * stride_out_t + offs_h[:, None].to(tl.int64) * stride_out_h + split * RANK
    for j in tl.static_range(TILES):
        result = (accs[j] * norm[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + (j * TILE + offs_d[None, :]), result, mask=mask_h[:, None])
    lse = tl.where(running_sum == 0.0, float("-inf"), (running_max + tl.log2(running_sum)) * LN2)
    tl.store(lse_ptr + (t * heads + offs_h) * SPLITS + split, lse, mask=mask_h)


def supports(target: Target) -> bool:
    return True


def attend(call: Attention, out: torch.Tensor | None, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = results(call, out, lse)
    tokens, heads, _ = out.shape
    target, processors = chip(out.device)
    fp8, query_dtype = call.fp8, call.q_latent_thc.dtype
    wide = torch.float32 in (query_dtype, call.latent_cache.dtype)
    dtype = tl.float32 if wide else tl.float16 if query_dtype is torch.float16 else tl.bfloat16
    config = choose_config(target, heads, fp8, wide)
    head_blocks = triton.cdiv(heads, config.block_h)
    chunk = INVARIANT_CHUNK
    if not call.batch_invariant:
        chunk = choose_chunk(tokens * head_blocks, call.num_keys, 2 * processors)

    def launch(rows: slice, part: torch.Tensor, part_lse: torch.Tensor, splits: int) -> None:
        _attend_kernel[((rows.stop - rows.start) * splits * head_blocks,)](
            *call.arguments(rows, part, part_lse, chunk),
            call.scale * LOG2E,
            SPLITS=splits,
            HEAD_BLOCKS=head_blocks,
            BLOCK_H=config.block_h,
            BLOCK_N=config.block_n,
            TILES=config.tiles,
            SCAN=0 if call.paged else scan_width(chunk, call.num_keys),
            FP8=fp8,
            PAGED=call.paged,
            PAGE=call.page_size,
            LIFTED=_lifted(target, fp8, dtype),
            DTYPE=dtype,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    in_chunks(call, chunk, launch, out, lse)
    return out, lse


sparse_mla = functools.partial(sparse_mla_by, attend)


def _lifted(target: Target, fp8: bool, dtype: Any) -> bool:
    return fp8 and dtype == tl.bfloat16 and target.is_cuda


def choose_config(target: Target, heads: int, fp8: bool, wide: bool) -> Config:
    """The configuration for a chip, a number of heads and a cache; `wide` computes in float32.

    Fewer heads per program keep the accumulator in registers and the rows in the shared memory that the chip has.
    """
    if wide:
        return Config(block_h=16, block_n=16, tiles=LATENT_TILES, num_warps=4, num_stages=1)
    tiles = LATENT_TILES if fp8 else 1
    stages = 1 if fp8 or not target.is_cuda else 2
    if heads <= 16 or not target.is_cuda or target.shared_bytes < 160 << 10:
        block_n = 16 if fp8 and target.is_cuda else 32
        return Config(block_h=16, block_n=block_n, tiles=tiles, num_warps=4, num_stages=stages)
    if heads <= 32 or fp8 or target.name != "sm90":
        return Config(block_h=32, block_n=32, tiles=tiles, num_warps=8, num_stages=stages)
    return Config(block_h=64, block_n=64, tiles=tiles, num_warps=8, num_stages=stages)
