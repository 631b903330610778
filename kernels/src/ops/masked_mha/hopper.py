"""masked_mha in bfloat16 on NVIDIA sm90: two groups of warps take turns, one in its products, one in its softmax.

A program has 128 queries of one head, 64 a group. One warp copies keys and values by TMA into buffers that both groups
read. The products of a step, q k of these keys and p v of those before, are started together, and the softmax of these
keys runs beside the second.

A weight of 0 times a value that is not finite is NaN, and would reach queries that do not see it. So a program says
whether its result is finite, and the portable kernel, which looks at each value, computes again what is not.
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own, and a constant is an int.
# mypy: disable-error-code="assignment, attr-defined, misc"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...device.sm90 import barrier, log_sum_exp, raise_max, reciprocal
from ...limits import MASK_BLOCK
from ...runtime.target import Target
from . import common

ROWS = gl.constexpr(64)
"""Queries of a group: the rows of a wgmma."""
GROUPS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)
"""Queries of a program."""
COLUMNS = gl.constexpr(64)
"""Of a copy: 128 bytes."""
BLOCK = gl.constexpr(MASK_BLOCK)
"""Keys of a block that is skipped where no query selected one of them."""
WORDS = gl.constexpr(4)
"""Words of the mask for each block."""
ATTEND_REGISTERS = gl.constexpr(240)
COPY_REGISTERS = gl.constexpr(24)

TILE_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
COPY_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))


@gluon.jit
def _buffer(i, STAGES: gl.constexpr):
    """(buffer of a step, whether it is taken for an odd time)."""
    return i % STAGES, (i // STAGES) & 1


@gluon.jit
def _step_key(i, low, steps, blocks_ptr, BLOCK_N: gl.constexpr, SELECTED: gl.constexpr):
    """First key of a step; the last keys come first. Past the last step, that of the last."""
    back = gl.maximum(steps - 1 - i, 0)
    s = low + back * BLOCK_N
    if SELECTED:
        PARTS: gl.constexpr = BLOCK // BLOCK_N
        s = gl.load(blocks_ptr + back // PARTS) * BLOCK + back % PARTS * BLOCK_N
    return s


@gluon.jit
def _columns(tiles):
    """Tiles as copies see them and as they lie in shared memory: COLUMNS columns at a time."""
    COUNT: gl.constexpr = tiles.shape[0] * (tiles.shape[2] // COLUMNS)
    return tiles._reinterpret(gl.bfloat16, [COUNT, 1, tiles.shape[1], COLUMNS], COPY_SHARED)


@gluon.jit
def _copy(desc, h, row, d, full, tiles, index):
    """Start copying a tile of one head."""
    PARTS: gl.constexpr = tiles.shape[2] // COLUMNS
    for j in gl.static_range(PARTS):
        part = _columns(tiles).index(index * PARTS + j)
        tma.async_copy_global_to_shared(desc, [h, row, d + j * COLUMNS], full, part)


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, h, first_row, low, steps, blocks_ptr, buffers,
    BLOCK_N: gl.constexpr, D: gl.constexpr, REST: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
    SELECTED: gl.constexpr,
):  # fmt: skip
    """The warp that copies."""
    q_shared, q_rest_shared, k_shared, k_rest_shared, v_shared, q_full, k_full, k_empty, v_full, v_empty = buffers
    mbarrier.expect(q_full, BLOCK_M * (D + REST) * 2)
    for g in gl.static_range(GROUPS):
        _copy(q_desc, h, first_row + g * ROWS, 0, q_full, q_shared, g)
        if REST > 0:
            _copy(q_desc, h, first_row + g * ROWS, D, q_full, q_rest_shared, g)
    # In the order in which they are read: the keys of a step before the values of the one before. The key of a step is
    # known a step ahead.
    s_before = 0
    s = _step_key(0, low, steps, blocks_ptr, BLOCK_N, SELECTED)
    for i in range(steps + 1):
        s_after = _step_key(i + 1, low, steps, blocks_ptr, BLOCK_N, SELECTED)
        if i < steps:
            buffer, turn = _buffer(i, STAGES)
            mbarrier.wait(k_empty.index(buffer), 1 - turn)
            mbarrier.expect(k_full.index(buffer), BLOCK_N * (D + REST) * 2)
            _copy(k_desc, h, s, 0, k_full.index(buffer), k_shared, buffer)
            if REST > 0:
                _copy(k_desc, h, s, D, k_full.index(buffer), k_rest_shared, buffer)
        if i > 0:
            before, turn_before = _buffer(i - 1, STAGES)
            mbarrier.wait(v_empty.index(before), 1 - turn_before)
            mbarrier.expect(v_full.index(before), BLOCK_N * V * 2)
            _copy(v_desc, h, s_before, 0, v_full.index(before), v_shared, before)
        s_before = s
        s = s_after


@gluon.jit
def _in_words(scores):
    """[ROWS, BLOCK_N] as [ROWS, a, q, i] of keys 8 a + 2 q + i: a lane has the keys of one q."""
    return scores.reshape(ROWS, scores.shape[1] // 8, WORDS, 2)


@gluon.jit
def _load_words(mask_ptr, stride_mask, first_row, tokens, s, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """[ROWS, WORDS] words of the block of 128 keys around s; the lowest bits are those of s."""
    like = _in_words(gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES))
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, like.type.layout))
    offs_m = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    offs_w = s // BLOCK * WORDS + gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))
    rows = mask_ptr + offs_m.to(gl.int64) * stride_mask
    words = gl.load(rows[:, None] + offs_w[None, :], mask=(offs_m < tokens)[:, None], other=0)
    return words >> (s % BLOCK // 4)


@gluon.jit
def _where_selected(scores, words):
    """-inf for keys whose bit is not set."""
    PARTS: gl.constexpr = scores.shape[1] // 8
    tiles = _in_words(scores)
    LAYOUT: gl.constexpr = tiles.type.layout
    a = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(0, LAYOUT))))
    i = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT))))
    bit = 2 * a[:, None][:, :, None][None, :, :, :] + i[None, :][None, :, :][None, :, :, :]
    # As one piece, or all predicates are computed long before the scores are there, and kept in registers.
    tiles = gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r",
        [tiles, words[:, None, :][:, :, :, None], 1 << bit],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return gl.convert_layout(tiles.reshape(ROWS, scores.shape[1]), scores.type.layout, assert_trivial=True)


@gluon.jit
def _where_visible(scores, s, first, last, whole_low, whole_high):
    """-inf for keys outside first .. last - 1; every query sees whole_low .. whole_high - 1."""
    BLOCK_N: gl.constexpr = scores.shape[1]
    if (s < whole_low) | (s + BLOCK_N > whole_high):
        offs_s = s + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores.type.layout))
        visible = (offs_s[None, :] >= first[:, None]) & (offs_s[None, :] < last[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    return scores


@gluon.jit
def _multiply(q, q_rest, k, k_rest, BLOCK_N: gl.constexpr, REST: gl.constexpr, SCORES: gl.constexpr):
    """Start q k^T, [ROWS, BLOCK_N]."""
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
    scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if REST > 0:
        scores = warpgroup_mma(q_rest, k_rest.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _softmax(scores, running_max, running_sum, scale):
    """One step of the softmax: (weights, new maximum and sum, factor of the result so far)."""
    new_max, shift = raise_max(running_max, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(running_max - shift)
    return p.to(gl.bfloat16), new_max, running_sum * decay + gl.sum(p, 1), decay


@gluon.jit
def _release(empty):
    """Every warp of the group has read the buffer."""
    barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def _attend(
    GROUP: gl.constexpr, out_desc, lse_ptr, left_ptr, mask_ptr, start_ptr, end_ptr, stride_lse_t, stride_mask, tokens,
    keys, h, first_row, low, steps, whole_low, whole_high, blocks_ptr, scale, turns, buffers,
    BLOCK_N: gl.constexpr, D: gl.constexpr, REST: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
    SELECTED: gl.constexpr,
):  # fmt: skip
    """A group of warps that computes."""
    q_shared, q_rest_shared, k_shared, k_rest_shared, v_shared, q_full, k_full, k_empty, v_full, v_empty = buffers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)

    first_row += GROUP * ROWS
    offs_m = first_row + gl.arange(0, ROWS, layout=ROW)
    mask_m = offs_m < tokens
    first = gl.load(start_ptr + offs_m, mask=mask_m, other=0)
    last = gl.minimum(gl.load(end_ptr + offs_m, mask=mask_m, other=0), keys)
    q = q_shared.index(GROUP)
    q_rest = q_rest_shared.index(GROUP)
    mine = turns.index(GROUP)
    theirs = turns.index(1 - GROUP)

    # acc [ROWS, V]; running_max, running_sum [ROWS]
    acc = gl.zeros([ROWS, V], gl.float32, layout=ACC)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    running_sum = gl.zeros([ROWS], gl.float32, layout=ROW)
    mbarrier.wait(q_full, 0)
    if steps > 0:
        s = _step_key(0, low, steps, blocks_ptr, BLOCK_N, SELECTED)
        if SELECTED:
            words = _load_words(mask_ptr, stride_mask, first_row, tokens, s, BLOCK_N, SCORES)
        mbarrier.wait(k_full.index(0), 0)
        # The first group begins; from then on each lets the other start its products when its own are started.
        mbarrier.wait(mine, 1 - GROUP)
        scores = _multiply(q, q_rest, k_shared.index(0), k_rest_shared.index(0), BLOCK_N, REST, SCORES)
        mbarrier.arrive(theirs, count=1)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        _release(k_empty.index(0))
        if SELECTED:
            scores = _where_selected(scores, words)
        else:
            scores = _where_visible(scores, s, first, last, whole_low, whole_high)
        p, running_max, running_sum, decay = _softmax(scores, running_max, running_sum, scale)
        weights = gl.convert_layout(p, WEIGHTS)
        if SELECTED:
            # Words are loaded a step ahead, and where they are is known a step before that: no product waits for them.
            s_ahead = _step_key(1, low, steps, blocks_ptr, BLOCK_N, SELECTED)
            words_ahead = _load_words(mask_ptr, stride_mask, first_row, tokens, s_ahead, BLOCK_N, SCORES)
            s_ahead = _step_key(2, low, steps, blocks_ptr, BLOCK_N, SELECTED)
        for i in range(1, steps):
            buffer, turn = _buffer(i, STAGES)
            before, turn_before = _buffer(i - 1, STAGES)
            if SELECTED:
                words = words_ahead
                words_ahead = _load_words(mask_ptr, stride_mask, first_row, tokens, s_ahead, BLOCK_N, SCORES)
                s_ahead = _step_key(i + 2, low, steps, blocks_ptr, BLOCK_N, SELECTED)
            else:
                s = _step_key(i, low, steps, blocks_ptr, BLOCK_N, SELECTED)
            mbarrier.wait(k_full.index(buffer), turn)
            mbarrier.wait(mine, (i + 1 - GROUP) & 1)
            scores = _multiply(q, q_rest, k_shared.index(buffer), k_rest_shared.index(buffer), BLOCK_N, REST, SCORES)
            mbarrier.wait(v_full.index(before), turn_before)
            acc = warpgroup_mma(weights, v_shared.index(before), acc, is_async=True)
            mbarrier.arrive(theirs, count=1)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            _release(k_empty.index(buffer))
            if SELECTED:
                scores = _where_selected(scores, words)
            else:
                scores = _where_visible(scores, s, first, last, whole_low, whole_high)
            p, running_max, running_sum, decay = _softmax(scores, running_max, running_sum, scale)
            acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
            _release(v_empty.index(before))
            acc = acc * gl.convert_layout(decay, ACC_ROW)[:, None]
            weights = gl.convert_layout(p, WEIGHTS)
        before, turn_before = _buffer(steps - 1, STAGES)
        mbarrier.wait(v_full.index(before), turn_before)
        acc = warpgroup_mma(weights, v_shared.index(before), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))

    result = acc * gl.convert_layout(reciprocal(running_sum), ACC_ROW)[:, None]
    # The group's queries are read: its result takes their place on the way out.
    q.store(result.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    for j in gl.static_range(V // COLUMNS):
        part = _columns(q_shared).index(GROUP * (D // COLUMNS) + j)
        tma.async_copy_shared_to_global(out_desc, [h, first_row, j * COLUMNS], part)
    not_finite = gl.sum(gl.sum(result * 0.0, 1), 0)
    gl.store(left_ptr, (not_finite != not_finite).to(gl.int32))
    lse = log_sum_exp(running_max, running_sum)
    gl.store(lse_ptr + offs_m.to(gl.int64) * stride_lse_t + h, lse, mask=mask_m)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["stride_lse_t", "stride_mask", "stride_blocks", "tokens", "keys", "heads", "heads_beside"]
)
def turns_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, left_ptr, start_ptr, end_ptr, mask_ptr, blocks_ptr, count_ptr,
    stride_lse_t, stride_mask, stride_blocks, tokens, keys, heads, heads_beside, scale,
    BLOCK_N: gl.constexpr, D: gl.constexpr, REST: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
    SELECTED: gl.constexpr,
):  # fmt: skip
    # D columns of a key, a power of two, and REST behind them
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, ROWS, D], TILE_SHARED)
    k_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, D], TILE_SHARED)
    v_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, V], TILE_SHARED)
    q_rest_shared = q_shared
    k_rest_shared = k_shared
    if REST > 0:
        q_rest_shared = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, ROWS, REST], TILE_SHARED)
        k_rest_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, REST], TILE_SHARED)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    barrier()

    # Programs of `heads_beside` heads run side by side, so that all find their keys in the L2 cache; of these the last
    # queries, which see most, begin first.
    query_blocks = gl.cdiv(tokens, BLOCK_M)
    pid = gl.program_id(0)
    first_head = pid // (query_blocks * heads_beside) * heads_beside
    beside = gl.minimum(heads_beside, heads - first_head)
    inside = pid - query_blocks * first_head
    h = first_head + inside % beside
    block = query_blocks - 1 - inside // beside
    first_row = block * BLOCK_M

    low = 0
    whole_low = 0
    whole_high = 0
    if SELECTED:
        steps = gl.load(count_ptr + block) * (BLOCK // BLOCK_N)
        blocks_ptr += block.to(gl.int64) * stride_blocks
    else:
        offs_m = first_row + gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0]))
        mask_m = offs_m < tokens
        start = gl.maximum(gl.load(start_ptr + offs_m, mask=mask_m, other=0), 0)
        end = gl.minimum(gl.load(end_ptr + offs_m, mask=mask_m, other=0), keys)
        seen_m = mask_m & (start < end)
        low = gl.min(gl.where(seen_m, start, keys), 0) // BLOCK_N * BLOCK_N
        steps = gl.maximum(gl.cdiv(gl.max(gl.where(seen_m, end, 0), 0) - low, BLOCK_N), 0)
        whole_low = gl.max(gl.where(mask_m, start, 0), 0)
        whole_high = gl.min(gl.where(mask_m, gl.where(seen_m, end, 0), keys), 0)

    buffers = (q_shared, q_rest_shared, k_shared, k_rest_shared, v_shared, q_full, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    0, out_desc, lse_ptr, left_ptr + 2 * (block * heads + h) + 0, mask_ptr, start_ptr, end_ptr,
                    stride_lse_t, stride_mask, tokens, keys, h, first_row, low, steps, whole_low, whole_high,
                    blocks_ptr, scale, turns, buffers, BLOCK_N, D, REST, V, STAGES, SELECTED,
                ),
            ),
            (
                _attend,
                (
                    1, out_desc, lse_ptr, left_ptr + 2 * (block * heads + h) + 1, mask_ptr, start_ptr, end_ptr,
                    stride_lse_t, stride_mask, tokens, keys, h, first_row, low, steps, whole_low, whole_high,
                    blocks_ptr, scale, turns, buffers, BLOCK_N, D, REST, V, STAGES, SELECTED,
                ),
            ),
            (
                _fetch,
                (
                    q_desc, k_desc, v_desc, h, first_row, low, steps, blocks_ptr, buffers, BLOCK_N, D, REST, V, STAGES,
                    SELECTED,
                ),
            ),
        ],
        [4, 1],
        [ATTEND_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_blocks", "tokens", "blocks"])
def list_blocks_kernel(
    mask_ptr, blocks_ptr, count_ptr, stride_mask, stride_blocks, tokens, blocks,
    QUERIES: tl.constexpr, BLOCK_WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List, in order, the blocks of keys of which any of QUERIES queries selected one."""
    pid = tl.program_id(0)
    offs_m = pid * QUERIES + tl.arange(0, QUERIES)
    rows = mask_ptr + offs_m.to(tl.int64) * stride_mask
    blocks_ptr += pid.to(tl.int64) * stride_blocks
    found = 0
    for base in range(0, blocks, CHUNK):
        # words [QUERIES, BLOCK_WORDS * CHUNK]
        offs_w = base * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS * CHUNK)
        mask_w = (offs_m < tokens)[:, None] & (offs_w < blocks * BLOCK_WORDS)[None, :]
        words = tl.load(rows[:, None] + offs_w[None, :], mask=mask_w, other=0)
        any_w = tl.max((words != 0).to(tl.int32), 0)
        any_c = tl.max(tl.reshape(any_w, (CHUNK, BLOCK_WORDS)), 1)
        before = found + tl.cumsum(any_c, 0) - any_c
        tl.store(blocks_ptr + before, base + tl.arange(0, CHUNK), mask=any_c > 0)
        found += tl.sum(any_c, 0)
    tl.store(count_ptr + pid, found)


class Config(NamedTuple):
    """Keys a step, and buffers for them, as much as shared memory holds."""

    block_n: int
    num_stages: int


CONFIGS = {(192, 128): Config(block_n=128, num_stages=2), (256, 256): Config(block_n=64, num_stages=2)}
"""By the widths of keys and values."""

CACHED_BYTES = 24 << 20
"""Keys and values of heads whose programs run side by side: half of the L2 cache."""


def supports(target: Target) -> bool:
    return target.name == "sm90"


def masked_mha(
    q_thd: torch.Tensor,
    k_shd: torch.Tensor,
    v_shv: torch.Tensor,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    scale: float,
    *,
    mask_tw: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> Any:
    tokens, heads, dim = q_thd.shape
    keys, _, value_dim = v_shv.shape
    config = CONFIGS.get((dim, value_dim))
    copied = (q_thd, k_shd, v_shv) if out is None else (q_thd, k_shd, v_shv, out)
    if config is None or q_thd.dtype is not torch.bfloat16 or keys == 0 or not all(map(_aligned, copied)):
        return NotImplemented
    if out is None:
        out = torch.empty((tokens, heads, value_dim), dtype=q_thd.dtype, device=q_thd.device)
    if lse is None:
        lse = torch.empty((tokens, heads), dtype=torch.float32, device=q_thd.device)
    if tokens == 0 or heads == 0:
        return out, lse
    query_blocks = triton.cdiv(tokens, BLOCK_M.value)
    # Without a mask these are not read.
    lists, counts = (start_t[None], start_t) if mask_tw is None else list_blocks(mask_tw, keys)
    left = torch.empty((query_blocks, heads, GROUPS.value), dtype=torch.int32, device=out.device)
    main = 1 << (dim.bit_length() - 1)
    turns_kernel[(query_blocks * heads,)](
        _described(q_thd, ROWS.value),
        _described(k_shd, config.block_n),
        _described(v_shv, config.block_n),
        _described(out, ROWS.value),
        lse,
        left,
        start_t,
        end_t,
        start_t if mask_tw is None else mask_tw,
        lists,
        counts,
        lse.stride(0),
        0 if mask_tw is None else mask_tw.stride(0),
        lists.stride(0),
        tokens,
        keys,
        heads,
        max(1, min(heads, CACHED_BYTES // (2 * keys * (dim + value_dim)))),
        scale * common.LOG2E,
        BLOCK_N=config.block_n,
        D=main,
        REST=dim - main,
        V=value_dim,
        STAGES=config.num_stages,
        SELECTED=mask_tw is not None,
        num_warps=4,
    )
    return common.masked_mha(q_thd, k_shd, v_shv, start_t, end_t, scale, mask_tw=mask_tw, out=out, lse=lse, left=left)


def list_blocks(mask_tw: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(lists [query blocks, blocks of keys], their lengths [query blocks])."""
    tokens, blocks = mask_tw.shape[0], triton.cdiv(keys, BLOCK.value)
    query_blocks = triton.cdiv(tokens, BLOCK_M.value)
    lists = torch.empty((query_blocks, blocks), dtype=torch.int32, device=mask_tw.device)
    counts = torch.empty((query_blocks,), dtype=torch.int32, device=mask_tw.device)
    list_blocks_kernel[(query_blocks,)](
        mask_tw, lists, counts, mask_tw.stride(0), blocks, tokens, blocks,
        QUERIES=BLOCK_M.value, BLOCK_WORDS=WORDS.value, CHUNK=32, num_warps=16,
    )  # fmt: skip
    return lists, counts


def _described(x_thd: torch.Tensor, rows: int) -> TensorDescriptor:
    """For copies of `rows` tokens of one head."""
    tokens, heads, dim = x_thd.shape
    stride_t, stride_h, _ = x_thd.stride()
    block = [1, rows, COLUMNS.value]
    return TensorDescriptor(x_thd, [heads, tokens, dim], [stride_h, stride_t, 1], block, COPY_SHARED.value)


def _aligned(x_thd: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as TMA needs."""
    return x_thd.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x_thd.stride()[:2])
