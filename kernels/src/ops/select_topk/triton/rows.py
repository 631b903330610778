"""Rows of scores: how they are read, the pivot of a sample, and the list of the scores that reach it."""

from __future__ import annotations

import triton
import triton.language as tl

from .search import LOWEST, narrow, order_key, score_of


@triton.jit
def row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR: tl.constexpr):
    """(row_ptr, skip, n): the row's n candidates are row_ptr[skip : skip + n]; row_ptr is aligned to VECTOR scores."""
    start = 0
    if start_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(start_ptr + row).to(tl.int32), 0), width)
    end = tl.minimum(tl.load(end_ptr + row).to(tl.int32), width)
    aligned = start // VECTOR * VECTOR
    row_ptr = logits_ptr + row.to(tl.int64) * (row_stride // VECTOR * VECTOR) + aligned
    return row_ptr, start - aligned, tl.maximum(end - start, 0)


@triton.jit
def quads(SIZE: tl.constexpr, WARPS: tl.constexpr):
    """[lane, warp, turn]: where the quads of SIZE elements begin.

    Triton deals threads out to the first dimension first, so the lanes of a warp have neighbouring quads, a warp's
    turns are neighbours too, and all counting in order but its last step stays inside a warp.
    """
    turns: tl.constexpr = SIZE // (128 * WARPS)
    warp_turn = turns * tl.arange(0, WARPS)[:, None] + tl.arange(0, turns)[None, :]
    return 4 * tl.arange(0, 32)[:, None, None] + 128 * warp_turn[None, :, :]


@triton.jit
def _pivot(
    row_ptr, skip, n, topk, bins, SAMPLE: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr, SHARED: tl.constexpr
):
    """A finite score that a little more than topk scores reach: very many more if they equal it.

    The sample is groups of four neighbours, spread over the row.
    """
    groups: tl.constexpr = SAMPLE // 4
    group = quads(SAMPLE, WARPS) // 4
    offs = (skip + (group.to(tl.int64) * n // groups).to(tl.int32)) // 4 * 4
    score_0, score_1, score_2, score_3 = load_quads(row_ptr, offs, skip, skip + n, True, VECTOR)
    expected = topk * (SAMPLE / n)
    # Four standard deviations of independent samples, two if a group of neighbours is worth no more than one sample.
    rank = (expected + 4.0 * tl.sqrt(expected) + 8.0).to(tl.int32)
    low, _last, _above = narrow(
        order_key(score_0), order_key(score_1), order_key(score_2), order_key(score_3),
        rank * 0 + SAMPLE, rank, rank // 8, bins, SHARED,
    )  # fmt: skip
    # -inf is no pivot: it stands for what lies outside the row.
    return score_of(tl.maximum(low, LOWEST + 1))


@triton.jit
def load_quads(row_ptr, offs, skip, stop, edge, VECTOR: tl.constexpr):
    """Scores offs, offs + 1, offs + 2, offs + 3, a tensor each; -inf outside skip .. stop - 1 (at an edge)."""
    if VECTOR == 4:
        at = offs[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
        mask = (offs < (stop + 3) // 4 * 4)[:, :, :, None]
        score = tl.load(row_ptr + at, mask=mask, other=float("-inf"))
        even, odd = tl.split(tl.reshape(score, (score.shape[0], score.shape[1], score.shape[2], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
    else:
        first = tl.load(row_ptr + offs, mask=offs < stop, other=float("-inf"))
        second = tl.load(row_ptr + offs + 1, mask=offs + 1 < stop, other=float("-inf"))
        third = tl.load(row_ptr + offs + 2, mask=offs + 2 < stop, other=float("-inf"))
        fourth = tl.load(row_ptr + offs + 3, mask=offs + 3 < stop, other=float("-inf"))
    if edge:
        first = tl.where((offs >= skip) & (offs < stop), first, float("-inf"))
        second = tl.where((offs + 1 >= skip) & (offs + 1 < stop), second, float("-inf"))
        third = tl.where((offs + 2 >= skip) & (offs + 2 < stop), third, float("-inf"))
        fourth = tl.where((offs + 3 >= skip) & (offs + 3 < stop), fourth, float("-inf"))
    return first, second, third, fourth


@triton.jit
def _append(list_ptr, score, pos, listed, before):
    """List one score in four behind those counted before it; return what stands before the next."""
    entry = (pos.to(tl.int64) << 32) | score.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.store(list_ptr + before, entry, mask=listed > 0)
    return before + listed


@triton.jit
def prefix_sum(kinds):
    """(exclusive prefix sum in order, total) of [lane, warp, turn] counts."""
    of_warp = tl.sum(tl.sum(kinds, axis=2), axis=0)
    of_turn = tl.broadcast_to(tl.sum(kinds, axis=0, keep_dims=True), kinds.shape)
    before_warp = (tl.cumsum(of_warp, axis=0) - of_warp)[None, :, None]
    before = tl.cumsum(kinds, axis=0) - kinds + tl.cumsum(of_turn, axis=2) - of_turn + before_warp
    return before, tl.sum(of_warp, axis=0)


@triton.jit
def collect(
    row_ptr, skip, n, begin, stop, topk, list_ptr, bins,
    CAPACITY: tl.constexpr, TILE: tl.constexpr, SAMPLE: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """List every score from the pivot up, in order; return how many, more than CAPACITY if they do not fit."""
    local = quads(TILE, WARPS)
    # On its way while the sample is searched.
    score_0, score_1, score_2, score_3 = load_quads(row_ptr, begin + local, skip, stop, True, VECTOR)
    pivot = _pivot(row_ptr, skip, n, topk, bins, SAMPLE, WARPS, VECTOR, SHARED)
    listed = 0
    base = begin
    while (base < stop) & (listed <= CAPACITY):
        pos = base + local - skip
        listed_0, listed_1 = (score_0 >= pivot).to(tl.int32), (score_1 >= pivot).to(tl.int32)
        listed_2, listed_3 = (score_2 >= pivot).to(tl.int32), (score_3 >= pivot).to(tl.int32)
        before, total = prefix_sum(listed_0 + listed_1 + listed_2 + listed_3)
        if listed + total <= CAPACITY:
            before += listed
            before = _append(list_ptr, score_0, pos, listed_0, before)
            before = _append(list_ptr, score_1, pos + 1, listed_1, before)
            before = _append(list_ptr, score_2, pos + 2, listed_2, before)
            before = _append(list_ptr, score_3, pos + 3, listed_3, before)
        listed += total
        base += TILE
        score_0, score_1, score_2, score_3 = load_quads(
            row_ptr, base + local, skip, stop, base + TILE > stop, VECTOR
        )  # fmt: skip
    return listed
