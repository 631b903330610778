"""Which rows a program attends to: device functions that the kernels of sm90 share.

The keys of a program are a tuple (index_ptr, begin, limit, num_slots): a list of slots, or a row of the block table.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KEYS = gl.constexpr(64)
"""Keys a step."""
UNIT = gl.constexpr(16)
"""Rows and pages begin at multiples of so many elements."""


@gluon.jit
def keys_of(
    t,
    split,
    index_ptr,
    seq_ptr,
    visible_ptr,
    stride_index,
    num_slots,
    num_keys,
    chunk,
    table_pages,
    PAGE: gl.constexpr,
    PAGED: gl.constexpr,
):
    """The keys of one chunk of token t."""
    begin = split * chunk
    limit = gl.minimum(begin + chunk, num_keys)
    if PAGED:
        index_ptr += gl.load(seq_ptr + t).to(gl.int64) * stride_index
        limit = gl.minimum(limit, gl.minimum(gl.load(visible_ptr + t), table_pages * PAGE))
    else:
        index_ptr += t * stride_index
    return index_ptr, begin, limit, num_slots


@gluon.jit
def count_steps(keys, SCAN: gl.constexpr, PAGED: gl.constexpr):
    """Steps to the last key; absent slots at the end are no work, and most lists end with them.

    At least one, so that all groups of warps agree: without any key its weights are zero.
    """
    index_ptr, begin, limit, num_slots = keys
    end = limit
    if not PAGED:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        offs_k = begin + gl.arange(0, SCAN, layout=LAYOUT)
        slot = gl.load(index_ptr + offs_k, mask=offs_k < limit, other=-1)
        end = gl.max(gl.where((slot >= 0) & (slot < num_slots), offs_k + 1, begin), 0)
    return gl.maximum((end - begin + KEYS - 1) // KEYS, 1)


@gluon.jit
def load_slots(keys, step, PAGE: gl.constexpr, PAGED: gl.constexpr, LAYOUT: gl.constexpr):
    """The slots of one step, -1 for absent ones."""
    index_ptr, begin, limit, num_slots = keys
    offs_k = begin + step * KEYS + gl.arange(0, KEYS, layout=LAYOUT)
    if PAGED:
        page = gl.load(index_ptr + offs_k // PAGE, mask=offs_k < limit, other=-1)
        slot = gl.where((page >= 0) & (page < num_slots // PAGE), page * PAGE + offs_k % PAGE, -1)
    else:
        slot = gl.load(index_ptr + offs_k, mask=offs_k < limit, other=-1)
        slot = gl.where(slot < num_slots, slot, -1)
    return slot


@gluon.jit
def row_units(slot, stride_page, WIDTH: gl.constexpr, PAGE: gl.constexpr):
    """Where the rows of slots begin, in units of 16 elements; -1 for absent ones."""
    units = (slot // PAGE).to(gl.int64) * (stride_page // UNIT) + (slot % PAGE) * (WIDTH // UNIT)
    return gl.where(slot >= 0, units, -1)
