"""Index logits of fp8 keys on NVIDIA sm90: keys come by TMA, and four programs share a multiprocessor.

A page of 64 keys is the rows of a wgmma, and the heads of up to two query tokens are its columns. While a warp issues
products it cannot sum over heads, so the tensor cores and the other units are busy at once only if several programs do
both at different moments. A program is therefore kept small enough for four, and more than two tokens of a sequence are
several programs, which find each other's keys in the L2 cache.
"""

# Triton's tuples grow in static loops; to mypy each length is a type of its own, and a constant is an int.
# mypy: disable-error-code="assignment, attr-defined, misc"

from __future__ import annotations

import functools
from typing import Any

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
from ...device.sm90 import barrier
from ...runtime.target import Target, chip_of
from .common import LEAST_TILES, RAGGED_CHUNK, RAGGED_SCALARS
from .common import PAGED_SCALARS as COMMON_SCALARS

PAGE = gl.constexpr(64)
HEADS = gl.constexpr(64)
DIM = gl.constexpr(128)
LINE = 128
"""Bytes of a row of the cache as the copies see it: a key is one, the scales of a page two."""

MAX_TOKENS = 2
"""Query tokens that share a read of the keys."""
STAGES = 3
"""Buffers for keys."""
PROGRAMS = 4
"""Per multiprocessor: a kernel may take 128 registers."""
WARPS = 4

KEYS_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
SCALES_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
VECTOR_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 2],
    )
)
QUERIES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
PAGE_BYTES = gl.constexpr(64 * INDEX_BYTES)


NEXT = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;")
SECOND_NEXT = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;")


@gluon.jit
def _load_queries(
    q_ptr, w_ptr, first, count, q_stride_token, q_stride_head, w_stride, heads, TOKENS: gl.constexpr, ACC: gl.constexpr
):
    """Queries [TOKENS * HEADS, DIM] of `count` tokens from `first`, and half of each weight, 0 past them."""
    # q [TOKENS * HEADS, DIM]: the heads of a token are neighbours; heads and tokens past the last repeat it
    column = gl.arange(0, TOKENS * HEADS, layout=gl.SliceLayout(1, QUERIES))
    offs_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, QUERIES))
    token = (first + gl.minimum(column // HEADS, count - 1)).to(gl.int64)
    head = gl.minimum(column % HEADS, heads - 1)
    q = gl.load(q_ptr + (token * q_stride_token + head * q_stride_head)[:, None] + offs_d[None, :])
    # weights [TOKENS * HEADS], 0 for those that were repeated; halved, as `_score` sums 2 relu(x)
    column = gl.arange(0, TOKENS * HEADS, layout=gl.SliceLayout(0, ACC))
    token = (first + gl.minimum(column // HEADS, count - 1)).to(gl.int64)
    head = column % HEADS
    mask = (column // HEADS < count) & (head < heads)
    return q, 0.5 * gl.load(w_ptr + token * w_stride + head, mask=mask, other=0.0)


@gluon.jit
def _multiply(k_shared, q_shared, ACC: gl.constexpr):
    """Start the product of 64 keys by the queries."""
    COLUMNS: gl.constexpr = q_shared.shape[0]
    nothing = gl.zeros([PAGE, COLUMNS], gl.float32, layout=ACC)
    return warpgroup_mma(k_shared, q_shared.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _from_lane(x, SHUFFLE: gl.constexpr):
    """What the lane at this distance holds."""
    return gl.inline_asm_elementwise(SHUFFLE, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _score(dots, weights):
    """[PAGE, 2]: sums of 2 * weight * relu(dots) over the heads of two tokens, or of one in both columns.

    x + |x| is 2 relu(x) exactly, and an addition has twice the rate of a maximum.
    """
    TOKENS: gl.constexpr = dots.shape[1] // HEADS
    terms = (dots + gl.abs(dots)) * weights[None, :]
    # Each of four neighbouring lanes sums what it holds: for two keys eight apart, of every token.
    terms = terms.reshape(PAGE, TOKENS, HEADS // 8, 4, 2).permute(0, 1, 3, 2, 4)
    sums = gl.sum(terms.reshape(PAGE, TOKENS, 4, HEADS // 4), 3)
    # Then they exchange halves: the lower bit of a lane becomes the key, the upper bit the token.
    near, far = gl.split(sums.reshape(PAGE // 16, 2, 8, TOKENS, 4).permute(0, 2, 3, 4, 1))
    LANES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, near.type.layout)))
    odd = (gl.arange(0, 4, layout=LANES) % 2 != 0)[None, :][None, :, :][None, :, :, :]
    sums = gl.where(odd, far, near) + _from_lane(gl.where(odd, near, far), NEXT)
    if TOKENS == 2:
        first, second = gl.split(sums.permute(0, 1, 3, 2))
        UPPER: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, first.type.layout))
        upper = (gl.arange(0, 4, layout=UPPER) >= 2)[None, :][None, :, :]
        score = gl.where(upper, second, first) + _from_lane(gl.where(upper, first, second), SECOND_NEXT)
    else:
        both = sums.reshape(PAGE // 16, 8, 4)
        score = both + _from_lane(both, SECOND_NEXT)
    score = score.reshape(PAGE // 16, 8, 2, 2).permute(0, 3, 1, 2).reshape(PAGE, 2)
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


PAGED_SCALARS = [*COMMON_SCALARS, "splits", "page_lines"]


@gluon.jit
def _line(table_ptr, index, stop, num_pages, table_width, page_lines):
    """Line of the cache at which page `index` of a sequence begins, a negative one where it is not in the cache."""
    page = gl.load(table_ptr + index, mask=index < gl.minimum(stop, table_width), other=-1)
    return gl.where((page >= 0) & (page < num_pages), page, -1) * page_lines


@gluon.jit
def _copy_page(keys_desc, scales_desc, line, k_shared, s_shared, full, stage, needed):
    """Start copying one page; an absent one is read from elsewhere and its scores are dropped."""
    line = gl.maximum(line, 0)
    mbarrier.expect(full.index(stage), PAGE_BYTES, pred=needed)
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
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS * HEADS, 32])
    k_shared = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, PAGE, DIM], KEYS_SHARED)
    s_shared = gl.allocate_shared_memory(gl.float32, [STAGES, 2, 32], SCALES_SHARED)
    q_shared = gl.allocate_shared_memory(gl.float8e4nv, [TOKENS * HEADS, DIM], KEYS_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    barrier()
    gdc_wait()

    groups = gl.cdiv(tokens, TOKENS)
    pid = gl.program_id(0)
    # The groups of a sequence's tokens run side by side: what one reads, the other finds in the cache.
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
    lines = ()
    for stage in gl.static_range(STAGES - 1):
        lines += (_line(table_ptr, begin + stage, stop, num_pages, table_width, page_lines),)
    q, weights = _load_queries(
        q_ptr + seq * q_stride_seq, w_ptr + seq * w_stride_seq, first_token, tokens, q_stride_token, q_stride_head,
        w_stride_token, heads, TOKENS, ACC,
    )  # fmt: skip
    offs_k = gl.arange(0, PAGE, layout=gl.SliceLayout(1, SCORES))
    offs_t = gl.arange(0, 2, layout=gl.SliceLayout(0, SCORES))
    mask_t = offs_t < tokens
    visible_t = gl.load(visible_ptr + offs_t, mask=mask_t, other=0)
    ends_t = gl.where(mask_t, max_visible, 0)
    stop_visible = gl.minimum(gl.cdiv(longest, PAGE), stop)
    n = stop_visible - begin
    for stage in gl.static_range(STAGES - 1):
        _copy_page(keys_desc, scales_desc, lines[stage], k_shared, s_shared, full, stage, stage < n)
    q_shared.store(q)
    fence_async_shared()
    barrier()

    position = (begin * PAGE + offs_k)[:, None]
    out_rows = out_ptr + offs_t.to(gl.int64)[None, :] * out_stride_token + position
    following = _line(table_ptr, begin + STAGES - 1, stop, num_pages, table_width, page_lines)
    for i in range(n):
        buffer = i % STAGES
        mbarrier.wait(full.index(buffer), (i // STAGES) & 1)
        dots = _multiply(k_shared.index(buffer), q_shared, ACC)
        # The buffer that the last step has read takes the page that is next to be copied.
        barrier()
        next_buffer = (i + STAGES - 1) % STAGES
        _copy_page(keys_desc, scales_desc, following, k_shared, s_shared, full, next_buffer, i + STAGES - 1 < n)
        line, lines = lines[0], lines[1:] + (following,)  # noqa: RUF005 - Triton has no star
        following = _line(table_ptr, begin + i + STAGES, stop, num_pages, table_width, page_lines)
        scale = s_shared.index(buffer)._reinterpret(gl.float32, [PAGE], VECTOR_SHARED).load(gl.SliceLayout(1, SCORES))
        score = _score(warpgroup_mma_wait(0, deps=(dots,)), weights) * scale[:, None]
        seen = position < gl.where(line >= 0, visible_t, 0)[None, :]
        gl.store(out_rows, gl.where(seen, score, float("-inf")), mask=position < ends_t[None, :])
        position += PAGE
        out_rows += PAGE

    if FILL:
        filled = gl.maximum(begin, stop_visible) * PAGE
        _fill(out_ptr, out_stride_token, tokens, filled, gl.minimum(stop * PAGE, max_visible))


@gluon.jit
def _copy_keys(keys_desc, base, k_shared, full, stage, needed):
    mbarrier.expect(full.index(stage), PAGE * DIM, pred=needed)
    tma.async_copy_global_to_shared(keys_desc, [base, 0], full.index(stage), k_shared.index(stage), pred=needed)


@gluon.jit(do_not_specialize=RAGGED_SCALARS)
def ragged_kernel(
    keys_desc, q_ptr, w_ptr, scale_ptr, start_ptr, end_ptr, out_ptr,
    num_tokens, num_keys, heads, chunk, q_stride_token, q_stride_head, w_stride, out_stride,
    FILL: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of TOKENS tokens for one chunk of the keys; without FILL only of keys that one of the tokens sees."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS * HEADS, 32])
    k_shared = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, PAGE, DIM], KEYS_SHARED)
    q_shared = gl.allocate_shared_memory(gl.float8e4nv, [TOKENS * HEADS, DIM], KEYS_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    barrier()

    chunks = gl.cdiv(num_keys, chunk)
    pid = gl.program_id(0)
    first = pid // chunks * TOKENS
    count = gl.minimum(num_tokens - first, TOKENS)
    begin = pid % chunks * chunk
    stop = gl.minimum(begin + chunk, num_keys)
    # The keys that at least one of the tokens sees
    first_key = num_keys
    last_key = 0
    for token in gl.static_range(TOKENS):
        start = gl.load(start_ptr + first + token, mask=token < count, other=0)
        end = gl.load(end_ptr + first + token, mask=token < count, other=0)
        first_key = gl.minimum(first_key, gl.where(start < end, start, num_keys))
        last_key = gl.maximum(last_key, gl.where(start < end, end, 0))
    low = gl.maximum(first_key // PAGE * PAGE, begin)
    high = gl.minimum(last_key, stop)
    out_ptr += first.to(gl.int64) * out_stride

    if low < high:
        for stage in gl.static_range(STAGES):
            base = low + stage * PAGE
            _copy_keys(keys_desc, base, k_shared, full, stage, base < high)
        q, weights = _load_queries(
            q_ptr, w_ptr, first, count, q_stride_token, q_stride_head, w_stride, heads, TOKENS, ACC
        )
        # score [PAGE, 2]: keys by tokens
        offs_k = gl.arange(0, PAGE, layout=gl.SliceLayout(1, SCORES))
        offs_t = gl.arange(0, 2, layout=gl.SliceLayout(0, SCORES))
        mask_t = offs_t < count
        start_t = gl.load(start_ptr + first + offs_t, mask=mask_t, other=0)[None, :]
        end_t = gl.load(end_ptr + first + offs_t, mask=mask_t, other=0)[None, :]
        stop_t = gl.where(mask_t, stop, 0)[None, :]
        q_shared.store(q)
        fence_async_shared()
        barrier()

        key = low + offs_k
        out_rows = out_ptr + offs_t.to(gl.int64)[None, :] * out_stride + key[:, None]
        scale = gl.load(scale_ptr + key, mask=key < num_keys, other=0.0)
        for i in range(gl.cdiv(high - low, PAGE)):
            buffer = i % STAGES
            mbarrier.wait(full.index(buffer), (i // STAGES) & 1)
            dots = _multiply(k_shared.index(buffer), q_shared, ACC)
            next_scale = gl.load(scale_ptr + key + PAGE, mask=key + PAGE < num_keys, other=0.0)
            done = warpgroup_mma_wait(0, deps=(dots,))
            # All have read the keys: their buffer takes those that are next to be copied.
            barrier()
            following = low + (i + STAGES) * PAGE
            _copy_keys(keys_desc, following, k_shared, full, buffer, following < high)
            score = _score(done, weights) * scale[:, None]
            if FILL:
                score = gl.where((key[:, None] >= start_t) & (key[:, None] < end_t), score, float("-inf"))
            gl.store(out_rows, score, mask=key[:, None] < stop_t)
            scale = next_scale
            key += PAGE
            out_rows += PAGE
    if FILL:
        low = gl.where(low < high, low, stop)
        _fill(out_ptr, out_stride, count, begin, low)
        _fill(out_ptr, out_stride, count, low + gl.cdiv(gl.maximum(high - low, 0), PAGE) * PAGE, stop)


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


def supports(target: Target) -> bool:
    return target.name == "sm90"


def index_logits_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    *,
    max_visible: int,
    out: torch.Tensor,
) -> torch.Tensor:
    done = launch_paged(q_bnid, weights_bni, index_cache, block_table_bp, visible_bn, out, fill=True)
    return NotImplemented if done is NotImplemented else out


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
) -> Any:
    """As the portable one; NotImplemented for what the kernel does not take."""
    sequences, tokens, heads, index_dim = q_bnid.shape
    pages, page_size, _ = index_cache.shape
    suits = index_cache.dtype is torch.uint8 and index_dim == DIM.value and page_size == PAGE.value and pages > 0
    if not suits or index_cache.stride(0) % LINE or not _fits(heads, index_cache):
        return NotImplemented
    if out.numel() == 0:
        return None
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
    shared = min(tokens, MAX_TOKENS)
    groups = triton.cdiv(tokens, shared)
    max_visible = out.shape[2]
    splits = choose_splits(
        sequences * groups, triton.cdiv(max_visible, PAGE.value), PROGRAMS * _processors(q_bnid.device)
    )
    paged_kernel[(sequences * groups * splits,)](
        keys, scales, q_bnid, weights_bni, block_table_bp, visible_bn, out,
        tokens, pages, max_visible, selected, heads, LEAST_TILES, block_table_bp.shape[1], splits, lines,
        *q_bnid.stride()[:3], *weights_bni.stride()[:2], block_table_bp.stride(0), visible_bn.stride(0),
        *out.stride()[:2],
        FILL=fill, TOKENS=shared, STAGES=STAGES, num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
    return None


def _processors(device: torch.device) -> int:
    chip = chip_of(device)
    assert chip is not None
    return chip.processors


def index_logits_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    done = launch_ragged(q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t, out, fill=True)
    return NotImplemented if done is NotImplemented else out


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
) -> Any:
    """As the portable one; NotImplemented for what the kernel does not take."""
    num_tokens, heads, index_dim = q_tid.shape
    num_keys = k_sd.shape[0]
    if k_scale_s is None or index_dim != DIM.value or not _fits(heads, k_sd):
        return NotImplemented
    if num_tokens == 0 or num_keys == 0:
        return None
    q_tid, k_sd = q_tid.view(torch.float8_e4m3fn), k_sd.view(torch.float8_e4m3fn)
    keys = TensorDescriptor(
        k_sd, [num_keys, DIM.value], [k_sd.stride(0), 1], [PAGE.value, DIM.value], KEYS_SHARED.value
    )
    grid = triton.cdiv(num_tokens, MAX_TOKENS) * triton.cdiv(num_keys, RAGGED_CHUNK)
    ragged_kernel[(grid,)](
        keys, q_tid, weights_ti, k_scale_s, start_t, end_t, out,
        num_tokens, num_keys, heads, RAGGED_CHUNK, *q_tid.stride()[:2], weights_ti.stride(0), out.stride(0),
        FILL=fill, TOKENS=MAX_TOKENS, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return None
