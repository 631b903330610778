"""Exact top K on every GPU: a sampled pivot thins a long row to a short list, and the list is searched in registers.

A search counts keys by their leading 12 bits, then those that share the wanted digit by the next 12, then by the last
8: at most three rounds, whatever the scores are. On NVIDIA the counters are in shared memory, elsewhere in registers
(four rounds of 8 bits). The pivot only decides how long the list is, never what is selected: a list that cannot hold
the answer (counts say so) is dropped and the row is searched in memory. Every decision rests on integer counts, so no
order of execution can change it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...runtime.launch import dependent_launch_on
from ...runtime.target import Target, chip_of

LOWEST = tl.constexpr(0x007FFFFF)
"""Order key of -inf; 0 is kept for elements outside a row."""
HIGHEST = tl.constexpr(0xFF800000)
"""Order key of +inf."""

PROGRAMS_PER_SM = 4
MAX_SPLITS = 32
TILE = 4096
INTERPRETED_SMS = 2
"""Under Triton's interpreter."""


@triton.jit
def _order_key(score):
    """uint32 whose unsigned order is the order of the scores; NaN counts as -inf and -0.0 as 0.0."""
    # The sum makes a positive zero of a negative one.
    bits = (tl.where(score == score, score, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _score_of(key):
    """The score of an order key."""
    bits = tl.where(key >> 31 == 1, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _shared_load(at):
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _shared_take(at):
    """Load and set to zero."""
    return tl.inline_asm_elementwise(
        "{ ld.shared.b32 $0, [$1]; st.shared.b32 [$1], 0; }", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _shared_store(at, value, mask):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; @p st.shared.b32 [$1], $2; }",
        "=r,r,r,r", [at, value, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _shared_increment(at, offset, span):
    """Add one at each address whose offset is not beyond the span.

    For tensors of at least as many elements as there are threads: a smaller one has copies, which would count too.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.le.u32 p, $2, $3; mov.b32 $0, 0; @p red.shared.add.u32 [$1], 1; }",
        "=r,r,r,r", [at, offset, span], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _new_bins(seed, SHARED: tl.constexpr):
    """Address of 4096 counters in shared memory, all zero, with room for 128 and 32 words behind them.

    Triton itself cannot add to shared memory. One statement of the program is one array of the kernel, which lives as
    long as the kernel does.
    """
    bins = seed * 0
    if SHARED:
        bins = tl.inline_asm_elementwise(
            "{ .shared .align 16 .b32 bins[4256]; mov.u32 $0, bins; }",
            "=r,r", [bins], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        _shared_take(bins + 4 * tl.arange(0, 4096))
        tl.debug_barrier()
    return bins


@triton.jit
def _tally(counts, key, low, span, shift, bins, SHARED: tl.constexpr):
    """Count the keys in low .. low + span by their next digit, the highest first."""
    offset = key - low
    digit = (offset >> shift.to(tl.uint32)).to(tl.int32)
    if SHARED:
        _shared_increment((bins + 4 * 4095) - 4 * digit, offset, span)
    else:
        inside = tl.ravel(offset <= span)
        counts += tl.histogram(tl.where(inside, 255 - tl.ravel(digit), 0), 256, mask=inside)
    return counts


@triton.jit
def _reach(count, above, wanted):
    """(how many of the counts are passed before `wanted` is reached, above with those)."""
    passed = above + tl.cumsum(count, axis=0) < wanted
    return tl.sum(passed.to(tl.int32), axis=0), above + tl.sum(tl.where(passed, count, 0), axis=0)


@triton.jit
def _descend(counts, low, shift, above, wanted, bins, SHARED: tl.constexpr):
    """(low, span, above, at_least) of the digit that holds the wanted-th key from the top; the counters are zero."""
    DIGIT: tl.constexpr = 12 if SHARED else 8
    if SHARED:
        # 128 rows of 32 counters: a row is one warp's, and every warp has each vector of 32, so three barriers will do.
        sums = bins + 4 * 4096
        fine = sums + 4 * 128
        lane = tl.arange(0, 32)
        row = tl.arange(0, 128)[:, None]
        column = tl.arange(0, 32)[None, :]
        tl.debug_barrier()
        table = _shared_take(bins + 4 * (32 * row + column))
        _shared_store(sums + 4 * row, tl.sum(table, axis=1, keep_dims=True), row >= 0)
        tl.debug_barrier()
        a, b, c, d = tl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [sums + 16 * lane],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        four, above = _reach(a + b + c + d, above, wanted)
        # A row is passed if `wanted` is not reached with it.
        a = tl.where(lane == four, a, 0)
        b = tl.where(lane == four, b, 0)
        c = tl.where(lane == four, c, 0)
        first = above + tl.sum(a, axis=0)
        second = first + tl.sum(b, axis=0)
        third = second + tl.sum(c, axis=0)
        above = tl.where(
            third < wanted, third, tl.where(second < wanted, second, tl.where(first < wanted, first, above))
        )
        index = (
            4 * four + (first < wanted).to(tl.int32) + (second < wanted).to(tl.int32) + (third < wanted).to(tl.int32)
        )
        _shared_store(fine + 4 * column + 0 * row, table, (row == index) & (column >= 0))
        tl.debug_barrier()
        counts = _shared_load(fine + 4 * lane)
        bin, above = _reach(counts, above, wanted)
        at_least = above + tl.sum(tl.where(lane == bin, counts, 0), axis=0)
        bin += 32 * index
    else:
        bin, above = _reach(counts, above, wanted)
        at_least = above + tl.sum(tl.where(tl.arange(0, 1 << DIGIT) == bin, counts, 0), axis=0)
    digit = ((1 << DIGIT) - 1 - bin).to(tl.uint32)
    low += digit << shift.to(tl.uint32)
    span = tl.minimum((tl.full((), 1, tl.uint32) << shift.to(tl.uint32)) - 1, HIGHEST - low)
    return low, span, above, at_least


@triton.jit
def _first_shift(n, SHARED: tl.constexpr):
    """How far a key is shifted for its first digit; the next ones are DIGIT bits each, as far as there are any."""
    DIGIT: tl.constexpr = 12 if SHARED else 8
    return n * 0 + 32 - DIGIT


@triton.jit
def _next_shift(shift, SHARED: tl.constexpr):
    DIGIT: tl.constexpr = 12 if SHARED else 8
    return tl.maximum(shift - DIGIT, 0)


@triton.jit
def _narrow(key_0, key_1, key_2, key_3, count, wanted, slack, bins, SHARED: tl.constexpr):
    """(low, last, above): at least `wanted` of `count` keys are >= low and above < wanted are > last.

    At most wanted + slack keys are >= low, or all those from low to last are equal.
    """
    low = tl.full((), LOWEST, tl.uint32)
    span = tl.full((), HIGHEST - LOWEST, tl.uint32)
    shift = _first_shift(count, SHARED)
    above = count * 0
    at_least = count
    while (span > 0) & (at_least > wanted + slack):
        counts = tl.zeros((256,), tl.int32)
        counts = _tally(counts, key_0, low, span, shift, bins, SHARED)
        counts = _tally(counts, key_1, low, span, shift, bins, SHARED)
        counts = _tally(counts, key_2, low, span, shift, bins, SHARED)
        counts = _tally(counts, key_3, low, span, shift, bins, SHARED)
        low, span, above, at_least = _descend(counts, low, shift, above, wanted, bins, SHARED)
        shift = _next_shift(shift, SHARED)
    return low, low + span, above


@triton.jit
def _row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR: tl.constexpr):
    """(row_ptr, skip, n): the row's n candidates are row_ptr[skip : skip + n]; row_ptr is aligned to VECTOR scores."""
    start = 0
    if start_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(start_ptr + row).to(tl.int32), 0), width)
    end = tl.minimum(tl.load(end_ptr + row).to(tl.int32), width)
    aligned = start // VECTOR * VECTOR
    row_ptr = logits_ptr + row.to(tl.int64) * (row_stride // VECTOR * VECTOR) + aligned
    return row_ptr, start - aligned, tl.maximum(end - start, 0)


@triton.jit
def _quads(SIZE: tl.constexpr, WARPS: tl.constexpr):
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
    group = _quads(SAMPLE, WARPS) // 4
    offs = (skip + (group.to(tl.int64) * n // groups).to(tl.int32)) // 4 * 4
    score_0, score_1, score_2, score_3 = _load_quads(row_ptr, offs, skip, skip + n, True, VECTOR)
    expected = topk * (SAMPLE / n)
    # Four standard deviations of independent samples, two if a group of neighbours is worth no more than one sample.
    rank = (expected + 4.0 * tl.sqrt(expected) + 8.0).to(tl.int32)
    low, _last, _above = _narrow(
        _order_key(score_0), _order_key(score_1), _order_key(score_2), _order_key(score_3),
        rank * 0 + SAMPLE, rank, rank // 8, bins, SHARED,
    )  # fmt: skip
    # -inf is no pivot: it stands for what lies outside the row.
    return _score_of(tl.maximum(low, LOWEST + 1))


@triton.jit
def _load_quads(row_ptr, offs, skip, stop, edge, VECTOR: tl.constexpr):
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
def _before(kinds):
    """(exclusive prefix sum in order, total) of [lane, warp, turn] counts."""
    of_warp = tl.sum(tl.sum(kinds, axis=2), axis=0)
    of_turn = tl.broadcast_to(tl.sum(kinds, axis=0, keep_dims=True), kinds.shape)
    before_warp = (tl.cumsum(of_warp, axis=0) - of_warp)[None, :, None]
    before = tl.cumsum(kinds, axis=0) - kinds + tl.cumsum(of_turn, axis=2) - of_turn + before_warp
    return before, tl.sum(of_warp, axis=0)


@triton.jit
def _collect(
    row_ptr, skip, n, begin, stop, topk, list_ptr, bins,
    CAPACITY: tl.constexpr, TILE: tl.constexpr, SAMPLE: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """List every score from the pivot up, in order; return how many, more than CAPACITY if they do not fit."""
    local = _quads(TILE, WARPS)
    # On its way while the sample is searched.
    score_0, score_1, score_2, score_3 = _load_quads(row_ptr, begin + local, skip, stop, True, VECTOR)
    pivot = _pivot(row_ptr, skip, n, topk, bins, SAMPLE, WARPS, VECTOR, SHARED)
    listed = 0
    base = begin
    while (base < stop) & (listed <= CAPACITY):
        pos = base + local - skip
        listed_0, listed_1 = (score_0 >= pivot).to(tl.int32), (score_1 >= pivot).to(tl.int32)
        listed_2, listed_3 = (score_2 >= pivot).to(tl.int32), (score_3 >= pivot).to(tl.int32)
        before, total = _before(listed_0 + listed_1 + listed_2 + listed_3)
        if listed + total <= CAPACITY:
            before += listed
            before = _append(list_ptr, score_0, pos, listed_0, before)
            before = _append(list_ptr, score_1, pos + 1, listed_1, before)
            before = _append(list_ptr, score_2, pos + 2, listed_2, before)
            before = _append(list_ptr, score_3, pos + 3, listed_3, before)
        listed += total
        base += TILE
        score_0, score_1, score_2, score_3 = _load_quads(
            row_ptr, base + local, skip, stop, base + TILE > stop, VECTOR
        )  # fmt: skip
    return listed


@triton.jit
def _located(pos, mask, table_ptr, table_row, table_width, PAGE_SIZE: tl.constexpr):
    """Slots of positions, -1 where the table has none; without a table the positions themselves."""
    LAST_PAGE: tl.constexpr = 0x7FFFFFFF // PAGE_SIZE if PAGE_SIZE else 0
    result = pos
    if table_ptr is not None:
        index = pos // PAGE_SIZE
        offset = pos - index * PAGE_SIZE
        page = tl.load(table_ptr + table_row + index, mask=mask & (index < table_width), other=-1)
        # The slot must fit int32, and so must everything that leads to it.
        fits = (page >= 0) & (page < LAST_PAGE) | (page == LAST_PAGE) & (offset <= 0x7FFFFFFF - LAST_PAGE * PAGE_SIZE)
        result = tl.where(fits, page * PAGE_SIZE + offset, -1)
    return result


@triton.jit
def _rank(key, low, last):
    """1 for a key above those in question, 2^16 for one of them."""
    return tl.where(key > last, 1, tl.where(key >= low, 1 << 16, 0))


@triton.jit
def _put(rank, pos, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE: tl.constexpr):
    """Write one in four behind `sure` scores and min(ties, quota) ties; return what stands before the next."""
    ties_before = ties + (before >> 16)
    at = sure + (before & 0xFFFF) + tl.minimum(ties_before, quota)
    take = (rank == 1) | ((rank > 1) & (ties_before < quota))
    tl.store(out_ptr + at, _located(pos, take, table_ptr, table_row, table_width, PAGE_SIZE), mask=take)
    return before + rank


@triton.jit
def _emit(
    key_0, key_1, key_2, key_3, pos_0, pos_1, pos_2, pos_3, low, last, quota, sure, ties,
    out_ptr, table_ptr, table_row, table_width, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Write the selected of one block behind `sure` scores and min(ties, quota) ties of blocks before; return both."""
    rank_0, rank_1, rank_2, rank_3 = (
        _rank(key_0, low, last),
        _rank(key_1, low, last),
        _rank(key_2, low, last),
        _rank(key_3, low, last),
    )
    before, total = _before(rank_0 + rank_1 + rank_2 + rank_3)
    before = _put(rank_0, pos_0, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE)
    before = _put(rank_1, pos_1, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE)
    before = _put(rank_2, pos_2, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE)
    before = _put(rank_3, pos_3, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE)
    return sure + (total & 0xFFFF), ties + (total >> 16)


@triton.jit
def _row_key(score, pos, n):
    """Order key of a score of the row; 0 outside."""
    return tl.where(pos.to(tl.uint32, bitcast=True) < n.to(tl.uint32), _order_key(score), 0)


@triton.jit
def _load_keys(row_ptr, offs, skip, n, VECTOR: tl.constexpr):
    score_0, score_1, score_2, score_3 = _load_quads(row_ptr, offs, skip, skip + n, False, VECTOR)
    pos = offs - skip
    return (
        _row_key(score_0, pos, n),
        _row_key(score_1, pos + 1, n),
        _row_key(score_2, pos + 2, n),
        _row_key(score_3, pos + 3, n),
    )


@triton.jit
def _load_entry(list_ptr, mask):
    """(key, position) of an entry of a list."""
    entry = tl.load(list_ptr, mask=mask, other=0)
    score = (entry & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(mask, _order_key(score), 0), (entry >> 32).to(tl.int32)


@triton.jit
def _select_in_memory(
    row_ptr, skip, n, topk, bins, out_ptr, table_ptr, table_row, table_width,
    PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """`_narrow` over the whole row in memory: for the rare row whose list is too short or too long."""
    stop = skip + n
    local = _quads(TILE, WARPS)
    low = tl.full((), LOWEST, tl.uint32)
    span = tl.full((), HIGHEST - LOWEST, tl.uint32)
    shift = _first_shift(n, SHARED)
    above = n * 0
    at_least = n
    while (span > 0) & (at_least > topk):
        counts = tl.zeros((256,), tl.int32)
        for base in range(0, stop, TILE):
            key_0, key_1, key_2, key_3 = _load_keys(row_ptr, base + local, skip, n, VECTOR)
            counts = _tally(counts, key_0, low, span, shift, bins, SHARED)
            counts = _tally(counts, key_1, low, span, shift, bins, SHARED)
            counts = _tally(counts, key_2, low, span, shift, bins, SHARED)
            counts = _tally(counts, key_3, low, span, shift, bins, SHARED)
        low, span, above, at_least = _descend(counts, low, shift, above, topk, bins, SHARED)
        shift = _next_shift(shift, SHARED)
    last = low + span
    sure = 0
    ties = 0
    base = 0
    while sure + tl.minimum(ties, topk - above) < topk:
        key_0, key_1, key_2, key_3 = _load_keys(row_ptr, base + local, skip, n, VECTOR)
        pos = base + local - skip
        sure, ties = _emit(
            key_0, key_1, key_2, key_3, pos, pos + 1, pos + 2, pos + 3, low, last, topk - above, sure, ties,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE,
        )  # fmt: skip
        base += TILE


@triton.jit
def _select_row(
    row_ptr, skip, n, topk, list_ptr, listed, bins, out_ptr, table_ptr, table_row, table_width,
    LONG: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr,
    VECTOR: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The selection of one row from its scores (at most BLOCK of them) or from its list."""
    short = (skip + n <= BLOCK) | (not LONG)
    offs_tile = tl.arange(0, TILE)
    if n <= topk:
        for base in range(0, topk, TILE):
            pos = base + offs_tile
            slot = _located(pos, pos < n, table_ptr, table_row, table_width, PAGE_SIZE)
            tl.store(out_ptr + pos, tl.where(pos < n, slot, -1), mask=pos < topk)
    elif short:
        offs = _quads(BLOCK, WARPS)
        key_0, key_1, key_2, key_3 = _load_keys(row_ptr, offs, skip, n, VECTOR)
        low, last, above = _narrow(key_0, key_1, key_2, key_3, n, topk, 0, bins, SHARED)
        pos = offs - skip
        _emit(
            key_0, key_1, key_2, key_3, pos, pos + 1, pos + 2, pos + 3, low, last, topk - above, 0, 0,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE,
        )  # fmt: skip
    elif (listed >= topk) & (listed <= BLOCK):
        offs = _quads(BLOCK, WARPS)
        lists = list_ptr + offs
        key_0, pos_0 = _load_entry(lists, offs < listed)
        key_1, pos_1 = _load_entry(lists + 1, offs + 1 < listed)
        key_2, pos_2 = _load_entry(lists + 2, offs + 2 < listed)
        key_3, pos_3 = _load_entry(lists + 3, offs + 3 < listed)
        low, last, above = _narrow(key_0, key_1, key_2, key_3, listed, topk, 0, bins, SHARED)
        _emit(
            key_0, key_1, key_2, key_3, pos_0, pos_1, pos_2, pos_3, low, last, topk - above, 0, 0,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE,
        )  # fmt: skip
    else:
        _select_in_memory(
            row_ptr, skip, n, topk, bins, out_ptr, table_ptr, table_row, table_width,
            PAGE_SIZE, TILE, WARPS, VECTOR, SHARED,
        )  # fmt: skip


@triton.jit
def _table_row(table_ptr, seq_ptr, row, rows_per_sequence, table_stride):
    """Where in the block table the row of scores finds its pages."""
    offset = tl.zeros((), tl.int64)
    if table_ptr is not None:
        if seq_ptr is not None:
            offset = tl.load(seq_ptr + row).to(tl.int64) * table_stride
        else:
            offset = (row // rows_per_sequence).to(tl.int64) * table_stride
    return offset


@triton.jit
def _prefetch_table(table_ptr, table_row, n, table_width, PAGE_SIZE: tl.constexpr, SHARED: tl.constexpr):
    """Fetch the row's part of the block table, a line of 128 bytes a lane, which is needed at the very end."""
    if SHARED:  # noqa: SIM102 - known when compiling
        if table_ptr is not None:
            index = 32 * tl.arange(0, 64)
            needed = (index * PAGE_SIZE < n) & (index < table_width)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p prefetch.global.L2 [$1]; }",
                "=r,l,r", [(table_ptr + table_row + index).to(tl.int64), needed.to(tl.int32)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


COMMON = ["width", "row_stride", "topk"]
OUTPUT = ["out_stride", "table_stride", "table_width", "rows_per_sequence"]


@triton.jit(do_not_specialize=["first_row", "num_rows", *COMMON, *OUTPUT])
def select_rows_kernel(
    logits_ptr, start_ptr, end_ptr, table_ptr, seq_ptr, list_ptr, out_ptr,
    first_row, num_rows, width, row_stride, topk, out_stride, table_stride, table_width, rows_per_sequence,
    LONG: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SAMPLE: tl.constexpr,
    WARPS: tl.constexpr, VECTOR: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whole rows, one program a row at a time; a program reuses its own list."""
    pid = tl.program_id(0)
    bins = _new_bins(pid, SHARED)
    if PDL:
        gdc_wait()
    list_ptr += pid.to(tl.int64) * BLOCK
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(num_rows - pid, programs)):
        row = pid + turn * programs
        row_ptr, skip, n = _row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR)
        table_row = _table_row(table_ptr, seq_ptr, first_row + row, rows_per_sequence, table_stride)
        _prefetch_table(table_ptr, table_row, n, table_width, PAGE_SIZE, SHARED)
        listed = 0
        if LONG:  # noqa: SIM102 - known when compiling, so that short rows carry no code for lists
            if (skip + n > BLOCK) & (n > topk):
                listed = _collect(
                    row_ptr, skip, n, 0, skip + n, topk, list_ptr, bins, BLOCK, TILE, SAMPLE, WARPS, VECTOR, SHARED
                )
                tl.debug_barrier()
        _select_row(
            row_ptr, skip, n, topk, list_ptr, listed, bins, out_ptr + row.to(tl.int64) * out_stride,
            table_ptr, table_row, table_width, LONG, PAGE_SIZE, BLOCK, TILE, WARPS, VECTOR, SHARED,
        )  # fmt: skip
        if LONG:
            # The next row's list goes where this one's is still being read.
            tl.debug_barrier()


@triton.jit(do_not_specialize=COMMON)
def collect_kernel(
    logits_ptr, start_ptr, end_ptr, list_ptr, listed_ptr, width, row_stride, topk,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SAMPLE: tl.constexpr, WARPS: tl.constexpr,
    VECTOR: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: its candidates, in order, in a list of its own. All chunks of a row draw the same sample."""
    pid = tl.program_id(0)
    bins = _new_bins(pid, SHARED)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = pid // SPLITS
    row_ptr, skip, n = _row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR)
    chunk = tl.cdiv(skip + n, SPLITS * TILE) * TILE
    begin = (pid % SPLITS) * chunk
    stop = tl.minimum(begin + chunk, skip + n)
    listed = 0
    if (skip + n > BLOCK) & (n > topk) & (begin < stop):
        list_ptr += pid.to(tl.int64) * BLOCK
        listed = _collect(
            row_ptr, skip, n, begin, stop, topk, list_ptr, bins, BLOCK, TILE, SAMPLE, WARPS, VECTOR, SHARED
        )
    tl.store(listed_ptr + pid, listed)


@triton.jit(do_not_specialize=["first_row", *COMMON, *OUTPUT])
def select_lists_kernel(
    logits_ptr, start_ptr, end_ptr, table_ptr, seq_ptr, list_ptr, listed_ptr, joined_ptr, out_ptr,
    first_row, width, row_stride, topk, out_stride, table_stride, table_width, rows_per_sequence,
    SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr,
    VECTOR: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Select from the lists of a row's chunks, which are in order already."""
    row = tl.program_id(0)
    bins = _new_bins(row, SHARED)
    # Older than the lists, so it need not wait for them.
    row_ptr, skip, n = _row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR)
    table_row = _table_row(table_ptr, seq_ptr, first_row + row, rows_per_sequence, table_stride)
    _prefetch_table(table_ptr, table_row, n, table_width, PAGE_SIZE, SHARED)
    if PDL:
        gdc_wait()
    splits = tl.arange(0, SPLITS)
    listed = tl.load(listed_ptr + row * SPLITS + splits)
    total = tl.sum(listed, axis=0)
    joined_ptr += row.to(tl.int64) * BLOCK
    out_ptr += row.to(tl.int64) * out_stride
    if (total >= topk) & (tl.max(listed, axis=0) <= BLOCK // SPLITS):
        # The usual case: as many entries of each list as fit, the rest of their places empty.
        share: tl.constexpr = BLOCK // SPLITS
        offs = _quads(BLOCK, WARPS)
        chunk = row * SPLITS + offs // share
        length = tl.load(listed_ptr + chunk)
        place = offs % share
        lists = list_ptr + chunk.to(tl.int64) * BLOCK + place
        key_0, pos_0 = _load_entry(lists, place < length)
        key_1, pos_1 = _load_entry(lists + 1, place + 1 < length)
        key_2, pos_2 = _load_entry(lists + 2, place + 2 < length)
        key_3, pos_3 = _load_entry(lists + 3, place + 3 < length)
        low, last, above = _narrow(key_0, key_1, key_2, key_3, total, topk, 0, bins, SHARED)
        _emit(
            key_0, key_1, key_2, key_3, pos_0, pos_1, pos_2, pos_3, low, last, topk - above, 0, 0,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE,
        )  # fmt: skip
        return
    if (total >= topk) & (total <= BLOCK):
        # Some lists are long, but they fit if joined.
        columns: tl.constexpr = min(BLOCK, 2048) // SPLITS
        at = tl.cumsum(listed, axis=0) - listed
        for base in range(0, tl.max(listed, axis=0), columns):
            offs = base + tl.arange(0, columns)
            mask = offs[None, :] < listed[:, None]
            source = (row * SPLITS + splits).to(tl.int64)[:, None] * BLOCK + offs[None, :]
            entry = tl.load(list_ptr + source, mask=mask, other=0)
            tl.store(joined_ptr + at[:, None] + offs[None, :], entry, mask=mask)
    tl.debug_barrier()
    _select_row(
        row_ptr, skip, n, topk, joined_ptr, total, bins, out_ptr,
        table_ptr, table_row, table_width, True, PAGE_SIZE, BLOCK, TILE, WARPS, VECTOR, SHARED,
    )  # fmt: skip


class Config(NamedTuple):
    """How one launch runs. `block` bounds what is searched in registers, `tile` what is read at a time."""

    long: bool
    splits: int
    block: int
    tile: int
    sample: int
    num_warps: int
    max_registers: int | None = None
    """On NVIDIA: what a thread may use, so that more programs fit on a multiprocessor."""


def choose(num_rows: int, width: int, topk: int, num_sms: int) -> Config:
    """The configuration for a shape: rows that would leave the GPU half empty are split.

    H100, microseconds, slots resolved, the other configurations that were tried in brackets:
        B=1 L=8K        16 warps                6.9     [32 warps 7.4]
        B=1 L=32K       16 splits, 16 warps     10.3    [8 warps 10.6, 8 splits 10.9]
        B=1 L=128K      32 splits, 16 warps     11.1    [8 warps 12.3; sample 4096, block 8192 12.8]
        B=16 L=32K      8 splits, 16 warps      12.5    [8 warps 12.9]
        B=16 L=128K     8 splits, 16 warps      18.5    [16 splits, 8 warps to list 19.8]
        B=64 L=32K      2 splits, 16 warps      17.9    [4 splits, 8 warps 18.0]
        2048 of L=28K   8 warps, sample 2048    189     [16 warps 207, 4 warps 213; 80 registers 226]
        1024 of L=128K  8 warps, sample 8192    308     [16 warps, sample 4096, block 8192 328; 80 registers 373]
    """
    block = max(4096, 2 * triton.next_power_of_2(topk))
    if width <= 2 * block:
        return Config(False, 1, 2 * block, TILE, 0, 2 * block // 512)
    sample = min(max(triton.next_power_of_2(width) // 16, 2048), 16384)
    if width > 1 << 18:
        # So few of so many, that the pivot stays coarse: the list needs room.
        block = 2 * block
    shortest = TILE if num_rows >= 8 else TILE // 2
    splits = 1
    while 2 * splits * num_rows <= num_sms and 2 * splits * shortest <= width and splits < MAX_SPLITS:
        splits *= 2
    if splits == 1:
        return Config(True, 1, block, TILE, sample, block // 512, max_registers=128)
    tile = min(TILE, max(shortest, triton.next_power_of_2(width) // splits))
    return Config(True, splits, block, tile, sample, 16)


def _options(
    target: Target | None, warps: int, max_registers: int | None = None
) -> tuple[dict[str, int], dict[str, bool]]:
    """(options of a launch, constexprs that follow from the chip); no target under the interpreter."""
    cuda = target is not None and target.is_cuda
    dependent = target is not None and dependent_launch_on(target)
    options = {"num_warps": warps}
    if cuda and max_registers:
        options["maxnreg"] = max_registers
    if dependent:
        options["launch_pdl"] = True
    return options, {"SHARED": cuda, "PDL": dependent}


def supports(target: Target) -> bool:
    return True


def select_topk(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    *,
    block_table_bp: torch.Tensor | None = None,
    seq_t: torch.Tensor | None = None,
    page_size: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows = logits_ts.shape[0]
    if out is None:
        out = torch.empty((num_rows, topk), dtype=torch.int32, device=logits_ts.device)
    rows_per_sequence = 1
    if block_table_bp is not None:
        rows_per_sequence = max(1, num_rows // max(1, block_table_bp.shape[0]))
    launch(logits_ts, start_t, end_t, topk, block_table_bp, seq_t, page_size, rows_per_sequence, 0, out)
    return out


def _vector_loads(logits_ts: torch.Tensor) -> bool:
    """Whether every row is aligned to 16 bytes and may be read up to the next multiple of 16 bytes."""
    rows, width = logits_ts.shape
    read = logits_ts.storage_offset() + (rows - 1) * logits_ts.stride(0) + triton.cdiv(width, 4) * 4
    aligned = logits_ts.stride(0) % 4 == 0 and logits_ts.data_ptr() % 16 == 0
    return aligned and 4 * read <= logits_ts.untyped_storage().nbytes()


def launch(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    block_table_bp: torch.Tensor | None,
    seq_t: torch.Tensor | None,
    page_size: int | None,
    rows_per_sequence: int,
    first_row: int,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Select for rows that are rows first_row, first_row + 1, ... of a larger problem (seq_t is indexed by those)."""
    num_rows, width = logits_ts.shape
    if num_rows == 0:
        return
    device = logits_ts.device
    chip = chip_of(device)
    num_sms = INTERPRETED_SMS if chip is None else chip.processors
    if config is None:
        config = choose(num_rows, width, topk, num_sms)
    table_stride, table_width = (
        (0, 0) if block_table_bp is None else (block_table_bp.stride(0), block_table_bp.shape[1])
    )
    row_stride = logits_ts.stride(0)
    vector = 4 if _vector_loads(logits_ts) else 1
    output = (out.stride(0), table_stride, table_width, rows_per_sequence)
    shape = {"BLOCK": config.block, "VECTOR": vector}
    options, constexprs = _options(None if chip is None else chip.target, config.num_warps, config.max_registers)
    if config.splits == 1:
        programs = min(num_rows, PROGRAMS_PER_SM * num_sms)
        lists = torch.empty((programs if config.long else 1, config.block), dtype=torch.int64, device=device)
        select_rows_kernel[(programs,)](
            logits_ts, start_t, end_t, block_table_bp, seq_t, lists, out,
            first_row, num_rows, width, row_stride, topk, *output,
            LONG=config.long, PAGE_SIZE=page_size or 0, TILE=config.tile, SAMPLE=config.sample, WARPS=config.num_warps,
            **options, **constexprs, **shape,
        )  # fmt: skip
        return
    lists = torch.empty((num_rows * (config.splits + 1), config.block), dtype=torch.int64, device=device)
    listed = torch.empty((num_rows, config.splits), dtype=torch.int32, device=device)
    collect_kernel[(num_rows * config.splits,)](
        logits_ts, start_t, end_t, lists, listed, width, row_stride, topk,
        SPLITS=config.splits, TILE=config.tile, SAMPLE=config.sample, WARPS=config.num_warps,
        **options, **constexprs, **shape,
    )  # fmt: skip
    select_lists_kernel[(num_rows,)](
        logits_ts, start_t, end_t, block_table_bp, seq_t, lists, listed, lists[num_rows * config.splits :], out,
        first_row, width, row_stride, topk, *output,
        SPLITS=config.splits, PAGE_SIZE=page_size or 0, TILE=2 * TILE, WARPS=config.num_warps,
        **options, **constexprs, **shape,
    )  # fmt: skip
