"""Index logits of fp8 keys on NVIDIA sm90: keys come by TMA, and sums hide behind products.

A page of 64 keys is the rows of a wgmma, and the heads of up to four query tokens are its columns, so the keys are read
once for all of them. The columns are multiplied in two parts: while the second is under way, the first is summed over
its heads. Two programs or more share a multiprocessor, and what one of them cannot hide, the others do.

Measured on one H100 (medians, us, L2 flushed before each launch), in brackets the portable kernel in another run:

    1 query token     B=1 L=128K 9.4 [10.8], B=16 L=32K 28.0 [33.0], B=64 L=32K 103 [110], B=128 L=8K 52.5 [57.9]
    4 query tokens    B=1 L=128K 14.8 [20.7], B=16 L=32K 41.7 [59.1], B=64 L=32K 150 [177], B=128 L=8K 78.5 [98.2]
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own, and a constant is an int.
# mypy: disable-error-code="assignment, attr-defined, misc"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
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
from triton.language.extra.cuda import gdc_wait

from ...cache_layout import INDEX_BYTES, SCALE_BYTES
from ..aot import AotCase, Target
from . import triton as portable

PAGE = gl.constexpr(64)
HEADS = gl.constexpr(64)
DIM = gl.constexpr(128)
LINE = 128
"""Bytes of a row of the cache as the copies see it: a key is one, the scales of a page two."""
WARPS = 4

KEYS_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
SCALES_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
VECTOR_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
QUERIES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
TILE_BYTES = gl.constexpr(64 * INDEX_BYTES)


@gluon.jit
def _load_queries(
    q_ptr, w_ptr, first, count, q_stride_token, q_stride_head, w_stride, heads, TOKENS: gl.constexpr,
    PARTS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Queries [TOKENS * HEADS, DIM] of `count` tokens from `first`; half the weights of each part of the columns."""
    column = gl.arange(0, TOKENS * HEADS, layout=gl.SliceLayout(1, QUERIES))
    offs_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, QUERIES))
    token = (first + gl.minimum(column // HEADS, count - 1)).to(gl.int64)
    head = gl.minimum(column % HEADS, heads - 1)
    q = gl.load(q_ptr + (token * q_stride_token + head * q_stride_head)[:, None] + offs_d[None, :])
    COLUMNS: gl.constexpr = TOKENS * HEADS // PARTS
    weights = ()
    for part in gl.static_range(PARTS):
        column = part * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ACC))
        token = (first + gl.minimum(column // HEADS, count - 1)).to(gl.int64)
        head = column % HEADS
        mask = (column // HEADS < count) & (head < heads)
        weights += (0.5 * gl.load(w_ptr + token * w_stride + head, mask=mask, other=0.0),)
    return q, weights


@gluon.jit
def _multiply(k_shared, q_shared, PARTS: gl.constexpr, ACC: gl.constexpr):
    """Start the products of the keys of a page by each part of the columns."""
    COLUMNS: gl.constexpr = q_shared.shape[0] // PARTS
    dots = ()
    for part in gl.static_range(PARTS):
        nothing = gl.zeros([PAGE, COLUMNS], gl.float32, layout=ACC)
        q_part = q_shared.slice(part * COLUMNS, COLUMNS, dim=0).permute((1, 0))
        dots += (warpgroup_mma(k_shared, q_part, nothing, use_acc=False, is_async=True),)
    return dots


@gluon.jit
def _partial(dots, weight, ROWS: gl.constexpr):
    """[PAGE, ROWS tokens, 4]: sums of 2 * weight * relu(dots) over what each of four neighbouring lanes holds.

    x + |x| is 2 relu(x) exactly, and an addition has twice the rate of a maximum.
    """
    terms = (dots + gl.abs(dots)) * weight[None, :]
    PAIRS: gl.constexpr = dots.shape[1] // ROWS // 8
    terms = terms.reshape(PAGE, ROWS, PAIRS, 4, 2).permute(0, 1, 3, 2, 4)
    return gl.sum(terms.reshape(PAGE, ROWS, 4, 2 * PAIRS), 3)


@gluon.jit
def _exchange(keep, give, DISTANCE: gl.constexpr):
    """keep + what the lane at this distance gives."""
    if DISTANCE == 1:
        given = gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=f,f", [give], dtype=gl.float32, is_pure=True, pack=1
        )
    else:
        given = gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "=f,f", [give], dtype=gl.float32, is_pure=True, pack=1
        )
    return keep + given


@gluon.jit
def _score(dots, weights, TOKENS: gl.constexpr):
    """[PAGE, 4]: the scores; of four neighbouring lanes the i-th has those of token i * TOKENS // 4.

    While one part of the columns is summed, the next is multiplied.
    """
    ROWS: gl.constexpr = 2 if TOKENS == 4 else 1
    if TOKENS == 1:
        both = _partial(warpgroup_mma_wait(0, deps=(dots[0],)), weights[0], ROWS)
        both = _exchange(both, both, 2)
    else:
        first = _partial(warpgroup_mma_wait(1, deps=(dots[0],)), weights[0], ROWS)
        second = _partial(warpgroup_mma_wait(0, deps=(dots[1],)), weights[1], ROWS)
        LANES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, first.type.layout))
        upper = gl.arange(0, 4, layout=LANES)[None, :][None, :, :] >= 2
        both = _exchange(gl.where(upper, second, first), gl.where(upper, first, second), 2)
    if TOKENS == 4:
        even, odd = gl.split(both.permute(0, 2, 1))
        COLUMN: gl.constexpr = gl.SliceLayout(0, even.type.layout)
        is_odd = gl.arange(0, 4, layout=COLUMN)[None, :] % 2 != 0
        score = _exchange(gl.where(is_odd, odd, even), gl.where(is_odd, even, odd), 1)
    else:
        score = _exchange(both, both, 1).reshape(PAGE, 4)
    return gl.convert_layout(score, SCORES, assert_trivial=True)


@gluon.jit
def _fill(out_ptr, out_stride, count, begin, stop):
    """-inf for positions begin .. stop - 1 of the tokens."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    nothing = gl.full([512], float("-inf"), gl.float32, layout=LAYOUT)
    for token in range(count):
        row_ptr = out_ptr + token.to(gl.int64) * out_stride
        for base in range(begin, stop, 512):
            position = base + gl.arange(0, 512, layout=LAYOUT)
            gl.store(row_ptr + position, nothing, mask=position < stop)


PAGED_SCALARS = [*portable.PAGED_SCALARS, "splits", "page_lines"]


@gluon.jit
def _page(table_ptr, index, stop, num_pages, table_width):
    """Page number `index` of a sequence, -1 where it is not in the cache."""
    page = gl.load(table_ptr + index, mask=(index < stop) & (index < table_width), other=-1)
    return gl.where(page < num_pages, page, -1)


@gluon.jit
def _copy(keys_desc, scales_desc, page, page_lines, k_shared, s_shared, full, stage, needed):
    """Start copying one page; an absent one is read from elsewhere and its scores are dropped."""
    line = gl.maximum(page, 0) * page_lines
    mbarrier.expect(full.index(stage), TILE_BYTES, pred=needed)
    tma.async_copy_global_to_shared(keys_desc, [line, 0], full.index(stage), k_shared.index(stage), pred=needed)
    tma.async_copy_global_to_shared(
        scales_desc, [line + PAGE, 0], full.index(stage), s_shared.index(stage), pred=needed
    )


@gluon.jit(do_not_specialize=PAGED_SCALARS)
def paged_kernel(
    keys_desc, scales_desc, q_ptr, w_ptr, table_ptr, visible_ptr, out_ptr,
    tokens, num_pages, max_visible, selected, heads, chunk, table_width, splits, page_lines,
    q_stride_seq, q_stride_token, q_stride_head, w_stride_seq, w_stride_token,
    table_stride, visible_stride, out_stride_seq, out_stride_token,
    FILL: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of TOKENS tokens of one sequence for one of `splits` chunks of its pages, each of `chunk` pages at least.

    Without FILL only of keys that one of the tokens sees, and none if each of them sees no more than are `selected`.
    """
    COLUMNS: gl.constexpr = TOKENS * HEADS
    PARTS: gl.constexpr = 1 if TOKENS == 1 else 2
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS // PARTS, 32])
    k_shared = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, PAGE, DIM], KEYS_SHARED)
    s_shared = gl.allocate_shared_memory(gl.float32, [STAGES, 2, 32], SCALES_SHARED)
    q_shared = gl.allocate_shared_memory(gl.float8e4nv, [COLUMNS, DIM], KEYS_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gdc_wait()

    groups = gl.cdiv(tokens, TOKENS)
    pid = gl.program_id(0)
    first_token = pid % groups * TOKENS
    seq = (pid // groups // splits).to(gl.int64)
    tokens = gl.minimum(tokens - first_token, TOKENS)
    visible_ptr += seq * visible_stride + first_token
    table_ptr += seq * table_stride
    out_ptr += seq * out_stride_seq + first_token.to(gl.int64) * out_stride_token

    # Everything that the first product needs is on its way before the first of it is waited for, but that without
    # FILL the sequence's own length is cut into chunks, so that all programs work however short it is.
    longest = 0
    for token in gl.static_range(TOKENS):
        longest = gl.maximum(longest, gl.load(visible_ptr + token, mask=token < tokens, other=0))
    longest = gl.minimum(longest, max_visible)
    if not FILL:
        longest = gl.where(longest > selected, longest, 0)
    pages = gl.cdiv(max_visible if FILL else longest, PAGE)
    chunk = gl.maximum(gl.cdiv(pages, splits), chunk)
    begin = pid // groups % splits * chunk
    stop = gl.minimum(begin + chunk, pages)
    ahead = ()
    for stage in gl.static_range(STAGES - 1):
        ahead += (_page(table_ptr, begin + stage, stop, num_pages, table_width),)
    q, weights = _load_queries(
        q_ptr + seq * q_stride_seq, w_ptr + seq * w_stride_seq, first_token, tokens, q_stride_token, q_stride_head,
        w_stride_token, heads, TOKENS, PARTS, ACC,
    )  # fmt: skip
    offs_k = gl.arange(0, PAGE, layout=gl.SliceLayout(1, SCORES))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, SCORES))
    offs_t = lane * TOKENS // 4
    mask_t = (offs_t < tokens) & (lane % (4 // TOKENS) == 0)
    visible_t = gl.load(visible_ptr + offs_t, mask=mask_t, other=0)
    out_rows = out_ptr + offs_t.to(gl.int64)[None, :] * out_stride_token + offs_k[:, None]
    stop_visible = gl.minimum(gl.cdiv(longest, PAGE), stop)
    for stage in gl.static_range(STAGES - 1):
        needed = begin + stage < stop_visible
        _copy(keys_desc, scales_desc, ahead[stage], page_lines, k_shared, s_shared, full, stage, needed)
    q_shared.store(q)
    fence_async_shared()
    gl.thread_barrier()

    page = ahead[0]
    following = _page(table_ptr, begin + STAGES - 1, stop, num_pages, table_width)
    for index in range(begin, stop_visible):
        i = index - begin
        buffer = i % STAGES
        present = page >= 0
        page = _page(table_ptr, index + 1, stop, num_pages, table_width)
        mbarrier.wait(full.index(buffer), (i // STAGES) & 1)
        dots = _multiply(k_shared.index(buffer), q_shared, PARTS, ACC)
        # The buffer that the last step has read takes the page that is next to be copied.
        gl.thread_barrier()
        _copy(
            keys_desc, scales_desc, following, page_lines, k_shared, s_shared, full, (i + STAGES - 1) % STAGES,
            index + STAGES - 1 < stop_visible,
        )  # fmt: skip
        following = _page(table_ptr, index + STAGES, stop, num_pages, table_width)
        scale = s_shared.index(buffer)._reinterpret(gl.float32, [PAGE], VECTOR_SHARED).load(gl.SliceLayout(1, SCORES))
        score = _score(dots, weights, TOKENS) * scale[:, None]
        position = index * PAGE + offs_k
        score = gl.where((position[:, None] < visible_t[None, :]) & present, score, float("-inf"))
        gl.store(out_rows + index * PAGE, score, mask=mask_t[None, :] & (position < max_visible)[:, None])

    if FILL:
        filled = gl.maximum(begin, stop_visible) * PAGE
        _fill(out_ptr, out_stride_token, tokens, filled, gl.minimum(stop * PAGE, max_visible))


@gluon.jit
def _copy_keys(keys_desc, base, k_shared, full, stage, needed):
    mbarrier.expect(full.index(stage), PAGE * DIM, pred=needed)
    tma.async_copy_global_to_shared(keys_desc, [base, 0], full.index(stage), k_shared.index(stage), pred=needed)


@gluon.jit(do_not_specialize=portable.RAGGED_SCALARS)
def ragged_kernel(
    keys_desc, q_ptr, w_ptr, scale_ptr, start_ptr, end_ptr, out_ptr,
    num_tokens, num_keys, heads, chunk, q_stride_token, q_stride_head, w_stride, out_stride,
    FILL: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of TOKENS tokens for one chunk of the keys; without FILL only of keys that one of the tokens sees."""
    PARTS: gl.constexpr = 2
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS * HEADS // PARTS, 32])
    k_shared = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, PAGE, DIM], KEYS_SHARED)
    q_shared = gl.allocate_shared_memory(gl.float8e4nv, [TOKENS * HEADS, DIM], KEYS_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    gl.thread_barrier()

    chunks = gl.cdiv(num_keys, chunk)
    pid = gl.program_id(0)
    first = pid // chunks * TOKENS
    count = gl.minimum(num_tokens - first, TOKENS)
    begin = pid % chunks * chunk
    stop = gl.minimum(begin + chunk, num_keys)
    lowest = num_keys
    highest = 0
    for token in gl.static_range(TOKENS):
        start = gl.load(start_ptr + first + token, mask=token < count, other=0)
        end = gl.load(end_ptr + first + token, mask=token < count, other=0)
        lowest = gl.minimum(lowest, gl.where(start < end, start, num_keys))
        highest = gl.maximum(highest, gl.where(start < end, end, 0))
    low = gl.maximum(lowest // PAGE * PAGE, begin)
    high = gl.minimum(highest, stop)
    out_ptr += first.to(gl.int64) * out_stride

    if low < high:
        for stage in gl.static_range(STAGES - 1):
            base = low + stage * PAGE
            _copy_keys(keys_desc, base, k_shared, full, stage, base < high)
        q, weights = _load_queries(
            q_ptr, w_ptr, first, count, q_stride_token, q_stride_head, w_stride, heads, TOKENS, PARTS, ACC
        )
        offs_k = gl.arange(0, PAGE, layout=gl.SliceLayout(1, SCORES))
        offs_t = gl.arange(0, 4, layout=gl.SliceLayout(0, SCORES))
        mask_t = offs_t < count
        if FILL:
            start_t = gl.load(start_ptr + first + offs_t, mask=mask_t, other=0)
            end_t = gl.load(end_ptr + first + offs_t, mask=mask_t, other=0)
        out_rows = out_ptr + offs_t.to(gl.int64)[None, :] * out_stride + offs_k[:, None]
        q_shared.store(q)
        fence_async_shared()
        gl.thread_barrier()
        for base in range(low, high, PAGE):
            i = (base - low) // PAGE
            buffer = i % STAGES
            position = base + offs_k
            scale = gl.load(scale_ptr + position, mask=position < num_keys, other=0.0)
            mbarrier.wait(full.index(buffer), (i // STAGES) & 1)
            dots = _multiply(k_shared.index(buffer), q_shared, PARTS, ACC)
            # The buffer that the last step has read takes the keys that are next to be copied.
            gl.thread_barrier()
            following = base + (STAGES - 1) * PAGE
            _copy_keys(keys_desc, following, k_shared, full, (i + STAGES - 1) % STAGES, following < high)
            score = _score(dots, weights, TOKENS) * scale[:, None]
            if FILL:
                visible = (position[:, None] >= start_t[None, :]) & (position[:, None] < end_t[None, :])
                score = gl.where(visible, score, float("-inf"))
            gl.store(out_rows + base, score, mask=mask_t[None, :] & (position < stop)[:, None])
    if FILL:
        low = gl.where(low < high, low, stop)
        _fill(out_ptr, out_stride, count, begin, low)
        _fill(out_ptr, out_stride, count, low + gl.cdiv(gl.maximum(high - low, 0), PAGE) * PAGE, stop)


class Config(NamedTuple):
    """How one launch runs: `tokens` share a read of the keys, which have `stages` buffers.

    `programs` is how many of them a multiprocessor holds.
    """

    tokens: int
    stages: int
    programs: int = 2


def choose(tokens: int) -> Config:
    """The configuration for tokens that see the same keys."""
    return CONFIGS[min(3, tokens)]


CONFIGS = {1: Config(1, 3, 4), 2: Config(2, 3, 4), 3: Config(4, 4, 2)}
"""Tokens, from 3 on any number -> configuration.

H100, microseconds, the others that were tried with one version of the kernel in brackets:
    B=1 L=128K N=1      3 buffers, 4 programs   9.6     [5 buffers 10.0, 6 programs 9.9, 12 buffers and 2 programs 11.1]
    B=16 L=32K N=2      3 buffers, 4 programs   31.0    [2 programs 31.7]
    B=64 L=32K N=4      4 buffers, 2 programs   157     [3 buffers 156, 5 buffers 158, 6 buffers 159]
"""

RAGGED_CHUNK = 8192
"""Keys a program scores: short enough to balance causal rows, long enough to hide the loading of the queries."""


@functools.cache
def choose_splits(parts: int, pages: int, programs: int) -> int:
    """Chunks of a sequence's pages, so that as few of the resident programs as possible idle in their last round."""

    def cost(splits: int) -> int:
        # A program's beginning, until its first keys arrive, costs about as much as four pages.
        return triton.cdiv(parts * splits, programs) * (triton.cdiv(pages, splits) + 4)

    return min(range(1, min(pages, triton.cdiv(4 * programs, parts)) + 1), key=cost)


def _fits(heads: int, *matrices: torch.Tensor) -> bool:
    """Whether the kernels of this file can run; `matrices` are what is copied, rows of DIM bytes."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in matrices)
    return aligned and heads <= HEADS.value


def index_logits_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    *,
    max_visible: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is None:
        out = torch.empty((*visible_bn.shape, max_visible), dtype=torch.float32, device=q_bnid.device)
    launch_paged(q_bnid, weights_bni, index_cache, block_table_bp, visible_bn, out, fill=True)
    return out


def launch_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    out: torch.Tensor,
    *,
    fill: bool,
    selected: int = 0,
    config: Config | None = None,
) -> None:
    """As the portable one."""
    sequences, tokens, heads, index_dim = q_bnid.shape
    pages, page_size, _ = index_cache.shape
    suits = index_cache.dtype is torch.uint8 and index_dim == DIM.value and page_size == PAGE.value and pages > 0
    if not suits or index_cache.stride(0) % LINE or not _fits(heads, index_cache):
        portable.launch_paged(
            q_bnid, weights_bni, index_cache, block_table_bp, visible_bn, out, fill=fill, selected=selected
        )
        return
    if out.numel() == 0:
        return
    q_bnid = q_bnid.view(torch.float8_e4m3fn)
    # The cache as lines of 128 bytes: a key is one line of e4m3, the scales of a page are two lines of float32.
    lines = index_cache.stride(0) // LINE
    shape = [(pages - 1) * lines + PAGE.value * INDEX_BYTES // LINE, LINE]
    keys = TensorDescriptor(
        index_cache.view(torch.float8_e4m3fn), shape, [LINE, 1], [PAGE.value, DIM.value], KEYS_SHARED.value
    )
    words = LINE // SCALE_BYTES
    scales = TensorDescriptor(
        index_cache.view(torch.float32), [shape[0], words], [words, 1], [2, words], SCALES_SHARED.value
    )
    config = config or choose(tokens)
    groups = triton.cdiv(tokens, config.tokens)
    max_visible = out.shape[2]
    splits = choose_splits(
        sequences * groups, triton.cdiv(max_visible, PAGE.value), config.programs * _multiprocessors(q_bnid.device)
    )
    paged_kernel[(sequences * groups * splits,)](
        keys, scales, q_bnid, weights_bni, block_table_bp, visible_bn, out,
        tokens, pages, max_visible, selected, heads, portable.LEAST_TILES, block_table_bp.shape[1], splits, lines,
        *q_bnid.stride()[:3], *weights_bni.stride()[:2], block_table_bp.stride(0), visible_bn.stride(0),
        *out.stride()[:2],
        FILL=fill, TOKENS=config.tokens, STAGES=config.stages, num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def index_logits_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is None:
        out = torch.empty((q_tid.shape[0], k_sd.shape[0]), dtype=torch.float32, device=q_tid.device)
    launch_ragged(q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t, out, fill=True)
    return out


def launch_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    out: torch.Tensor,
    *,
    fill: bool,
    chunk: int = RAGGED_CHUNK,
    config: Config | None = None,
) -> None:
    """Without `fill` what lies outside a token's range is left as it is, or holds any score."""
    num_tokens, heads, index_dim = q_tid.shape
    num_keys = k_sd.shape[0]
    if k_scale_s is None or index_dim != DIM.value or not _fits(heads, k_sd):
        portable.launch_ragged(q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t, out, fill=fill)
        return
    if num_tokens == 0 or num_keys == 0:
        return
    q_tid, k_sd = q_tid.view(torch.float8_e4m3fn), k_sd.view(torch.float8_e4m3fn)
    keys = TensorDescriptor(
        k_sd, [num_keys, DIM.value], [k_sd.stride(0), 1], [PAGE.value, DIM.value], KEYS_SHARED.value
    )
    config = config or choose(4)
    grid = triton.cdiv(num_tokens, config.tokens) * triton.cdiv(num_keys, chunk)
    ragged_kernel[(grid,)](
        keys, q_tid, weights_ti, k_scale_s, start_t, end_t, out,
        num_tokens, num_keys, heads, chunk, *q_tid.stride()[:2], weights_ti.stride(0), out.stride(0),
        FILL=fill, TOKENS=config.tokens, STAGES=config.stages, num_warps=WARPS,
    )  # fmt: skip


def aot_cases(target: Target) -> list[AotCase]:
    """Sizes of DeepSeek-V3.2 with an fp8 cache; the other dtypes are the portable kernels'."""
    if target.name != "sm90":
        return []
    keys = f"tensordesc<fp8e4nv[64, 128],{KEYS_SHARED.value!r}>"
    common = {"keys_desc": keys, "q_ptr": "*fp8e4nv:16", "w_ptr": "*fp32:16", "out_ptr": "*fp32:16"}
    common |= dict.fromkeys(["q_stride_token", "q_stride_head"], "i32:16")
    ragged = common | dict.fromkeys(["start_ptr", "end_ptr"], "*i32:16") | dict.fromkeys(portable.RAGGED_SCALARS, "i32")
    ragged |= {"scale_ptr": "*fp32:16", "w_stride": "i32:16"}
    found = []
    for fill in (True, False):
        config = choose(4)
        constexprs = {"FILL": fill, "TOKENS": config.tokens, "STAGES": config.stages}
        name = "ragged" + ("" if fill else "-unfilled")
        found.append(AotCase(name, ragged_kernel, ragged, constexprs, WARPS))
    paged = common | dict.fromkeys(PAGED_SCALARS, "i32")
    paged |= {"scales_desc": f"tensordesc<fp32[2, 32],{SCALES_SHARED.value!r}>"}
    paged |= dict.fromkeys(["table_ptr", "visible_ptr"], "*i32:16")
    paged |= dict.fromkeys(["q_stride_seq", "w_stride_seq", "w_stride_token"], "i32:16")
    for config in CONFIGS.values():
        for fill in (True, False):
            constexprs = {"FILL": fill, "TOKENS": config.tokens, "STAGES": config.stages}
            name = f"paged-tokens{config.tokens}" + ("" if fill else "-unfilled")
            found.append(AotCase(name, paged_kernel, paged, constexprs, WARPS, options={"launch_pdl": True}))
    return found
