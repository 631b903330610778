"""The kernels: whole rows, chunks of rows to lists, and lists to selections."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .rows import collect, load_quads, quads, row_range
from .search import HIGHEST, LOWEST, descend, first_shift, narrow, new_bins, next_shift, order_key, tally
from .write import emit, located, set_range


@triton.jit
def _row_key(score, pos, n):
    """Order key of a score of the row; 0 outside."""
    return tl.where(pos.to(tl.uint32, bitcast=True) < n.to(tl.uint32), order_key(score), 0)


@triton.jit
def _load_keys(row_ptr, offs, skip, n, VECTOR: tl.constexpr):
    score_0, score_1, score_2, score_3 = load_quads(row_ptr, offs, skip, skip + n, False, VECTOR)
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
    return tl.where(mask, order_key(score), 0), (entry >> 32).to(tl.int32)


@triton.jit
def _select_in_memory(
    row_ptr, skip, n, topk, bins, out_ptr, table_ptr, table_row, table_width,
    PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr, SHARED: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """`narrow` over the whole row in memory: for the rare row whose list is too short or too long."""
    stop = skip + n
    local = quads(TILE, WARPS)
    low = tl.full((), LOWEST, tl.uint32)
    span = tl.full((), HIGHEST - LOWEST, tl.uint32)
    shift = first_shift(n, SHARED)
    above = n * 0
    at_least = n
    while (span > 0) & (at_least > topk):
        counts = tl.zeros((256,), tl.int32)
        for base in range(0, stop, TILE):
            key_0, key_1, key_2, key_3 = _load_keys(row_ptr, base + local, skip, n, VECTOR)
            counts = tally(counts, key_0, low, span, shift, bins, SHARED)
            counts = tally(counts, key_1, low, span, shift, bins, SHARED)
            counts = tally(counts, key_2, low, span, shift, bins, SHARED)
            counts = tally(counts, key_3, low, span, shift, bins, SHARED)
        low, span, above, at_least = descend(counts, low, shift, above, topk, bins, SHARED)
        shift = next_shift(shift, SHARED)
    last = low + span
    sure = 0
    ties = 0
    base = 0
    while sure + tl.minimum(ties, topk - above) < topk:
        key_0, key_1, key_2, key_3 = _load_keys(row_ptr, base + local, skip, n, VECTOR)
        pos = base + local - skip
        sure, ties = emit(
            key_0, key_1, key_2, key_3, pos, pos + 1, pos + 2, pos + 3, low, last, topk - above, sure, ties,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS,
        )  # fmt: skip
        base += TILE


@triton.jit
def _select_row(
    row_ptr, skip, n, topk, list_ptr, listed, bins, out_ptr, table_ptr, table_row, table_width,
    LONG: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr,
    VECTOR: tl.constexpr, SHARED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The selection of one row from its scores (at most BLOCK of them) or from its list."""
    short = (skip + n <= BLOCK) | (not LONG)
    offs_tile = tl.arange(0, TILE)
    if BITS & (n <= topk):
        set_range(out_ptr, table_row.to(tl.int32), table_row.to(tl.int32) + n)
    elif n <= topk:
        for base in range(0, topk, TILE):
            pos = base + offs_tile
            slot = located(pos, pos < n, table_ptr, table_row, table_width, PAGE_SIZE)
            tl.store(out_ptr + pos, tl.where(pos < n, slot, -1), mask=pos < topk)
    elif short:
        offs = quads(BLOCK, WARPS)
        key_0, key_1, key_2, key_3 = _load_keys(row_ptr, offs, skip, n, VECTOR)
        low, last, above = narrow(key_0, key_1, key_2, key_3, n, topk, 0, bins, SHARED)
        pos = offs - skip
        emit(
            key_0, key_1, key_2, key_3, pos, pos + 1, pos + 2, pos + 3, low, last, topk - above, 0, 0,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS,
        )  # fmt: skip
    elif (listed >= topk) & (listed <= BLOCK):
        offs = quads(BLOCK, WARPS)
        lists = list_ptr + offs
        key_0, pos_0 = _load_entry(lists, offs < listed)
        key_1, pos_1 = _load_entry(lists + 1, offs + 1 < listed)
        key_2, pos_2 = _load_entry(lists + 2, offs + 2 < listed)
        key_3, pos_3 = _load_entry(lists + 3, offs + 3 < listed)
        low, last, above = narrow(key_0, key_1, key_2, key_3, listed, topk, 0, bins, SHARED)
        emit(
            key_0, key_1, key_2, key_3, pos_0, pos_1, pos_2, pos_3, low, last, topk - above, 0, 0,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS,
        )  # fmt: skip
    else:
        _select_in_memory(
            row_ptr, skip, n, topk, bins, out_ptr, table_ptr, table_row, table_width,
            PAGE_SIZE, TILE, WARPS, VECTOR, SHARED, BITS,
        )  # fmt: skip


@triton.jit
def _table_row(table_ptr, seq_ptr, start_ptr, row, inside, width, rows_per_sequence, table_stride, BITS: tl.constexpr):
    """Where in the block table the row of scores finds its pages; for BITS the key at which it begins."""
    offset = tl.zeros((), tl.int64)
    if BITS:
        if start_ptr is not None:
            offset = tl.minimum(tl.maximum(tl.load(start_ptr + inside).to(tl.int32), 0), width).to(tl.int64)
    elif table_ptr is not None:
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
    WARPS: tl.constexpr, VECTOR: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Whole rows, one program a row at a time; a program reuses its own list."""
    pid = tl.program_id(0)
    bins = new_bins(pid, SHARED)
    if PDL:
        gdc_wait()
    list_ptr += pid.to(tl.int64) * BLOCK
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(num_rows - pid, programs)):
        row = pid + turn * programs
        row_ptr, skip, n = row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR)
        table_row = _table_row(
            table_ptr, seq_ptr, start_ptr, first_row + row, row, width, rows_per_sequence, table_stride, BITS
        )
        _prefetch_table(table_ptr, table_row, n, table_width, PAGE_SIZE, SHARED)
        listed = 0
        if LONG:  # noqa: SIM102 - known when compiling, so that short rows carry no code for lists
            if (skip + n > BLOCK) & (n > topk):
                listed = collect(
                    row_ptr, skip, n, 0, skip + n, topk, list_ptr, bins, BLOCK, TILE, SAMPLE, WARPS, VECTOR, SHARED
                )
                tl.debug_barrier()
        _select_row(
            row_ptr, skip, n, topk, list_ptr, listed, bins, out_ptr + row.to(tl.int64) * out_stride,
            table_ptr, table_row, table_width, LONG, PAGE_SIZE, BLOCK, TILE, WARPS, VECTOR, SHARED, BITS,
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
    bins = new_bins(pid, SHARED)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = pid // SPLITS
    row_ptr, skip, n = row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR)
    chunk = tl.cdiv(skip + n, SPLITS * TILE) * TILE
    begin = (pid % SPLITS) * chunk
    stop = tl.minimum(begin + chunk, skip + n)
    listed = 0
    if (skip + n > BLOCK) & (n > topk) & (begin < stop):
        list_ptr += pid.to(tl.int64) * BLOCK
        listed = collect(
            row_ptr, skip, n, begin, stop, topk, list_ptr, bins, BLOCK, TILE, SAMPLE, WARPS, VECTOR, SHARED
        )
    tl.store(listed_ptr + pid, listed)


@triton.jit(do_not_specialize=["first_row", *COMMON, *OUTPUT])
def select_lists_kernel(
    logits_ptr, start_ptr, end_ptr, table_ptr, seq_ptr, list_ptr, listed_ptr, joined_ptr, out_ptr,
    first_row, width, row_stride, topk, out_stride, table_stride, table_width, rows_per_sequence,
    SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr,
    VECTOR: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Select from the lists of a row's chunks, which are in order already."""
    row = tl.program_id(0)
    bins = new_bins(row, SHARED)
    # Older than the lists, so it need not wait for them.
    row_ptr, skip, n = row_range(logits_ptr, start_ptr, end_ptr, row, width, row_stride, VECTOR)
    table_row = _table_row(
        table_ptr, seq_ptr, start_ptr, first_row + row, row, width, rows_per_sequence, table_stride, BITS
    )
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
        offs = quads(BLOCK, WARPS)
        chunk = row * SPLITS + offs // share
        length = tl.load(listed_ptr + chunk)
        place = offs % share
        lists = list_ptr + chunk.to(tl.int64) * BLOCK + place
        key_0, pos_0 = _load_entry(lists, place < length)
        key_1, pos_1 = _load_entry(lists + 1, place + 1 < length)
        key_2, pos_2 = _load_entry(lists + 2, place + 2 < length)
        key_3, pos_3 = _load_entry(lists + 3, place + 3 < length)
        low, last, above = narrow(key_0, key_1, key_2, key_3, total, topk, 0, bins, SHARED)
        emit(
            key_0, key_1, key_2, key_3, pos_0, pos_1, pos_2, pos_3, low, last, topk - above, 0, 0,
            out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS,
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
        table_ptr, table_row, table_width, True, PAGE_SIZE, BLOCK, TILE, WARPS, VECTOR, SHARED, BITS,
    )  # fmt: skip
