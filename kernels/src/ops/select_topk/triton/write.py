"""The selected of a block: all above the search's range, and as many ties as are due, the first in order of position.

They are written as a list, or each as the bit of its key in a row of zeros; then `table_row` is the key at which the
row of scores begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....limits import MASK_BLOCK
from .rows import prefix_sum

BLOCK = tl.constexpr(MASK_BLOCK)


@triton.jit
def located(pos, mask, table_ptr, table_row, table_width, PAGE_SIZE: tl.constexpr):
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
def _set_bit(out_ptr, key, mask):
    """Set the bits of keys in a row of zeros; `limits.mask_words` tells where they are."""
    word = key // BLOCK * 4 + key % 8 // 2
    bit = key % BLOCK // 8 * 2 + key % 2
    tl.atomic_or(out_ptr + word, 1 << bit, mask=mask, sem="relaxed")


@triton.jit
def set_range(out_ptr, first, stop):
    """Set the bits of keys first .. stop - 1 in a row of zeros."""
    for base in range(first // BLOCK, tl.cdiv(stop, BLOCK), 8):
        # [word, bit] of eight blocks
        offs_w = (base * 4 + tl.arange(0, 32))[:, None]
        bit = tl.arange(0, 32)[None, :]
        key = offs_w // 4 * BLOCK + bit // 2 * 8 + offs_w % 4 * 2 + bit % 2
        inside = (key >= first) & (key < stop)
        words = tl.sum(tl.where(inside, 1 << bit, 0), 1)
        tl.store(out_ptr + base * 4 + tl.arange(0, 32), words, mask=words != 0)


@triton.jit
def _rank(key, low, last):
    """1 for a key above those in question, 2^16 for one of them."""
    return tl.where(key > last, 1, tl.where(key >= low, 1 << 16, 0))


@triton.jit
def _put(
    rank, pos, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width,
    PAGE_SIZE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write one in four behind `sure` scores and min(ties, quota) ties; return what stands before the next."""
    ties_before = ties + (before >> 16)
    at = sure + (before & 0xFFFF) + tl.minimum(ties_before, quota)
    take = (rank == 1) | ((rank > 1) & (ties_before < quota))
    if BITS:
        _set_bit(out_ptr, table_row.to(tl.int32) + pos, take)
    else:
        tl.store(out_ptr + at, located(pos, take, table_ptr, table_row, table_width, PAGE_SIZE), mask=take)
    return before + rank


@triton.jit
def emit(
    key_0, key_1, key_2, key_3, pos_0, pos_1, pos_2, pos_3, low, last, quota, sure, ties,
    out_ptr, table_ptr, table_row, table_width, PAGE_SIZE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write the selected of one block behind `sure` scores and min(ties, quota) ties of blocks before; return both."""
    rank_0, rank_1, rank_2, rank_3 = (
        _rank(key_0, low, last),
        _rank(key_1, low, last),
        _rank(key_2, low, last),
        _rank(key_3, low, last),
    )
    before, total = prefix_sum(rank_0 + rank_1 + rank_2 + rank_3)
    before = _put(rank_0, pos_0, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS)
    before = _put(rank_1, pos_1, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS)
    before = _put(rank_2, pos_2, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS)
    before = _put(rank_3, pos_3, before, quota, sure, ties, out_ptr, table_ptr, table_row, table_width, PAGE_SIZE, BITS)
    return sure + (total & 0xFFFF), ties + (total >> 16)
