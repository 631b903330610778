"""Up to 16 heads over a bfloat16 cache on sm90: the keys are the rows of both products, so that nothing is padded.

S^T = K Q^T has 64 keys as rows and the heads as 16 columns, O^T = V^T P the latents. Four warps only copy rows into
shared memory, where both products of four others read them. Two programs share a multiprocessor, so there is room for
one step and a quarter: a ring of tiles, 128 latents of 64 keys each. The scores of a tile begin when it is there, and
the next one takes its place as soon as its part of the result is added.
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ....device.sm90 import (
    KEYS,
    RANK,
    ROPE,
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

HEADS = gl.constexpr(16)
TILE = gl.constexpr(128)
TILES = gl.constexpr(RANK.value // 128)
RING = gl.constexpr(5)
"""Tiles of latents in shared memory; the rope keys have a buffer of their own."""
FETCH_WARPS = gl.constexpr(4)
FETCH_REGISTERS = gl.constexpr(56)

ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16]))
Q_BLOCKED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
# 16 bytes a thread, 128 of each of four rows a warp.
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [FETCH_WARPS.value, 1], [1, 0]))
WGMMA_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
P_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))


@gluon.jit
def _softmax(scores, visible, running_max, running_sum):
    """One step of the softmax over rows: (weights, new maximum and sum, factor of the results so far)."""
    scores = gl.where(visible[:, None], scores, float("-inf"))
    new_max, shift = raise_max(running_max, gl.max(scores, 0))
    p = gl.exp2(scores - shift[None, :])
    decay = gl.exp2(running_max - shift)
    return p, new_max, running_sum * decay[None, :] + p, decay


@gluon.jit
def _copy(rows, present, tile_shared, full, COLUMNS: gl.constexpr):
    """Start copying 64 pieces of rows."""
    offs_d = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ROWS))
    hopper.async_copy.async_copy_global_to_shared(tile_shared, rows + offs_d[None, :], mask=present)
    hopper.async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _advance(tile, turn):
    """The next place of the ring, and whether it is taken for an odd time."""
    tile += 1
    turn = gl.where(tile == RING, 1 - turn, turn)
    return gl.where(tile == RING, 0, tile), turn


@gluon.jit
def _copy_step(step, tile, turn, units, cache_ptr, buffers):
    """Start copying the rows of one step, each part as soon as there is room; the ring's place behind them."""
    k_shared, rope_shared, full, empty = buffers
    rows = (cache_ptr + units * UNIT)[:, None]
    present = (units >= 0)[:, None]
    mbarrier.wait(empty.index(RING), (step + 1) % 2)
    _copy(rows + RANK, present, rope_shared, full.index(RING), ROPE)
    for j in gl.static_range(TILES):
        mbarrier.wait(empty.index(tile), 1 - turn)
        _copy(rows + j * TILE, present, k_shared.index(tile), full.index(tile), TILE)
        tile, turn = _advance(tile, turn)
    return tile, turn


@gluon.jit
def _fetch(cache_ptr, keys, stride_page, buffers, SCAN: gl.constexpr, PAGE: gl.constexpr, PAGED: gl.constexpr):
    """The warps that copy rows; the slots of a step are loaded a step ahead."""
    tile, turn = _copy_step(0, 0, 0, units_of(0, keys, stride_page, RANK + ROPE, PAGE, PAGED, ROWS), cache_ptr, buffers)
    units = units_of(1, keys, stride_page, RANK + ROPE, PAGE, PAGED, ROWS)
    for step in range(1, count_steps(keys, SCAN, PAGED)):
        following = units_of(step + 1, keys, stride_page, RANK + ROPE, PAGE, PAGED, ROWS)
        tile, turn = _copy_step(step, tile, turn, units, cache_ptr, buffers)
        units = following


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
    buffers,
    SPLITS: gl.constexpr,
    SCAN: gl.constexpr,
    PAGE: gl.constexpr,
    PAGED: gl.constexpr,
):
    """The warps that compute."""
    k_shared, rope_shared, full, empty = buffers
    q_shared.store(load_query(q_latent_ptr, stride_q_latent_h, 0, heads, HEADS, RANK, Q_BLOCKED))
    q_rope_shared.store(load_query(q_rope_ptr, stride_q_rope_h, 0, heads, HEADS, ROPE, Q_BLOCKED))
    hopper.fence_async_shared()
    barrier()

    # accs [TILE, HEADS], transposed, once for each tile; running_max [HEADS]; running_sum [KEYS, HEADS], whose sum over
    # the keys of a step is put off to the end: one reduction instead of one a step
    accs = ()
    for _ in gl.static_range(TILES):
        accs += (gl.zeros([TILE, HEADS], gl.float32, layout=ACC),)
    running_sum = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
    running_max = gl.full([HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(0, ACC))
    KEY_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    base = zero
    tile = 0
    turn = 0
    for step in range(count_steps(keys, SCAN, PAGED)):
        # Always zero, but not known to be: the operands' descriptors are then computed here from one register. As
        # constants of the loop they would fill a hundred and spill.
        base = base * zero
        present = load_slots(keys, step, PAGE, PAGED, KEY_ROWS) >= 0
        # scores [KEYS, HEADS] = k_rope q_rope^T + the sum over tiles of k q^T
        nothing = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
        mbarrier.wait(full.index(RING), step % 2)
        hopper.fence_async_shared()
        scores = hopper.warpgroup_mma(rope_shared, q_rope_shared.permute((1, 0)), nothing, use_acc=False, is_async=True)
        tiles = ()
        for j in gl.static_range(TILES):
            mbarrier.wait(full.index(tile), turn)
            hopper.fence_async_shared()
            q = q_shared.slice(j * TILE, TILE, dim=1).permute((1, 0))
            scores = hopper.warpgroup_mma(k_shared.index(tile), q, scores, is_async=True)
            tiles += (tile,)
            tile, turn = _advance(tile, turn)
        scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
        p, running_max, running_sum, decay = _softmax(scores * scale, present, running_max, running_sum)
        p_shared.index(0).store(p.to(gl.bfloat16))
        hopper.fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(RING), count=1)
        # All four products are under way before the first is waited for; a tile's place is free as soon as its is done.
        # accs [TILE, HEADS] = decay * accs + k^T p
        updated = ()
        for j in gl.static_range(TILES):
            k = k_shared.index(tiles[j]).permute((1, 0))
            updated += (hopper.warpgroup_mma(k, p_shared.index(base), accs[j] * decay[None, :], is_async=True),)
        accs = ()
        for j in gl.static_range(TILES):
            accs += (hopper.warpgroup_mma_wait(TILES - 1 - j, deps=(updated[j],)),)
            barrier()
            mbarrier.arrive(empty.index(tiles[j]), count=1)

    sum_h = gl.sum(running_sum, 0)
    norm = reciprocal(sum_h)
    offs_h = gl.arange(0, HEADS, layout=gl.SliceLayout(0, ACC))
    offs_d = gl.arange(0, TILE, layout=gl.SliceLayout(1, ACC))
    out_rows = out_ptr + offs_h.to(gl.int64) * stride_out_h
    for j in gl.static_range(TILES):
        result = (accs[j] * norm[None, :]).to(out_ptr.dtype.element_ty)
        mask = (offs_h < heads)[None, :] & (offs_d >= 0)[:, None]
        gl.store(out_rows[None, :] + (j * TILE + offs_d)[:, None], result, mask=mask)
    lse = log_sum_exp(running_max, sum_h)
    gl.store(lse_ptr + offs_h * SPLITS, lse, mask=offs_h < heads)


@gluon.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads", "table_pages", "zero"])
def few_heads_bf16_kernel(
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

    k_shared = gl.allocate_shared_memory(gl.bfloat16, [RING, KEYS, TILE], WGMMA_SHARED)
    rope_shared = gl.allocate_shared_memory(gl.bfloat16, [KEYS, ROPE], WGMMA_SHARED)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, RANK], WGMMA_SHARED)
    q_rope_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], WGMMA_SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, HEADS], P_SHARED)
    full, empty = barriers(RING + 1, 32 * FETCH_WARPS, 1)
    hopper.fence_async_shared()
    barrier()
    buffers = (k_shared, rope_shared, full, empty)
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
