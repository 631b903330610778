"""sparse_mla on NVIDIA sm90.

Up to 16 heads over an fp8 cache: the keys are the rows of both products. A wgmma has 64 rows; 16 heads as rows would be
padded four times over. With S^T = K Q^T the 64 keys of a step are the rows and the heads the 16 columns, and with
O^T = V^T P the 512 latents are. K comes from registers: each thread loads 16 bytes of a row, widens them and hands them
to the product at once, right because a product may take the latents in any order as long as the query is stored
in the same one. V comes from shared memory, written once by the same threads.

More heads: 64 of them are the rows. Two warpgroups share the scores by keys and the result by latents, and while they
compute, the rows of the next step are copied (bfloat16) or loaded and widened (fp8) into the other of two buffers.

Measured on one H100 (medians, us, L = 32K, 2048 keys selected, L2 flushed before each launch):

    16 heads, fp8     B=1 14.1, B=8 18.4, B=16 26.5, B=64 60.0, B=128 107;  prefill of 4096 tokens 2012
    128 heads, fp8    B=1 22.5, B=16 55.7, B=64 138, B=128 269;             prefill of 4096 tokens 7570
    128 heads, bf16   B=1 21.6, B=16 52.6, B=64 130, B=128 246;             prefill of 4096 tokens 7011
    16 heads, fp8, DSV32_BATCH_INVARIANT=1    B=1 31.0, B=8 33.0, B=16 34.6, B=64 60.1, B=128 116
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ...cache_layout import (
    LATENT_BYTES_FP8,
    LATENT_RANK,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    LATENT_TILE,
    LATENT_TILES,
    PAGE_SIZE,
    ROPE_DIM,
)
from ..aot import AotCase, Target
from . import triton as portable

HEADS = gl.constexpr(16)
KEYS = gl.constexpr(64)
"""Keys a step: the rows of a wgmma."""
RANK = gl.constexpr(LATENT_RANK)
ROPE = gl.constexpr(ROPE_DIM)
TILE = gl.constexpr(LATENT_TILE)
TILES = gl.constexpr(LATENT_TILES)
FP8_BYTES = gl.constexpr(LATENT_BYTES_FP8)
FP8_SCALES = gl.constexpr(LATENT_SCALES_OFFSET)
FP8_ROPE = gl.constexpr(LATENT_ROPE_OFFSET)
LN2 = gl.constexpr(0.6931471805599453)
FEW_WARPS = 4

# Four neighbouring lanes share a row, each with 16 bytes next to each other; eight rows a warp and pass.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
ROPE_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16]))
FRAGMENT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=ACC.value, k_width=2))
Q_BLOCKED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
SLOT_ROWS = gl.constexpr(gl.SliceLayout(1, WORDS.value))
SCAN_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
Q_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
V_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
P_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))


@gluon.jit
def _shuffle(x, ROWS: gl.constexpr):
    """[ROWS, 128] in the order of memory -> the order in which a wgmma's registers take what a thread has loaded."""
    x = x.reshape(ROWS, 2, 4, 2, 2, 2, 2)
    return x.permute(0, 1, 3, 4, 5, 2, 6).reshape(ROWS, 128)


@gluon.jit
def _shuffle_rope(x, ROWS: gl.constexpr):
    """The same for 64 bfloat16."""
    x = x.reshape(ROWS, 2, 4, 2, 2, 2)
    return x.permute(0, 1, 3, 4, 2, 5).reshape(ROWS, 64)


@gluon.jit
def _widen(words, scale_pair):
    """[64, 32] words of four e4m3fn codes -> [64, 128] bfloat16, times their row's scale (as a pair, times 2^120)."""
    a, b, c, d = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, low_shifted, high_shifted;
        prmt.b32 low, 0, $4, 0x5040;
        prmt.b32 high, 0, $4, 0x7060;
        shr.u32 low_shifted, low, 4;
        shr.u32 high_shifted, high, 4;
        and.b32 low_shifted, low_shifted, 0x07f007f0;
        and.b32 high_shifted, high_shifted, 0x07f007f0;
        lop3.b32 low, low, 0x80008000, low_shifted, 0xea;
        lop3.b32 high, high, 0x80008000, high_shifted, 0xea;
        mul.bf16x2 low, low, $5;
        mul.bf16x2 high, high, $5;
        mov.b32 {$0, $1}, low;
        mov.b32 {$2, $3}, high;
        }
        """,
        "=h,=h,=h,=h,r,r",
        [words, scale_pair],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return gl.join(gl.join(a, c), gl.join(b, d)).reshape(64, 128)


@gluon.jit
def _scale_pair(scale):
    """A scale times 2^120, twice in a register as bfloat16."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .f32 lifted;
        mul.f32 lifted, $1, 0f7B800000;
        cvt.rn.bf16x2.f32 $0, lifted, lifted;
        }
        """,
        "=r,f",
        [scale],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _scale_pairs(row):
    """The pairs of the four scales of each row: four [64] int32 tensors."""
    pairs = _scale_pair(row)
    even, odd = gl.split(pairs.reshape(64, 2, 2))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return a, b, c, d


@gluon.jit
def _row_bytes(slot, num_slots, stride_page, PAGE: gl.constexpr):
    """(present, byte offset of the row) of slots."""
    present = (slot >= 0) & (slot < num_slots)
    slot = gl.where(present, slot, 0)
    return present, (slot // PAGE).to(gl.int64) * stride_page + (slot % PAGE) * FP8_BYTES


@gluon.jit
def _load_tile(cache_ptr, present, row, j: gl.constexpr):
    offs_w = gl.arange(0, 32, layout=gl.SliceLayout(0, WORDS))
    words_ptr = (cache_ptr + row + j * TILE).to(gl.pointer_type(gl.int32))
    return gl.load(words_ptr[:, None] + offs_w[None, :], mask=present[:, None], other=0)


@gluon.jit
def _load_rope(cache_ptr, present, row):
    present = gl.convert_layout(present, gl.SliceLayout(1, ROPE_WORDS), assert_trivial=True)
    row = gl.convert_layout(row, gl.SliceLayout(1, ROPE_WORDS), assert_trivial=True)
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, ROPE_WORDS))
    rope_ptr = (cache_ptr + row + FP8_ROPE).to(gl.pointer_type(gl.bfloat16))
    return gl.load(rope_ptr[:, None] + offs_r[None, :], mask=present[:, None], other=0.0)


@gluon.jit
def _load_scales(cache_ptr, present, row):
    present = gl.convert_layout(present, gl.SliceLayout(1, SCALES), assert_trivial=True)
    row = gl.convert_layout(row, gl.SliceLayout(1, SCALES), assert_trivial=True)
    offs_s = gl.arange(0, 4, layout=gl.SliceLayout(0, SCALES))
    scale_ptr = (cache_ptr + row + FP8_SCALES).to(gl.pointer_type(gl.float32))
    return gl.load(scale_ptr[:, None] + offs_s[None, :], mask=present[:, None], other=0.0)


@gluon.jit
def _keys(words, pair, v_shared):
    """Widen one tile of the rows: store it for the second product, return it as the operand of the first."""
    pair = gl.convert_layout(pair, SLOT_ROWS, assert_trivial=True)
    k = _widen(words, pair[:, None])
    v_shared.store(k)
    return gl.convert_layout(_shuffle(k, KEYS), FRAGMENT, assert_trivial=True)


@gluon.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads", "zero"])
def _few_heads_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    index_ptr,
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
    zero,
    scale,
    SPLITS: gl.constexpr,
    SCAN: gl.constexpr,
    PAGE: gl.constexpr,
):
    pid = gl.program_id(0)
    split = pid % SPLITS
    t = (pid // SPLITS).to(gl.int64)
    begin = split * chunk
    index_ptr += t * stride_index
    # Absent slots at the end of the chunk are no work: most lists end with them.
    offs_scan = begin + gl.arange(0, SCAN, layout=SCAN_LAYOUT)
    scan = gl.load(index_ptr + offs_scan, mask=offs_scan < gl.minimum(begin + chunk, num_keys), other=-1)
    end = gl.max(gl.where((scan >= 0) & (scan < num_slots), offs_scan + 1, begin), 0)

    # The tiles of the next step are always on their way into registers; its rope key, needed last, follows later.
    offs_k = begin + gl.arange(0, KEYS, layout=SLOT_ROWS)
    slot = gl.load(index_ptr + offs_k, mask=offs_k < end, other=-1)
    present, row = _row_bytes(slot, num_slots, stride_page, PAGE)
    scales = _load_scales(cache_ptr, present, row)
    words0 = _load_tile(cache_ptr, present, row, 0)
    words1 = _load_tile(cache_ptr, present, row, 1)
    words2 = _load_tile(cache_ptr, present, row, 2)
    words3 = _load_tile(cache_ptr, present, row, 3)
    offs_k += KEYS
    slot = gl.load(index_ptr + offs_k, mask=offs_k < end, other=-1)

    q_shared = gl.allocate_shared_memory(gl.bfloat16, [TILES, HEADS, TILE], Q_SHARED)
    q_rope_shared = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, ROPE], Q_SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, HEADS], P_SHARED)
    offs_h = gl.arange(0, HEADS, layout=gl.SliceLayout(1, Q_BLOCKED))
    offs_d = gl.arange(0, TILE, layout=gl.SliceLayout(0, Q_BLOCKED))
    q_rows = q_latent_ptr + t * stride_q_latent_t + offs_h.to(gl.int64) * stride_q_latent_h
    for j in gl.static_range(TILES):
        q = gl.load(q_rows[:, None] + (j * TILE + offs_d)[None, :], mask=(offs_h < heads)[:, None], other=0.0)
        q_shared.index(j).store(_shuffle(q, HEADS))
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, Q_BLOCKED))
    q_rows = q_rope_ptr + t * stride_q_rope_t + offs_h.to(gl.int64) * stride_q_rope_h
    q_rope = gl.load(q_rows[:, None] + offs_r[None, :], mask=(offs_h < heads)[:, None], other=0.0)
    q_rope_shared.index(0).store(_shuffle_rope(q_rope, HEADS))
    hopper.fence_async_shared()

    # acc [128 latents, 16 heads] a tile; highest [16]; the sum of the weights stays spread over the keys of a step
    v_shared = ()
    accs = ()
    for _ in gl.static_range(TILES):
        v_shared += (gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, TILE], V_SHARED),)
        accs += (gl.zeros([TILE, HEADS], gl.float32, layout=ACC),)
    total = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
    highest = gl.full([HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(0, ACC))
    base = zero
    for _ in range(begin, end, KEYS):
        # Always zero, but not known to be: the operands' descriptors are then computed here from one register. As
        # constants of the loop they would fill a hundred and spill.
        base = base * zero
        nothing = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
        pair0, pair1, pair2, pair3 = _scale_pairs(scales)
        visible = gl.convert_layout(present, gl.SliceLayout(1, ACC), assert_trivial=True)
        rope = _load_rope(cache_ptr, present, row)

        k0 = _keys(words0, pair0, v_shared[0].index(base))
        scores = hopper.warpgroup_mma(k0, q_shared.index(base + 0).permute((1, 0)), nothing, is_async=True)
        k1 = _keys(words1, pair1, v_shared[1].index(base))
        scores, k0 = hopper.warpgroup_mma_wait(0, deps=(scores, k0))
        scores = hopper.warpgroup_mma(k1, q_shared.index(base + 1).permute((1, 0)), scores, is_async=True)
        k2 = _keys(words2, pair2, v_shared[2].index(base))
        scores, k1 = hopper.warpgroup_mma_wait(0, deps=(scores, k1))
        scores = hopper.warpgroup_mma(k2, q_shared.index(base + 2).permute((1, 0)), scores, is_async=True)
        present, row = _row_bytes(slot, num_slots, stride_page, PAGE)
        scales = _load_scales(cache_ptr, present, row)
        words0 = _load_tile(cache_ptr, present, row, 0)
        k3 = _keys(words3, pair3, v_shared[3].index(base))
        scores, k2 = hopper.warpgroup_mma_wait(0, deps=(scores, k2))
        scores = hopper.warpgroup_mma(k3, q_shared.index(base + 3).permute((1, 0)), scores, is_async=True)
        words1 = _load_tile(cache_ptr, present, row, 1)
        k_rope = gl.convert_layout(_shuffle_rope(rope, KEYS), FRAGMENT, assert_trivial=True)
        scores, k3 = hopper.warpgroup_mma_wait(0, deps=(scores, k3))
        scores = hopper.warpgroup_mma(k_rope, q_rope_shared.index(base).permute((1, 0)), scores, is_async=True)
        words2 = _load_tile(cache_ptr, present, row, 2)
        words3 = _load_tile(cache_ptr, present, row, 3)
        offs_k += KEYS
        slot = gl.load(index_ptr + offs_k, mask=offs_k < end, other=-1)
        scores, k_rope = hopper.warpgroup_mma_wait(0, deps=(scores, k_rope))

        scores = gl.where(visible[:, None], scores * scale, float("-inf"))
        higher = gl.maximum(highest, gl.max(scores, 0))
        shift = gl.where(higher == float("-inf"), 0.0, higher)
        p = gl.exp2(scores - shift[None, :])
        decay = gl.exp2(highest - shift)
        highest = higher
        total = total * decay[None, :] + p
        p_shared.index(base).store(p.to(gl.bfloat16))
        hopper.fence_async_shared()
        sums = ()
        for j in gl.static_range(TILES):
            acc = accs[j] * decay[None, :]
            sums += (
                hopper.warpgroup_mma(v_shared[j].index(base).permute((1, 0)), p_shared.index(base), acc, is_async=True),
            )
        accs = hopper.warpgroup_mma_wait(0, deps=sums)

    total_h = gl.sum(total, 0)
    norm = 1.0 / gl.where(total_h == 0.0, 1.0, total_h)
    offs_h = gl.arange(0, HEADS, layout=gl.SliceLayout(0, ACC))
    offs_d = gl.arange(0, TILE, layout=gl.SliceLayout(1, ACC))
    out_rows = out_ptr + t * stride_out_t + split * RANK + offs_h.to(gl.int64) * stride_out_h
    for j in gl.static_range(TILES):
        result = (accs[j] * norm[None, :]).to(out_ptr.dtype.element_ty)
        gl.store(out_rows[None, :] + (j * TILE + offs_d)[:, None], result, mask=(offs_h < heads)[None, :])
    lse = gl.where(total_h == 0.0, float("-inf"), (highest + gl.log2(total_h)) * LN2)
    gl.store(lse_ptr + (t * heads + offs_h) * SPLITS + split, lse, mask=offs_h < heads)


MANY_HEADS = gl.constexpr(64)
MANY_WARPS = 8
MANY_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
MANY_ROPE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
MANY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
MANY_SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16]))
MANY_ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 256, 16]))
MANY_SCAN = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))


@gluon.jit
def _slots(index_ptr, start, end, LAYOUT: gl.constexpr):
    offs_k = start + gl.arange(0, KEYS, layout=LAYOUT)
    return gl.load(index_ptr + offs_k, mask=offs_k < end, other=-1)


@gluon.jit
def _copy_rows(cache_ptr, slot, slot_rope, num_slots, stride_page, PAGE: gl.constexpr, k_shared, k_rope_shared):
    """Start copying 64 bfloat16 rows."""
    WIDTH: gl.constexpr = RANK + ROPE
    present = (slot >= 0) & (slot < num_slots)
    slot = gl.where(present, slot, 0)
    rows = cache_ptr + (slot // PAGE).to(gl.int64) * stride_page + (slot % PAGE) * WIDTH
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(0, MANY_ROWS))
    hopper.async_copy.async_copy_global_to_shared(k_shared, rows[:, None] + offs_d[None, :], mask=present[:, None])
    present = (slot_rope >= 0) & (slot_rope < num_slots)
    slot_rope = gl.where(present, slot_rope, 0)
    rows = cache_ptr + (slot_rope // PAGE).to(gl.int64) * stride_page + (slot_rope % PAGE) * WIDTH + RANK
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, MANY_ROPE))
    hopper.async_copy.async_copy_global_to_shared(k_rope_shared, rows[:, None] + offs_r[None, :], mask=present[:, None])
    hopper.async_copy.commit_group()


@gluon.jit
def _load_fp8_rows(cache_ptr, slot, slot_rope, num_slots, stride_page, PAGE: gl.constexpr):
    """Start loading 64 fp8 rows into registers: four tiles, their scales and the rope key."""
    present, row = _row_bytes(slot, num_slots, stride_page, PAGE)
    offs_w = gl.arange(0, 32, layout=gl.SliceLayout(0, MANY_WORDS))
    parts = ()
    for j in gl.static_range(TILES):
        words_ptr = (cache_ptr + row + j * TILE).to(gl.pointer_type(gl.int32))
        parts += (gl.load(words_ptr[:, None] + offs_w[None, :], mask=present[:, None], other=0),)
    for j in gl.static_range(TILES):
        scale_ptr = (cache_ptr + row + FP8_SCALES + 4 * j).to(gl.pointer_type(gl.float32))
        parts += (gl.load(scale_ptr, mask=present, other=0.0),)
    present, row = _row_bytes(slot_rope, num_slots, stride_page, PAGE)
    rope_ptr = (cache_ptr + row + FP8_ROPE).to(gl.pointer_type(gl.bfloat16))
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, MANY_ROPE))
    parts += (gl.load(rope_ptr[:, None] + offs_r[None, :], mask=present[:, None], other=0.0),)
    return parts


@gluon.jit
def _store_fp8_rows(parts, k_shared, k_rope_shared):
    for j in gl.static_range(TILES):
        pair = _scale_pair(parts[TILES + j])
        k_shared.slice(j * TILE, TILE, dim=1).store(_widen(parts[j], pair[:, None]))
    k_rope_shared.store(parts[2 * TILES])


@gluon.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads"])
def _many_heads_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    index_ptr,
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
    scale,
    SPLITS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    SCAN: gl.constexpr,
    FP8: gl.constexpr,
    PAGE: gl.constexpr,
):
    """64 heads are the rows; the scores' columns and the output's are split over two warpgroups."""
    pid = gl.program_id(0)
    head_block = pid % HEAD_BLOCKS
    split = (pid // HEAD_BLOCKS) % SPLITS
    t = (pid // (HEAD_BLOCKS * SPLITS)).to(gl.int64)
    begin = split * chunk
    index_ptr += t * stride_index
    offs_scan = begin + gl.arange(0, SCAN, layout=MANY_SCAN)
    scan = gl.load(index_ptr + offs_scan, mask=offs_scan < gl.minimum(begin + chunk, num_keys), other=-1)
    end = gl.max(gl.where((scan >= 0) & (scan < num_slots), offs_scan + 1, begin), 0)

    q_shared = gl.allocate_shared_memory(gl.bfloat16, [MANY_HEADS, RANK], Q_SHARED)
    q_rope_shared = gl.allocate_shared_memory(gl.bfloat16, [MANY_HEADS, ROPE], Q_SHARED)
    k_shared = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, RANK], V_SHARED)
    k_rope_shared = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], V_SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [MANY_HEADS, KEYS], V_SHARED)

    # The slots of a step are loaded a step before its rows, and the rows a step before they are needed.
    SLOTS: gl.constexpr = gl.SliceLayout(1, MANY_WORDS if FP8 else MANY_ROWS)
    SLOTS_ROPE: gl.constexpr = gl.SliceLayout(1, MANY_ROPE)
    slot = _slots(index_ptr, begin, end, SLOTS)
    slot_rope = _slots(index_ptr, begin, end, SLOTS_ROPE)
    if FP8:
        parts = _load_fp8_rows(cache_ptr, slot, slot_rope, num_slots, stride_page, PAGE)
    else:
        _copy_rows(cache_ptr, slot, slot_rope, num_slots, stride_page, PAGE, k_shared.index(0), k_rope_shared.index(0))
    slot = _slots(index_ptr, begin + KEYS, end, SLOTS)
    slot_rope = _slots(index_ptr, begin + KEYS, end, SLOTS_ROPE)
    offs_h = head_block * MANY_HEADS + gl.arange(0, MANY_HEADS, layout=gl.SliceLayout(1, MANY_ROWS))
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(0, MANY_ROWS))
    q_rows = q_latent_ptr + t * stride_q_latent_t + offs_h.to(gl.int64) * stride_q_latent_h
    q_shared.store(gl.load(q_rows[:, None] + offs_d[None, :], mask=(offs_h < heads)[:, None], other=0.0))
    offs_h = head_block * MANY_HEADS + gl.arange(0, MANY_HEADS, layout=gl.SliceLayout(1, MANY_ROPE))
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, MANY_ROPE))
    q_rows = q_rope_ptr + t * stride_q_rope_t + offs_h.to(gl.int64) * stride_q_rope_h
    q_rope_shared.store(gl.load(q_rows[:, None] + offs_r[None, :], mask=(offs_h < heads)[:, None], other=0.0))
    if FP8:
        _store_fp8_rows(parts, k_shared.index(0), k_rope_shared.index(0))

    # acc [64 heads, 512 latents]; highest, total [64]
    acc = gl.zeros([MANY_HEADS, RANK], gl.float32, layout=MANY_ACC)
    total = gl.zeros([MANY_HEADS], gl.float32, layout=gl.SliceLayout(1, MANY_SCORES))
    highest = gl.full([MANY_HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, MANY_SCORES))
    buffer = 0
    for start in range(begin, end, KEYS):
        if not FP8:
            hopper.async_copy.wait_group(0)
        hopper.fence_async_shared()
        gl.thread_barrier()
        k = k_shared.index(buffer)
        scores = gl.zeros([MANY_HEADS, KEYS], gl.float32, layout=MANY_SCORES)
        scores = hopper.warpgroup_mma(
            q_rope_shared, k_rope_shared.index(buffer).permute((1, 0)), scores, use_acc=False, is_async=True
        )
        scores = hopper.warpgroup_mma(q_shared, k.permute((1, 0)), scores, is_async=True)
        slot_s = _slots(index_ptr, start, end, gl.SliceLayout(0, MANY_SCORES))
        if FP8:
            parts = _load_fp8_rows(cache_ptr, slot, slot_rope, num_slots, stride_page, PAGE)
        else:
            _copy_rows(
                cache_ptr,
                slot,
                slot_rope,
                num_slots,
                stride_page,
                PAGE,
                k_shared.index(1 - buffer),
                k_rope_shared.index(1 - buffer),
            )
        slot = _slots(index_ptr, start + 2 * KEYS, end, SLOTS)
        slot_rope = _slots(index_ptr, start + 2 * KEYS, end, SLOTS_ROPE)
        scores = hopper.warpgroup_mma_wait(0, deps=(scores,))

        visible = (slot_s >= 0) & (slot_s < num_slots)
        scores = gl.where(visible[None, :], scores * scale, float("-inf"))
        higher = gl.maximum(highest, gl.max(scores, 1))
        shift = gl.where(higher == float("-inf"), 0.0, higher)
        p = gl.exp2(scores - shift[:, None])
        decay = gl.exp2(highest - shift)
        highest = higher
        total = total * decay + gl.sum(p, 1)
        p_shared.store(p.to(gl.bfloat16))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, MANY_ACC), assert_trivial=True)[:, None]
        hopper.fence_async_shared()
        gl.thread_barrier()
        acc = hopper.warpgroup_mma(p_shared, k, acc, is_async=True)
        if FP8:
            _store_fp8_rows(parts, k_shared.index(1 - buffer), k_rope_shared.index(1 - buffer))
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        buffer = 1 - buffer

    norm = 1.0 / gl.where(total == 0.0, 1.0, total)
    acc = acc * gl.convert_layout(norm, gl.SliceLayout(1, MANY_ACC), assert_trivial=True)[:, None]
    offs_h = head_block * MANY_HEADS + gl.arange(0, MANY_HEADS, layout=gl.SliceLayout(1, MANY_ACC))
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(0, MANY_ACC))
    out_rows = out_ptr + t * stride_out_t + split * RANK + offs_h.to(gl.int64) * stride_out_h
    gl.store(out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=(offs_h < heads)[:, None])
    offs_h = head_block * MANY_HEADS + gl.arange(0, MANY_HEADS, layout=gl.SliceLayout(1, MANY_SCORES))
    lse = gl.where(total == 0.0, float("-inf"), (highest + gl.log2(total)) * LN2)
    gl.store(lse_ptr + (t * heads + offs_h) * SPLITS + split, lse, mask=offs_h < heads)


def sparse_mla(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = q_latent_thc.shape
    fp8 = latent_cache.dtype is torch.uint8
    few = heads <= HEADS.value
    same = latent_cache.dtype is q_latent_thc.dtype
    if q_latent_thc.dtype is not torch.bfloat16 or not (fp8 or (same and not few)) or not _aligned(latent_cache):
        return portable.sparse_mla(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale, out=out, lse=lse)
    out, lse = portable.results(q_latent_thc, q_rope_thr, out, lse)
    num_keys = slots_tk.shape[1]
    _, processors = portable.chip(q_latent_thc.device)
    head_blocks = 1 if few else triton.cdiv(heads, MANY_HEADS.value)
    # Two programs of the few heads fit a multiprocessor, one of the many. Chunks of 128 against 64, B=8: 20.2, 22.6 us.
    chunk = portable.choose_chunk(tokens * head_blocks, num_keys, (2 if few else 1) * processors)
    chunk = max(chunk, 128) if few else chunk
    page_size = latent_cache.shape[1]

    def launch(rows: slice, part: torch.Tensor, part_lse: torch.Tensor, splits: int) -> None:
        arguments = (
            q_latent_thc[rows],
            q_rope_thr[rows],
            latent_cache,
            slots_tk[rows],
            part,
            part_lse,
            *q_latent_thc.stride()[:2],
            *q_rope_thr.stride()[:2],
            latent_cache.stride(0),
            slots_tk.stride(0),
            *part.stride()[:2],
            latent_cache.shape[0] * page_size,
            num_keys,
            chunk,
            heads,
        )
        grid = ((rows.stop - rows.start) * splits * head_blocks,)
        scan = max(256, portable.scan_width(chunk, num_keys))
        log2_scale = scale * portable.LOG2E
        if few:
            _few_heads_kernel[grid](
                *arguments, 0, log2_scale, SPLITS=splits, SCAN=scan, PAGE=page_size, num_warps=FEW_WARPS
            )
        else:
            _many_heads_kernel[grid](
                *arguments,
                log2_scale,
                SPLITS=splits,
                HEAD_BLOCKS=head_blocks,
                SCAN=scan,
                FP8=fp8,
                PAGE=page_size,
                num_warps=MANY_WARPS,
            )

    portable.in_chunks(launch, out, lse, triton.cdiv(num_keys, chunk))
    return out, lse


def _aligned(latent_cache: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as asynchronous copies and wide loads need."""
    return latent_cache.data_ptr() % 16 == 0 and latent_cache.stride(0) * latent_cache.element_size() % 16 == 0


def aot_cases(target: Target) -> list[AotCase]:
    """Every configuration that can be chosen on sm90, at the sizes of DeepSeek-V3.2."""
    if target.name != "sm90":
        return []
    found = []
    for splits, chunk in ((1, 2048), (2, 1024), (4, 512), (8, 256), (16, 128), (32, 64)):
        if chunk >= 128:
            found.append(_aot_case("few", True, 16, splits, chunk))
        for fp8 in (False, True):
            for heads in (64, 128):
                found.append(_aot_case("many", fp8, heads, splits, chunk))
    return found


def _aot_case(kind: str, fp8: bool, heads: int, splits: int, chunk: int) -> AotCase:
    few = kind == "few"
    kernel = _few_heads_kernel if few else _many_heads_kernel
    signature = {
        "q_latent_ptr": "*bf16:16",
        "q_rope_ptr": "*bf16:16",
        "cache_ptr": "*u8:16" if fp8 else "*bf16:16",
        "index_ptr": "*i32:16",
        "out_ptr": "*bf16:16" if splits == 1 else "*fp32:16",
        "lse_ptr": "*fp32:16",
        **{name: "i32:16" for name in kernel.arg_names if name.startswith("stride_")},
        "num_slots": "i32",
        "num_keys": "i32",
        "chunk": "i32",
        "heads": "i32",
        "scale": "fp32",
    }
    constexprs = {"SPLITS": splits, "SCAN": max(256, chunk), "PAGE": PAGE_SIZE}
    if few:
        signature["zero"] = "i32"
    else:
        constexprs |= {"HEAD_BLOCKS": triton.cdiv(heads, MANY_HEADS.value), "FP8": fp8}
    name = f"{kind}-heads-{'fp8' if fp8 else 'bf16'}-{heads}heads-{splits}splits"
    return AotCase(
        name,
        kernel,
        signature,
        constexprs,
        FEW_WARPS if few else MANY_WARPS,
        spill_bytes=0 if few else 16,
        spill_reason="" if few else "two addresses, reloaded once a step of 64 keys",
    )
