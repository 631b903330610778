"""Where the selected rows lie: device functions that the kernels of sm90 share."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KEYS = gl.constexpr(64)
"""Keys a step."""
UNIT = gl.constexpr(16)
"""Rows and pages begin at multiples of so many elements."""


@gluon.jit
def last_present(index_ptr, begin, limit, num_slots, SCAN: gl.constexpr):
    """Past the last slot present: absent ones at the end are no work, and most lists end with them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    offs_k = begin + gl.arange(0, SCAN, layout=LAYOUT)
    slot = gl.load(index_ptr + offs_k, mask=offs_k < limit, other=-1)
    return gl.max(gl.where((slot >= 0) & (slot < num_slots), offs_k + 1, begin), 0)


@gluon.jit
def load_slots(index_ptr, start, limit, LAYOUT: gl.constexpr):
    """The slots of one step, -1 past the limit."""
    offs_k = start + gl.arange(0, KEYS, layout=LAYOUT)
    return gl.load(index_ptr + offs_k, mask=offs_k < limit, other=-1)


@gluon.jit
def row_units(slot, num_slots, stride_page, WIDTH: gl.constexpr, PAGE: gl.constexpr):
    """Where the rows of slots begin, in units of 16 elements; -1 for absent ones."""
    present = (slot >= 0) & (slot < num_slots)
    units = (slot // PAGE).to(gl.int64) * (stride_page // UNIT) + (slot % PAGE) * (WIDTH // UNIT)
    return gl.where(present, units, -1)
