"""More than 16 heads on sm90: 64 of them are the rows of both products.

Three groups of warps. One fetches the rows of 64 keys at a time into two buffers. One computes the scores, the softmax
and the left half of the result, one the right half.
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ....device.sm90 import (
    FP8_BYTES,
    FP8_ROPE,
    FP8_SCALES,
    KEYS,
    NEWER,
    RANK,
    ROPE,
    TILE,
    TILES,
    UNIT,
    barrier,
    barriers,
    count_steps,
    load_query,
    load_slots,
    log_sum_exp,
    prologue,
    raise_max,
    reciprocal,
    units_of,
)

HEADS = gl.constexpr(64)
HALF = gl.constexpr(RANK.value // 2)
RIGHT_REGISTERS = gl.constexpr(160)
FETCH_WARPS = gl.constexpr(4)
FETCH_REGISTERS = gl.constexpr(96)
WIDEN_WARPS = gl.constexpr(8)
"""Widening codes takes more warps than copying."""
WIDEN_REGISTERS = gl.constexpr(64 if NEWER else 80)
"""With 80 the warps of the left half spill, Triton 3.7 8 bytes, 3.8 160."""

SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=ACC.value, k_width=2))
HEAD_ROWS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
ACC_ROWS = gl.constexpr(gl.SliceLayout(1, ACC.value))
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
VECTOR_SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
# 16 bytes a thread, 128 of each of four rows a warp.
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# Four neighbouring lanes share a row of codes, each with 16 next to each other.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
# The same rows of a thread, for the rope key.
ROPE_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)


@gluon.jit
def _copy(step, units, cache_ptr, buffers):
    """Start copying the rows of one step, bfloat16, into its buffer."""
    k_shared, rope_shared, full, empty = buffers
    buffer = step % 2
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(0, ROWS))
    offs_r = RANK + gl.arange(0, ROPE, layout=gl.SliceLayout(0, ROWS))
    rows = (cache_ptr + units * UNIT)[:, None]
    present = (units >= 0)[:, None]
    mbarrier.wait(empty.index(buffer), (step // 2 + 1) % 2)
    hopper.async_copy.async_copy_global_to_shared(rope_shared.index(buffer), rows + offs_r[None, :], mask=present)
    hopper.async_copy.async_copy_global_to_shared(k_shared.index(buffer), rows + offs_d[None, :], mask=present)
    hopper.async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)


@gluon.jit
def _fetch(cache_ptr, keys, stride_page, buffers, SCAN: gl.constexpr, PAGE: gl.constexpr, PAGED: gl.constexpr):
    """The warps that copy rows of bfloat16; the slots of a step are loaded a step ahead."""
    _copy(0, units_of(0, keys, stride_page, RANK + ROPE, PAGE, PAGED, ROWS), cache_ptr, buffers)
    units = units_of(1, keys, stride_page, RANK + ROPE, PAGE, PAGED, ROWS)
    for step in range(1, count_steps(keys, SCAN, PAGED)):
        following = units_of(step + 1, keys, stride_page, RANK + ROPE, PAGE, PAGED, ROWS)
        _copy(step, units, cache_ptr, buffers)
        units = following


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
    return gl.join(gl.join(a, c), gl.join(b, d)).reshape(KEYS, TILE)


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
def _load_tile(cache_ptr, units, j: gl.constexpr):
    """Start loading one tile of 64 rows: (codes, scales)."""
    rows = cache_ptr + units * UNIT
    offs_w = gl.arange(0, TILE // 4, layout=gl.SliceLayout(0, WORDS))
    words_ptr = (rows + j * TILE).to(gl.pointer_type(gl.int32))
    scale_ptr = (rows + FP8_SCALES + 4 * j).to(gl.pointer_type(gl.float32))
    words = gl.load(words_ptr[:, None] + offs_w[None, :], mask=(units >= 0)[:, None], other=0)
    return words, gl.load(scale_ptr, mask=units >= 0, other=0.0)


@gluon.jit
def _fetch_fp8(cache_ptr, keys, stride_page, buffers, SCAN: gl.constexpr, PAGE: gl.constexpr, PAGED: gl.constexpr):
    """The warps that load rows of codes and store them widened; a tile is loaded a step before it is stored."""
    k_shared, rope_shared, full, empty = buffers
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, ROPE_WORDS))
    units = units_of(0, keys, stride_page, FP8_BYTES, PAGE, PAGED, WORDS)
    tiles = ()
    for j in gl.static_range(TILES):
        tiles += (_load_tile(cache_ptr, units, j),)
    for step in range(count_steps(keys, SCAN, PAGED)):
        buffer = step % 2
        following = units_of(step + 1, keys, stride_page, FP8_BYTES, PAGE, PAGED, WORDS)
        mbarrier.wait(empty.index(buffer), (step // 2 + 1) % 2)
        units = gl.convert_layout(units, gl.SliceLayout(1, ROPE_WORDS), assert_trivial=True)
        rope_rows = (cache_ptr + units * UNIT + FP8_ROPE).to(gl.pointer_type(gl.bfloat16))
        hopper.async_copy.async_copy_global_to_shared(
            rope_shared.index(buffer), rope_rows[:, None] + offs_r[None, :], mask=(units >= 0)[:, None]
        )
        units = following
        loaded = ()
        for j in gl.static_range(TILES):
            words, scale = tiles[j]
            k_shared.index(buffer).slice(j * TILE, TILE, dim=1).store(_widen(words, _scale_pair(scale)[:, None]))
            loaded += (_load_tile(cache_ptr, units, j),)
        tiles = loaded
        hopper.fence_async_shared()
        hopper.async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)
        barrier()
        mbarrier.arrive(full.index(buffer), count=1)


@gluon.jit
def _score(q_shared, q_rope_shared, k, k_rope):
    nothing = gl.zeros([HEADS, KEYS], gl.float32, layout=SCORES)
    scores = hopper.warpgroup_mma(q_rope_shared, k_rope.permute((1, 0)), nothing, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(q_shared, k.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _softmax(scores, visible, running_max, running_sum):
    """One step of the softmax: (weights, new maximum and sum, factor of the results so far)."""
    scores = gl.where(visible[None, :], scores, float("-inf"))
    new_max, shift = raise_max(running_max, gl.max(scores, 1))
    p = gl.exp2(scores - shift[:, None])
    decay = gl.exp2(running_max - shift)
    return p.to(gl.bfloat16), new_max, running_sum * decay + gl.sum(p, 1), decay


@gluon.jit
def _publish(p, decay, p_shared, decay_shared, p_full):
    p_shared.store(p)
    decay_shared.store(decay)
    hopper.fence_async_shared()
    barrier()
    mbarrier.arrive(p_full, count=1)


@gluon.jit
def _store_half(out_ptr, acc, norm, head_block, heads, stride_out_h, FIRST: gl.constexpr):
    offs_h = head_block * HEADS + gl.arange(0, HEADS, layout=ACC_ROWS)
    offs_d = FIRST + gl.arange(0, HALF, layout=gl.SliceLayout(0, ACC))
    ptrs = (out_ptr + offs_h.to(gl.int64) * stride_out_h)[:, None] + offs_d[None, :]
    gl.store(ptrs, (acc * norm[:, None]).to(out_ptr.dtype.element_ty), mask=(offs_h < heads)[:, None])


@gluon.jit
def _attend_left(
    q_latent_ptr,
    q_rope_ptr,
    keys,
    out_ptr,
    lse_ptr,
    head_block,
    heads,
    stride_q_latent_h,
    stride_q_rope_h,
    stride_out_h,
    stride_lse_h,
    scale,
    q_shared,
    q_rope_shared,
    p_shared,
    decay_shared,
    p_full,
    p_empty,
    buffers,
    zero,
    SCAN: gl.constexpr,
    PAGE: gl.constexpr,
    PAGED: gl.constexpr,
):
    """The warps of the scores, the softmax and latents 0 to 255."""
    k_shared, rope_shared, full, empty = buffers
    first = head_block * HEADS
    q_shared.index(0).store(load_query(q_latent_ptr, stride_q_latent_h, first, heads, HEADS, RANK, ROWS))
    q_rope_shared.index(0).store(load_query(q_rope_ptr, stride_q_rope_h, first, heads, HEADS, ROPE, ROWS))

    # acc [HEADS, HALF]; running_max, running_sum [HEADS]
    acc = gl.zeros([HEADS, HALF], gl.float32, layout=ACC)
    running_sum = gl.zeros([HEADS], gl.float32, layout=HEAD_ROWS)
    running_max = gl.full([HEADS], float("-inf"), gl.float32, layout=HEAD_ROWS)
    steps = count_steps(keys, SCAN, PAGED)
    base = zero
    for step in range(steps):
        # Always zero, but not known to be: the operands' descriptors are then computed here from one register. As
        # constants of the loop they would fill a hundred and spill.
        base = base * zero
        buffer = step % 2
        visible = load_slots(keys, step, PAGE, PAGED, gl.SliceLayout(0, SCORES)) >= 0
        mbarrier.wait(full.index(buffer), (step // 2) % 2)
        hopper.fence_async_shared()
        barrier()
        # scores [HEADS, KEYS] = q_rope k_rope^T + q k^T
        scores = _score(
            q_shared.index(base), q_rope_shared.index(base), k_shared.index(buffer), rope_shared.index(buffer)
        )
        scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
        p, running_max, running_sum, decay = _softmax(scores * scale, visible, running_max, running_sum)
        # The other half's warps take the weights [HEADS, KEYS] and the decay from shared memory.
        mbarrier.wait(p_empty, (step + 1) % 2)
        _publish(p, decay, p_shared, decay_shared, p_full)
        # acc [HEADS, HALF] = decay * acc + p k
        acc = acc * gl.convert_layout(decay, ACC_ROWS, assert_trivial=True)[:, None]
        weights = gl.convert_layout(p, WEIGHTS, assert_trivial=True)
        acc = hopper.warpgroup_mma(weights, k_shared.index(buffer).slice(0, HALF, dim=1), acc, is_async=True)
        acc, weights = hopper.warpgroup_mma_wait(0, deps=(acc, weights))
        barrier()
        mbarrier.arrive(empty.index(buffer), count=1)
    norm = reciprocal(running_sum)
    # At the end the place of the decay holds what the result is multiplied with.
    mbarrier.wait(p_empty, (steps - 1) % 2)
    decay_shared.store(norm)
    barrier()
    mbarrier.arrive(p_full, count=1)
    _store_half(
        out_ptr, acc, gl.convert_layout(norm, ACC_ROWS, assert_trivial=True), head_block, heads, stride_out_h, 0
    )
    offs_h = head_block * HEADS + gl.arange(0, HEADS, layout=HEAD_ROWS)
    lse = log_sum_exp(running_max, running_sum)
    gl.store(lse_ptr + offs_h * stride_lse_h, lse, mask=offs_h < heads)


@gluon.jit
def _attend_right(
    out_ptr,
    keys,
    head_block,
    heads,
    stride_out_h,
    p_shared,
    decay_shared,
    p_full,
    p_empty,
    buffers,
    SCAN: gl.constexpr,
    PAGED: gl.constexpr,
):
    """The warps of latents 256 to 511."""
    k_shared, _, full, empty = buffers
    steps = count_steps(keys, SCAN, PAGED)
    acc = gl.zeros([HEADS, HALF], gl.float32, layout=ACC)
    for step in range(steps):
        buffer = step % 2
        mbarrier.wait(full.index(buffer), (step // 2) % 2)
        mbarrier.wait(p_full, step % 2)
        hopper.fence_async_shared()
        acc = acc * decay_shared.load(ACC_ROWS)[:, None]
        acc = hopper.warpgroup_mma(p_shared, k_shared.index(buffer).slice(HALF, HALF, dim=1), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        barrier()
        mbarrier.arrive(p_empty, count=1)
        mbarrier.arrive(empty.index(buffer), count=1)
    mbarrier.wait(p_full, steps % 2)
    _store_half(out_ptr, acc, decay_shared.load(ACC_ROWS), head_block, heads, stride_out_h, HALF)


@gluon.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads", "table_pages", "zero"])
def many_heads_kernel(
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
    zero,
    scale,
    SPLITS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    SCAN: gl.constexpr,
    FP8: gl.constexpr,
    PAGE: gl.constexpr,
    PAGED: gl.constexpr,
):
    t, split, head_block, keys = prologue(
        index_ptr,
        seq_ptr,
        visible_ptr,
        stride_index,
        num_slots,
        num_keys,
        chunk,
        table_pages,
        SPLITS,
        HEAD_BLOCKS,
        PAGE,
        PAGED,
    )

    q_shared = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, RANK], SHARED)
    q_rope_shared = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, ROPE], SHARED)
    k_shared = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, RANK], SHARED)
    rope_shared = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], SHARED)
    decay_shared = gl.allocate_shared_memory(gl.float32, [HEADS], VECTOR_SHARED)
    full, empty = barriers(2, 32 * WIDEN_WARPS + 1 if FP8 else 32 * FETCH_WARPS, 2)
    p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)
    hopper.fence_async_shared()
    barrier()
    out_ptr += t * stride_out_t + split * RANK
    buffers = (k_shared, rope_shared, full, empty)
    gl.warp_specialize(
        [
            (
                _attend_left,
                (
                    q_latent_ptr + t * stride_q_latent_t,
                    q_rope_ptr + t * stride_q_rope_t,
                    keys,
                    out_ptr,
                    lse_ptr + t * heads * SPLITS + split,
                    head_block,
                    heads,
                    stride_q_latent_h,
                    stride_q_rope_h,
                    stride_out_h,
                    SPLITS,
                    scale,
                    q_shared,
                    q_rope_shared,
                    p_shared,
                    decay_shared,
                    p_full,
                    p_empty,
                    buffers,
                    zero,
                    SCAN,
                    PAGE,
                    PAGED,
                ),
            ),
            (
                _attend_right,
                (
                    out_ptr,
                    keys,
                    head_block,
                    heads,
                    stride_out_h,
                    p_shared,
                    decay_shared,
                    p_full,
                    p_empty,
                    buffers,
                    SCAN,
                    PAGED,
                ),
            ),
            (_fetch_fp8 if FP8 else _fetch, (cache_ptr, keys, stride_page, buffers, SCAN, PAGE, PAGED)),
        ],
        [4, WIDEN_WARPS if FP8 else FETCH_WARPS],
        [RIGHT_REGISTERS, WIDEN_REGISTERS if FP8 else FETCH_REGISTERS],
    )
