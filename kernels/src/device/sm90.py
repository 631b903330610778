"""What the attention kernels of sm90 share: which rows a program attends to, its barriers, its queries, its softmax.

The keys of a program are a tuple (index_ptr, begin, limit, num_slots): a list of slots, or a row of the block table.
Warps are specialised: some only fetch rows into buffers in shared memory, and two rows of mbarriers say which buffers
are full and which are empty again.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from ..cache_layout import (
    LATENT_BYTES_FP8,
    LATENT_RANK,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    LATENT_TILE,
    LATENT_TILES,
    ROPE_DIM,
)

RANK = gl.constexpr(LATENT_RANK)
ROPE = gl.constexpr(ROPE_DIM)
TILE = gl.constexpr(LATENT_TILE)
"""Latents of an fp8 row that share a scale."""
TILES = gl.constexpr(LATENT_TILES)
FP8_BYTES = gl.constexpr(LATENT_BYTES_FP8)
FP8_SCALES = gl.constexpr(LATENT_SCALES_OFFSET)
FP8_ROPE = gl.constexpr(LATENT_ROPE_OFFSET)
LN2 = gl.constexpr(0.6931471805599453)
KEYS = gl.constexpr(64)
"""Keys a step."""
UNIT = gl.constexpr(16)
"""Rows and pages begin at multiples of so many elements."""
NEWER = hasattr(gl, "barrier")
"""Triton 3.7 or newer, which gives out registers otherwise; can go with 3.6, whose barrier is thread_barrier."""
barrier = gl.barrier if NEWER else gl.thread_barrier
"""Every thread of the program waits here for the others."""


@gluon.jit
def prologue(
    index_ptr,
    seq_ptr,
    visible_ptr,
    stride_index,
    num_slots,
    num_keys,
    chunk,
    table_pages,
    SPLITS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    PAGE: gl.constexpr,
    PAGED: gl.constexpr,
):
    """(token, chunk of its keys, block of its heads, the chunk's keys) of this program.

    The kernel before may still run when a program begins (programmatic dependent launch), so nothing is read before
    the wait.
    """
    pid = gl.program_id(0)
    head_block = pid % HEAD_BLOCKS
    split = (pid // HEAD_BLOCKS) % SPLITS
    t = (pid // (HEAD_BLOCKS * SPLITS)).to(gl.int64)
    gdc_wait()
    begin = split * chunk
    limit = gl.minimum(begin + chunk, num_keys)
    if PAGED:
        index_ptr += gl.load(seq_ptr + t).to(gl.int64) * stride_index
        limit = gl.minimum(limit, gl.minimum(gl.load(visible_ptr + t), table_pages * PAGE))
    else:
        index_ptr += t * stride_index
    return t, split, head_block, (index_ptr, begin, limit, num_slots)


@gluon.jit
def barriers(BUFFERS: gl.constexpr, FILLS: gl.constexpr, RELEASES: gl.constexpr):
    """(full, empty), an mbarrier of each for every buffer: so many arrivals fill it, so many release it."""
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=FILLS)
        mbarrier.init(empty.index(i), count=RELEASES)
    return full, empty


@gluon.jit
def load_query(ptr, stride_h, first, heads, HEADS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """[HEADS, WIDTH] of a token's query from head `first` on, 0 past its last head."""
    offs_h = first + gl.arange(0, HEADS, layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    rows = ptr + offs_h.to(gl.int64) * stride_h
    return gl.load(rows[:, None] + offs_d[None, :], mask=(offs_h < heads)[:, None], other=0.0)


@gluon.jit
def raise_max(running_max, step_max):
    """(the maximum with this step, what is subtracted from its scores: 0 while no key was seen)."""
    new_max = gl.maximum(running_max, step_max)
    return new_max, gl.where(new_max == float("-inf"), 0.0, new_max)


@gluon.jit
def reciprocal(running_sum):
    """What the result is multiplied with; 1 where no key was seen."""
    return 1.0 / gl.where(running_sum == 0.0, 1.0, running_sum)


@gluon.jit
def log_sum_exp(running_max, running_sum):
    """Natural, of scores in powers of two; -inf where no key was seen."""
    return gl.where(running_sum == 0.0, float("-inf"), (running_max + gl.log2(running_sum)) * LN2)


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
    # slot [KEYS]
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


@gluon.jit
def units_of(
    step, keys, stride_page, WIDTH: gl.constexpr, PAGE: gl.constexpr, PAGED: gl.constexpr, LAYOUT: gl.constexpr
):
    """Where the rows of one step begin, for a layout of the rows."""
    return row_units(load_slots(keys, step, PAGE, PAGED, gl.SliceLayout(1, LAYOUT)), stride_page, WIDTH, PAGE)
