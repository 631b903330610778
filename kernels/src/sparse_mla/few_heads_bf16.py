"""Up to 16 heads over a bfloat16 cache on sm90: the keys are the rows of both products, so that nothing is padded.

S^T = K Q^T has 64 keys as rows and the heads as 16 columns, O^T = V^T P the latents. Rows are copied asynchronously
into shared memory, where both products read them. With one buffer two programs share a multiprocessor, and one copies
while the other computes; with two a program copies while it computes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ...cache_layout import LATENT_RANK, ROPE_DIM
from .addresses import KEYS, UNIT, last_present, load_slots, row_units

HEADS = gl.constexpr(16)
RANK = gl.constexpr(LATENT_RANK)
ROPE = gl.constexpr(ROPE_DIM)
LN2 = gl.constexpr(0.6931471805599453)

ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16]))
Q_BLOCKED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
# 16 bytes a thread, 128 of each of four rows a warp.
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
WGMMA_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
P_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))
SLOTS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
UNITS_SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))


@gluon.jit
def _softmax(scores, visible, highest, total):
    """One step of the softmax over rows: (weights, highest, total, what the results so far are multiplied with)."""
    scores = gl.where(visible[:, None], scores, float("-inf"))
    higher = gl.maximum(highest, gl.max(scores, 0))
    shift = gl.where(higher == float("-inf"), 0.0, higher)
    p = gl.exp2(scores - shift[None, :])
    decay = gl.exp2(highest - shift)
    return p, higher, total * decay[None, :] + p, decay


@gluon.jit
def _copy_bf16(cache_ptr, units_shared, latents_shared, rope_shared):
    """Start copying 64 rows of 576 bfloat16."""
    units = units_shared.load(gl.SliceLayout(1, ROWS))
    rows = (cache_ptr + units * UNIT)[:, None]
    present = (units >= 0)[:, None]
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(0, ROWS))
    hopper.async_copy.async_copy_global_to_shared(latents_shared, rows + offs_d[None, :], mask=present)
    offs_r = RANK + gl.arange(0, ROPE, layout=gl.SliceLayout(0, ROWS))
    hopper.async_copy.async_copy_global_to_shared(rope_shared, rows + offs_r[None, :], mask=present)
    hopper.async_copy.commit_group()


@gluon.jit(do_not_specialize=["num_slots", "num_keys", "chunk", "heads", "zero"])
def few_heads_bf16_kernel(
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
    STAGES: gl.constexpr,
):
    pid = gl.program_id(0)
    split = pid % SPLITS
    t = (pid // SPLITS).to(gl.int64)
    begin = split * chunk
    index_ptr += t * stride_index
    limit = gl.minimum(begin + chunk, num_keys)

    k_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, RANK], WGMMA_SHARED)
    rope_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, ROPE], WGMMA_SHARED)
    units_shared = gl.allocate_shared_memory(gl.int64, [2, KEYS], UNITS_SHARED)
    for i in gl.static_range(2):
        slot = load_slots(index_ptr, begin + i * KEYS, limit, SLOTS)
        units_shared.index(i).store(row_units(slot, num_slots, stride_page, RANK + ROPE, PAGE))
    gl.thread_barrier()
    _copy_bf16(cache_ptr, units_shared.index(0), k_shared.index(0), rope_shared.index(0))
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, RANK], WGMMA_SHARED)
    q_rope_shared = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], WGMMA_SHARED)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, HEADS], P_SHARED)
    offs_h = gl.arange(0, HEADS, layout=gl.SliceLayout(1, Q_BLOCKED))
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(0, Q_BLOCKED))
    q_rows = q_latent_ptr + t * stride_q_latent_t + offs_h.to(gl.int64) * stride_q_latent_h
    q_shared.store(gl.load(q_rows[:, None] + offs_d[None, :], mask=(offs_h < heads)[:, None], other=0.0))
    offs_r = gl.arange(0, ROPE, layout=gl.SliceLayout(0, Q_BLOCKED))
    q_rows = q_rope_ptr + t * stride_q_rope_t + offs_h.to(gl.int64) * stride_q_rope_h
    q_rope_shared.store(gl.load(q_rows[:, None] + offs_r[None, :], mask=(offs_h < heads)[:, None], other=0.0))

    acc = gl.zeros([RANK, HEADS], gl.float32, layout=ACC)
    total = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
    highest = gl.full([HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(0, ACC))
    KEY_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    base = zero
    end = last_present(index_ptr, begin, limit, num_slots, SCAN)
    for start in range(begin, end, KEYS):
        base = base * zero
        hopper.async_copy.wait_group(0)
        hopper.fence_async_shared()
        gl.thread_barrier()
        step = (start - begin) // KEYS
        buffer = step % STAGES + base
        parity = step % 2
        if STAGES == 2:
            _copy_bf16(
                cache_ptr, units_shared.index(1 - parity), k_shared.index(1 - buffer), rope_shared.index(1 - buffer)
            )
        slot = load_slots(index_ptr, start + 2 * KEYS, limit, SLOTS)
        present = units_shared.index(parity).load(KEY_ROWS) >= 0
        k = k_shared.index(buffer)
        nothing = gl.zeros([KEYS, HEADS], gl.float32, layout=ACC)
        scores = hopper.warpgroup_mma(
            rope_shared.index(buffer), q_rope_shared.permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        scores = hopper.warpgroup_mma(k, q_shared.permute((1, 0)), scores, is_async=True)
        scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
        p, highest, total, decay = _softmax(scores * scale, present, highest, total)
        units_shared.index(parity).store(row_units(slot, num_slots, stride_page, RANK + ROPE, PAGE))
        p_shared.index(0).store(p.to(gl.bfloat16))
        acc = acc * decay[None, :]
        hopper.fence_async_shared()
        gl.thread_barrier()
        acc = hopper.warpgroup_mma(k.permute((1, 0)), p_shared.index(base), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        if STAGES == 1:
            gl.thread_barrier()
            _copy_bf16(cache_ptr, units_shared.index(1 - parity), k, rope_shared.index(buffer))

    total_h = gl.sum(total, 0)
    norm = 1.0 / gl.where(total_h == 0.0, 1.0, total_h)
    offs_h = gl.arange(0, HEADS, layout=gl.SliceLayout(0, ACC))
    offs_d = gl.arange(0, RANK, layout=gl.SliceLayout(1, ACC))
    out_rows = out_ptr + t * stride_out_t + split * RANK + offs_h.to(gl.int64) * stride_out_h
    result = (acc * norm[None, :]).to(out_ptr.dtype.element_ty)
    gl.store(out_rows[None, :] + offs_d[:, None], result, mask=(offs_h < heads)[None, :] & (offs_d >= 0)[:, None])
    lse = gl.where(total_h == 0.0, float("-inf"), (highest + gl.log2(total_h)) * LN2)
    gl.store(lse_ptr + (t * heads + offs_h) * SPLITS + split, lse, mask=offs_h < heads)
