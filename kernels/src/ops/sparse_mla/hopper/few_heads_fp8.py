"""Up to 16 heads over an fp8 cache on sm90: the keys are the rows of both products, so that nothing is padded.

S^T = K Q^T has 64 keys as rows and the heads as 16 columns, O^T = V^T P the latents. Four warps only copy rows, as they
are in the cache, into two buffers; four compute, and read each row twice: as it lies for the scores, transposed for the
result. A register read as 16-bit pairs of codes holds, widened, just what a wgmma takes: in the first product latents
of one key, in the second, after its bytes are sorted, one latent of two keys. So nothing is shuffled and no widened
copy is written.

Codes are exact in float16, and so are queries once each head is brought near the top of its range. Scales stay out of
the codes: they multiply the scores of their tile, and the weights, in units of a power of two that grows with them.
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own.
# mypy: disable-error-code="assignment, misc"

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
    load_slots,
    log_sum_exp,
    prologue,
    raise_max,
    reciprocal,
    units_of,
)

HEADS = gl.constexpr(16)
PAIRS = gl.constexpr(TILE.value // 2)
TOP = gl.constexpr(2.0**15)
"""Near the largest float16: what queries and weights are brought below."""
FETCH_WARPS = gl.constexpr(4)
"""They only copy; eight would leave the others too few registers."""
FETCH_REGISTERS = gl.constexpr(40 if NEWER else 48)
"""With 48 Triton 3.8 spills 56 bytes instead of 16."""

# The rows of ACC, each with its four scales.
SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
# What every thread needs of a value a warp: all four, for the columns of ACC or for the four tiles.
FOUR_WARPS_HEADS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [1, 0], [2, 0]],
        lane_bases=[[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [0, 0]],
        block_bases=[],
        shape=[4, 16],
    )
)
FOUR_WARPS_TILES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [2, 0]],
        lane_bases=[[0, 0], [0, 0], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [0, 0]],
        block_bases=[],
        shape=[4, 4],
    )
)
# 16 bytes a thread, 128 of each of four rows a warp.
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [FETCH_WARPS.value, 1], [1, 0]))
SCALE_ROWS = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [FETCH_WARPS.value, 1], [1, 0]))
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16]))
FRAGMENT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=ACC.value, k_width=2))
Q_BLOCKED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
WGMMA_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
P_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))
CODES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))
SCALES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]))


@gluon.jit
def _widen(pairs, ACROSS: gl.constexpr):
    """Pairs of e4m3fn codes as int16 -> two tensors of float16.

    ACROSS: the even codes and the odd codes. Otherwise of every two pairs the first and the second, unsorted.
    """
    if ACROSS:
        first, second = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        first, second = gl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    return first, second


@gluon.jit
def _copy(step, cache_ptr, keys, stride_page, buffers, PAGE: gl.constexpr, PAGED: gl.constexpr):
    """Start copying the rows of one step, 656 bytes each, into its buffer."""
    codes_shared, scales_shared, rope_shared, full, empty = buffers
    buffer = step % 2
    units = units_of(step, keys, stride_page, FP8_BYTES, PAGE, PAGED, ROWS)
    scale_units = units_of(step, keys, stride_page, FP8_BYTES, PAGE, PAGED, SCALE_ROWS)
    rows = cache_ptr + units * UNIT
    present = (units >= 0)[:, None]
    mbarrier.wait(empty.index(buffer), (step // 2 + 1) % 2)
    # codes [KEYS, RANK / 2], two of them an int16; rope key [KEYS, ROPE]; scales [KEYS, TILES]
    offs_p = gl.arange(0, RANK // 2, layout=gl.SliceLayout(0, ROWS))
    source = rows.to(gl.pointer_type(gl.int16))[:, None] + offs_p[None, :]
    hopper.async_copy.async_copy_global_to_shared(codes_shared.index(buffer), source, mask=present)
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, ROWS))
    source = (rows + FP8_ROPE).to(gl.pointer_type(gl.bfloat16))[:, None] + offs_r[None, :]
    hopper.async_copy.async_copy_global_to_shared(rope_shared.index(buffer), source, mask=present)
    offs_s = gl.arange(0, TILES, layout=gl.SliceLayout(0, SCALE_ROWS))
    source = (cache_ptr + scale_units * UNIT + FP8_SCALES).to(gl.pointer_type(gl.float32))[:, None] + offs_s[None, :]
    hopper.async_copy.async_copy_global_to_shared(scales_shared.index(buffer), source, mask=(scale_units >= 0)[:, None])
    hopper.async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)


@gluon.jit
def _fetch(cache_ptr, keys, stride_page, buffers, SCAN: gl.constexpr, PAGE: gl.constexpr, PAGED: gl.constexpr):
    """The warps that copy rows."""
    _copy(0, cache_ptr, keys, stride_page, buffers, PAGE, PAGED)
    for step in range(1, count_steps(keys, SCAN, PAGED)):
        _copy(step, cache_ptr, keys, stride_page, buffers, PAGE, PAGED)


@gluon.jit
def _power_of_two(x):
    """The smallest power of two above x >= 0, from the exponent's bits; at least 2^-100 and at most 2^100."""
    exponent = gl.minimum(gl.maximum((x.to(gl.int32, bitcast=True) >> 23) + 1, 27), 227)
    return (exponent << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _item(x, j: gl.constexpr, LAYOUT: gl.constexpr):
    """Element j of four that every thread holds."""
    return gl.max(gl.where(gl.arange(0, TILES, layout=LAYOUT) == j, x, 0.0), 0)


@gluon.jit
def _columns(x):
    """The four columns of [64, 4]."""
    even, odd = gl.split(x.reshape(KEYS, 2, 2))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return a, b, c, d


@gluon.jit
def _scores(first, second, q_first, q_second, j: gl.constexpr):
    nothing = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
    q = q_first.slice(j * PAIRS, PAIRS, dim=1).permute((1, 0))
    part = hopper.warpgroup_mma(first, q, nothing, use_acc=False, is_async=True)
    q = q_second.slice(j * PAIRS, PAIRS, dim=1).permute((1, 0))
    return hopper.warpgroup_mma(second, q, part, is_async=True)


@gluon.jit
def _values(even, odd, weights, acc_even, acc_odd):
    first = hopper.warpgroup_mma(even, weights, acc_even, is_async=True)
    second = hopper.warpgroup_mma(odd, weights, acc_odd, is_async=True)
    return first, second


@gluon.jit
def _score_step(codes, rope_shared, scales_shared, buffer, q_first, q_second, q_rope_shared, largest_shared):
    """(scores [KEYS, HEADS] of a step, not yet scaled, the scales of its keys' tiles)."""
    KEY_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    nothing = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
    scores = hopper.warpgroup_mma(
        rope_shared.index(buffer), q_rope_shared.permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    scale_rows = scales_shared.index(buffer).load(SCALES)
    scales = _columns(scale_rows)
    largest_shared.store(gl.max(scale_rows.reshape(4, 16, TILES), 1))
    # The operands of a tile live until its products are done, while those of the next are widened.
    parts = ()
    first, second = _widen(codes.slice(0, PAIRS, dim=1).load(FRAGMENT), False)
    part = _scores(first, second, q_first, q_second, 0)
    for j in gl.static_range(1, TILES):
        next_first, next_second = _widen(codes.slice(j * PAIRS, PAIRS, dim=1).load(FRAGMENT), False)
        next_part = _scores(next_first, next_second, q_first, q_second, j)
        part, first, second = hopper.warpgroup_mma_wait(2, deps=(part, first, second))
        parts += (part,)
        part, first, second = next_part, next_first, next_second
    part, scores, first, second = hopper.warpgroup_mma_wait(0, deps=(part, scores, first, second))
    parts += (part,)
    for j in gl.static_range(TILES):
        scores += parts[j] * gl.convert_layout(scales[j], KEY_ROWS, assert_trivial=True)[:, None]
    return scores, scales


@gluon.jit
def _store_weights(p, decay, scales, bound0, bound1, bound2, bound3, largest_shared, p_shared):
    """(decays of the accumulators, new bounds): the weights times a tile's scales, near the top of float16."""
    KEY_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    ITEMS: gl.constexpr = gl.SliceLayout(0, FOUR_WARPS_TILES)
    largest = gl.max(largest_shared.load(FOUR_WARPS_TILES), 0)
    higher0 = gl.maximum(bound0, _power_of_two(_item(largest, 0, ITEMS)))
    higher1 = gl.maximum(bound1, _power_of_two(_item(largest, 1, ITEMS)))
    higher2 = gl.maximum(bound2, _power_of_two(_item(largest, 2, ITEMS)))
    higher3 = gl.maximum(bound3, _power_of_two(_item(largest, 3, ITEMS)))
    p0 = p * (gl.convert_layout(scales[0], KEY_ROWS, assert_trivial=True) * (TOP / higher0))[:, None]
    p1 = p * (gl.convert_layout(scales[1], KEY_ROWS, assert_trivial=True) * (TOP / higher1))[:, None]
    p2 = p * (gl.convert_layout(scales[2], KEY_ROWS, assert_trivial=True) * (TOP / higher2))[:, None]
    p3 = p * (gl.convert_layout(scales[3], KEY_ROWS, assert_trivial=True) * (TOP / higher3))[:, None]
    p_shared.index(0).store(p0.to(gl.float16))
    p_shared.index(1).store(p1.to(gl.float16))
    p_shared.index(2).store(p2.to(gl.float16))
    p_shared.index(3).store(p3.to(gl.float16))
    decays = (
        decay * (bound0 / higher0),
        decay * (bound1 / higher1),
        decay * (bound2 / higher2),
        decay * (bound3 / higher3),
    )
    return decays, higher0, higher1, higher2, higher3


@gluon.jit
def _add_values(codes, accs, decays, p_shared, base):
    """The accumulators with a step's values; a tile is widened while the products of the one before run."""
    updated = ()
    even, odd = _widen(codes.slice(0, PAIRS, dim=1).permute((1, 0)).load(FRAGMENT), True)
    first, second = _values(even, odd, p_shared.index(base), accs[0] * decays[0][None, :], accs[1] * decays[0][None, :])
    for j in gl.static_range(1, TILES):
        next_even, next_odd = _widen(codes.slice(j * PAIRS, PAIRS, dim=1).permute((1, 0)).load(FRAGMENT), True)
        next_first, next_second = _values(
            next_even,
            next_odd,
            p_shared.index(base + j),
            accs[2 * j] * decays[j][None, :],
            accs[2 * j + 1] * decays[j][None, :],
        )
        first, second, even, odd = hopper.warpgroup_mma_wait(2, deps=(first, second, even, odd))
        updated += (first, second)
        first, second, even, odd = next_first, next_second, next_even, next_odd
    first, second, even, odd = hopper.warpgroup_mma_wait(0, deps=(first, second, even, odd))
    updated += (first, second)
    return updated


@gluon.jit
def _store_query(q_latent_ptr, q_rope_ptr, stride_q_latent_h, stride_q_rope_h, heads, scale, q_shared, q_rope_shared):
    """A token's query into shared memory, each head near the top of float16; returns the scale of its scores."""
    # float16 then holds every bfloat16 down to 2^-29 of its head's largest.
    offs_h = gl.arange(0, HEADS, layout=gl.SliceLayout(1, Q_BLOCKED))
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(0, Q_BLOCKED))
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, Q_BLOCKED))
    q_rows = q_latent_ptr + offs_h.to(gl.int64) * stride_q_latent_h
    q = gl.load(q_rows[:, None] + offs_d[None, :], mask=(offs_h < heads)[:, None], other=0.0).to(gl.float32)
    q_rows = q_rope_ptr + offs_h.to(gl.int64) * stride_q_rope_h
    q_rope = gl.load(q_rows[:, None] + offs_r[None, :], mask=(offs_h < heads)[:, None], other=0.0).to(gl.float32)
    size = _power_of_two(gl.maximum(gl.max(gl.abs(q), 1), gl.max(gl.abs(q_rope), 1)))
    q = (q * (TOP / size)[:, None]).to(gl.float16)
    # Of every four latents one product takes the first two, another the last two.
    q_even, q_odd = gl.split(q.reshape(HEADS, RANK // 4, 2, 2).permute(0, 1, 3, 2).reshape(HEADS, RANK // 2, 2))
    q_shared.index(0).store(q_even)
    q_shared.index(1).store(q_odd)
    q_rope_shared.store((q_rope * (TOP / size)[:, None]).to(gl.bfloat16))
    return gl.convert_layout(size * (scale / TOP), gl.SliceLayout(0, ACC))


@gluon.jit
def _store_result(out_ptr, lse_ptr, accs, running_max, running_sum, bounds, heads, stride_out_h, SPLITS: gl.constexpr):
    """The result and its log-sum-exp; even and odd latents, which two accumulators hold, side by side."""
    # running_sum [KEYS, HEADS] -> sum_h [HEADS]
    sum_h = gl.sum(running_sum, 0)
    norm = reciprocal(sum_h)
    offs_h = gl.arange(0, HEADS, layout=gl.SliceLayout(0, ACC))
    offs_p = gl.arange(0, PAIRS, layout=gl.SliceLayout(1, ACC))
    out_rows = out_ptr + offs_h.to(gl.int64) * stride_out_h
    mask_h = (offs_h < heads)[None, :] & (offs_p >= 0)[:, None]
    for j in gl.static_range(TILES):
        tile_norm = (norm * (bounds[j] / TOP))[None, :]
        both = gl.join(accs[2 * j] * tile_norm, accs[2 * j + 1] * tile_norm).to(out_ptr.dtype.element_ty)
        even_ptr = out_rows[None, :] + (j * TILE + 2 * offs_p)[:, None]
        gl.store(gl.join(even_ptr, even_ptr + 1), both, mask=gl.join(mask_h, mask_h))
    lse = log_sum_exp(running_max, sum_h)
    gl.store(lse_ptr + offs_h * SPLITS, lse, mask=offs_h < heads)


@gluon.jit
def _attend(
    q_latent_ptr,
    q_rope_ptr,
    keys,
    out_ptr,
    lse_ptr,
    stride_q_latent_h,
    stride_q_rope_h,
    stride_out_h,
    heads,
    zero,
    scale,
    q_shared,
    q_rope_shared,
    p_shared,
    max_shared,
    largest_shared,
    buffers,
    SPLITS: gl.constexpr,
    SCAN: gl.constexpr,
    PAGE: gl.constexpr,
    PAGED: gl.constexpr,
):
    """The warps that compute."""
    codes_shared, scales_shared, rope_shared, full, empty = buffers
    scale_h = _store_query(
        q_latent_ptr, q_rope_ptr, stride_q_latent_h, stride_q_rope_h, heads, scale, q_shared, q_rope_shared
    )
    hopper.fence_async_shared()
    barrier()

    # acc [64 pairs of latents, 16 heads], once for the even and once for the odd latents of a tile; running_max [16];
    # the sum of the weights stays spread over the keys of a step
    accs = ()
    for _ in gl.static_range(2 * TILES):
        accs += (gl.zeros([PAIRS, HEADS], gl.float32, layout=ACC),)
    running_sum = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
    running_max = gl.full([HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(0, ACC))
    bound0 = 2.0**-100
    bound1 = 2.0**-100
    bound2 = 2.0**-100
    bound3 = 2.0**-100
    KEY_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    base = zero
    for step in range(count_steps(keys, SCAN, PAGED)):
        # Always zero, but not known to be: the operands' descriptors are then computed here from one register. As
        # constants of the loop they would fill a hundred and spill.
        base = base * zero
        buffer = step % 2
        present = load_slots(keys, step, PAGE, PAGED, KEY_ROWS) >= 0
        mbarrier.wait(full.index(buffer), step // 2 % 2)
        hopper.fence_async_shared()
        codes = codes_shared.index(buffer)
        q_first = q_shared.index(base)
        q_second = q_shared.index(base + 1)
        scores, scales = _score_step(
            codes, rope_shared, scales_shared, buffer, q_first, q_second, q_rope_shared, largest_shared
        )
        scores = gl.where(present[:, None], scores * scale_h[None, :], float("-inf"))
        # Each warp has 16 of the keys; the maximum over all of them goes through shared memory.
        max_shared.store(gl.max(scores.reshape(4, 16, HEADS), 1))
        barrier()
        new_max = gl.convert_layout(
            gl.max(max_shared.load(FOUR_WARPS_HEADS), 0), gl.SliceLayout(0, ACC), assert_trivial=True
        )
        new_max, shift = raise_max(running_max, new_max)
        p = gl.exp2(scores - shift[None, :])
        decay = gl.exp2(running_max - shift)
        running_max = new_max
        running_sum = running_sum * decay[None, :] + p
        decays, bound0, bound1, bound2, bound3 = _store_weights(
            p, decay, scales, bound0, bound1, bound2, bound3, largest_shared, p_shared
        )
        hopper.fence_async_shared()
        barrier()

        accs = _add_values(codes, accs, decays, p_shared, base)
        # All warps have read the codes: their buffer is free.
        barrier()
        mbarrier.arrive(empty.index(buffer), count=1)

    _store_result(
        out_ptr, lse_ptr, accs, running_max, running_sum, (bound0, bound1, bound2, bound3), heads, stride_out_h, SPLITS
    )


@gluon.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads", "table_pages", "zero"])
def few_heads_fp8_kernel(
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
    SCAN: gl.constexpr,
    PAGE: gl.constexpr,
    PAGED: gl.constexpr,
):
    t, split, _, keys = prologue(
        index_ptr, seq_ptr, visible_ptr, stride_index, num_slots, num_keys, chunk, table_pages, SPLITS, 1, PAGE, PAGED
    )
    codes_shared = gl.allocate_shared_memory(gl.int16, [2, KEYS, RANK // 2], CODES_SHARED)
    rope_shared = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], WGMMA_SHARED)
    scales_shared = gl.allocate_shared_memory(gl.float32, [2, KEYS, TILES], SCALES_SHARED)
    q_shared = gl.allocate_shared_memory(gl.float16, [2, HEADS, RANK // 2], WGMMA_SHARED)
    q_rope_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], WGMMA_SHARED)
    p_shared = gl.allocate_shared_memory(gl.float16, [TILES, KEYS, HEADS], P_SHARED)
    max_shared = gl.allocate_shared_memory(gl.float32, [4, HEADS], SCALES_SHARED)
    largest_shared = gl.allocate_shared_memory(gl.float32, [4, TILES], SCALES_SHARED)
    full, empty = barriers(2, 32 * FETCH_WARPS, 1)
    hopper.fence_async_shared()
    barrier()
    buffers = (codes_shared, scales_shared, rope_shared, full, empty)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q_latent_ptr + t * stride_q_latent_t,
                    q_rope_ptr + t * stride_q_rope_t,
                    keys,
                    out_ptr + t * stride_out_t + split * RANK,
                    lse_ptr + t * heads * SPLITS + split,
                    stride_q_latent_h,
                    stride_q_rope_h,
                    stride_out_h,
                    heads,
                    zero,
                    scale,
                    q_shared,
                    q_rope_shared,
                    p_shared,
                    max_shared,
                    largest_shared,
                    buffers,
                    SPLITS,
                    SCAN,
                    PAGE,
                    PAGED,
                ),
            ),
            (_fetch, (cache_ptr, keys, stride_page, buffers, SCAN, PAGE, PAGED)),
        ],
        [FETCH_WARPS],
        [FETCH_REGISTERS],
    )
