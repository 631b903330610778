"""Index logits on every GPU: a product of keys by the heads of a few tokens; ReLU, weights and sum in registers.

Keys are the rows of the product and heads its columns, so the sum over heads stays inside a thread but for two
shuffles, and several query tokens that see the same keys share one read of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...cache_layout import SCALE_BYTES
from ...runtime.target import TARGETS, Target, chip_of
from .common import LEAST_TILES, PAGED_SCALARS, RAGGED_CHUNK, RAGGED_SCALARS

BYTES_SCALE = tl.constexpr(65536.0)
"""2^16: each operand converted by bits is 2^-8 of its value."""


@triton.jit
def _operand(x):
    """Bytes of e4m3fn as float16 at 2^-8 of their value (exact, subnormals included); other types as they are."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        x = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return x


@triton.jit
def _load_queries(
    q_ptr, w_ptr, first, count, q_stride_token, q_stride_head, w_stride, heads,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Queries [TOKENS * HEADS, DIM] and weights [TOKENS * HEADS] of `count` tokens from `first`; past them weight 0."""
    column = tl.arange(0, TOKENS * HEADS)
    mask = (column // HEADS < count) & (column % HEADS < heads)
    token = (first + tl.minimum(column // HEADS, count - 1)).to(tl.int64)
    head = tl.minimum(column % HEADS, heads - 1)
    offs_d = tl.arange(0, DIM)
    # Every address is valid, so the load needs no mask: fp8 has no constant to put where a mask is false.
    q = _operand(tl.load(q_ptr + (token * q_stride_token + head * q_stride_head)[:, None] + offs_d[None, :]))
    weight = tl.load(w_ptr + token * w_stride + head, mask=mask, other=0.0)
    if q_ptr.dtype.element_ty == tl.uint8:
        weight *= BYTES_SCALE
    return q, weight


@triton.jit
def _score(k, q, weight, KEYS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr):
    """[KEYS, TOKENS]: sum over heads of weight * relu(q . k)."""
    # dots [KEYS, TOKENS * HEADS]
    dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    terms = tl.maximum(dots, 0.0) * weight[None, :]
    return tl.sum(tl.reshape(terms, (KEYS, TOKENS, HEADS)), axis=2)


@triton.jit
def _store(out_ptr, out_offs_t, mask_t, position, stop, score):
    """Store [KEYS, TOKENS] scores of positions before `stop` into the rows of the tokens."""
    tl.store(
        out_ptr + out_offs_t[None, :] + position[:, None], score, mask=mask_t[None, :] & (position < stop)[:, None]
    )


@triton.jit
def _fill(out_ptr, out_offs_t, mask_t, begin, stop, KEYS: tl.constexpr, TOKENS: tl.constexpr):
    """-inf for positions begin .. stop - 1 of the tokens."""
    nothing = tl.full((KEYS, TOKENS), float("-inf"), tl.float32)
    for base in range(begin, stop, KEYS):
        _store(out_ptr, out_offs_t, mask_t, base + tl.arange(0, KEYS), stop, nothing)


@triton.jit(do_not_specialize=RAGGED_SCALARS)
def ragged_kernel(
    q_ptr, w_ptr, k_ptr, scale_ptr, start_ptr, end_ptr, out_ptr,
    num_tokens, num_keys, heads, chunk, q_stride_token, q_stride_head, w_stride, k_stride, out_stride,
    FILL: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of TOKENS tokens for one chunk of the keys; without FILL only of keys that one of the tokens sees."""
    chunks = tl.cdiv(num_keys, chunk)
    pid = tl.program_id(0)
    first = pid // chunks * TOKENS
    count = tl.minimum(num_tokens - first, TOKENS)
    begin = pid % chunks * chunk
    stop = tl.minimum(begin + chunk, num_keys)

    token = tl.arange(0, TOKENS)
    mask_t = token < count
    start_t = tl.load(start_ptr + first + token, mask=mask_t, other=0)
    end_t = tl.load(end_ptr + first + token, mask=mask_t, other=0)
    sees = start_t < end_t
    low = tl.min(tl.where(sees, start_t, num_keys), axis=0)
    high = tl.max(tl.where(sees, end_t, 0), axis=0)
    low = tl.maximum(low // KEYS * KEYS, begin)
    high = tl.minimum(high, stop)
    out_offs_t = (first + token).to(tl.int64) * out_stride

    if low < high:
        q, weight = _load_queries(
            q_ptr, w_ptr, first, count, q_stride_token, q_stride_head, w_stride, heads, TOKENS, HEADS, DIM
        )
        offs_d = tl.arange(0, DIM)
        for base in range(low, high, KEYS):
            position = base + tl.arange(0, KEYS)
            row = tl.minimum(position, num_keys - 1).to(tl.int64)
            # Loaded ahead of the product, which hides the latency.
            scale = 1.0
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + row)[:, None]
            k = _operand(tl.load(k_ptr + row[:, None] * k_stride + offs_d[None, :]))
            score = _score(k, q, weight, KEYS, TOKENS, HEADS, PRECISION) * scale
            if FILL:
                visible = (position[:, None] >= start_t[None, :]) & (position[:, None] < end_t[None, :])
                score = tl.where(visible, score, float("-inf"))
            _store(out_ptr, out_offs_t, mask_t, position, stop, score)
    if FILL:
        low = tl.where(low < high, low, stop)
        _fill(out_ptr, out_offs_t, mask_t, begin, low, KEYS, TOKENS)
        _fill(out_ptr, out_offs_t, mask_t, low + tl.cdiv(tl.maximum(high - low, 0), KEYS) * KEYS, stop, KEYS, TOKENS)


@triton.jit
def _load_pages(table_ptr, base, high, table_width, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Pages of KEYS positions, one number where they share a page; -1 where the table has none."""
    if PAGE_SIZE % KEYS == 0:
        index = base // PAGE_SIZE
        page = tl.load(table_ptr + index, mask=(base < high) & (index < table_width), other=-1)
    else:
        position = base + tl.arange(0, KEYS)
        index = position // PAGE_SIZE
        page = tl.load(table_ptr + index, mask=(position < high) & (index < table_width), other=-1)
    return page


@triton.jit(do_not_specialize=[*PAGED_SCALARS, "splits"])
def paged_kernel(
    q_ptr, w_ptr, cache_ptr, scale_ptr, table_ptr, visible_ptr, out_ptr,
    tokens, num_pages, max_visible, selected, heads, chunk, table_width, splits,
    q_stride_seq, q_stride_token, q_stride_head, w_stride_seq, w_stride_token, page_stride, scale_stride,
    table_stride, visible_stride, out_stride_seq, out_stride_token,
    FILL: tl.constexpr, PAGE_SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of TOKENS tokens of one sequence for one of `splits` chunks of its pages, each of `chunk` keys at least.

    Without FILL only of keys that one of the tokens sees, and none if each of them sees no more than are `selected`.
    """
    groups = tl.cdiv(tokens, TOKENS)
    pid = tl.program_id(0)
    # The groups of a sequence's tokens run side by side: what one reads, the other finds in the cache.
    first = pid % groups * TOKENS
    seq = (pid // groups // splits).to(tl.int64)
    count = tl.minimum(tokens - first, TOKENS)

    token = tl.arange(0, TOKENS)
    mask_t = token < count
    visible_t = tl.load(visible_ptr + seq * visible_stride + first + token, mask=mask_t, other=0)
    high = tl.minimum(tl.max(visible_t, axis=0), max_visible)
    if not FILL:
        high = tl.where(high > selected, high, 0)
    # Without FILL the sequence's own length is cut into chunks, so that all programs work however short it is.
    total = max_visible if FILL else high
    chunk = tl.maximum(tl.cdiv(total, splits * KEYS) * KEYS, chunk)
    begin = pid // groups % splits * chunk
    stop = tl.minimum(begin + chunk, total)
    high = tl.minimum(high, stop)
    out_ptr += seq * out_stride_seq
    out_offs_t = (first + token).to(tl.int64) * out_stride_token

    if begin < high:
        q, weight = _load_queries(
            q_ptr + seq * q_stride_seq, w_ptr + seq * w_stride_seq, first, count,
            q_stride_token, q_stride_head, w_stride_token, heads, TOKENS, HEADS, DIM,
        )  # fmt: skip
        table_ptr += seq * table_stride
        offs_d = tl.arange(0, DIM)
        offs_k = tl.arange(0, KEYS)
        # Keys that share a page find it a tile ahead, so that their address does not wait for the block table.
        AHEAD: tl.constexpr = PAGE_SIZE % KEYS == 0
        if AHEAD:
            following = _load_pages(table_ptr, begin, high, table_width, PAGE_SIZE, KEYS)
        for base in range(begin, high, KEYS):
            position = base + offs_k
            if AHEAD:
                page = following
                following = _load_pages(table_ptr, base + KEYS, high, table_width, PAGE_SIZE, KEYS)
            else:
                page = _load_pages(table_ptr, base, high, table_width, PAGE_SIZE, KEYS)
            present = (page >= 0) & (page < num_pages)
            row = tl.where(present, page, 0).to(tl.int64)
            offset = position % PAGE_SIZE
            scale = 1.0
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + row * scale_stride + PAGE_SIZE * DIM // 4 + offset)[:, None]
            k = _operand(tl.load(cache_ptr + (row * page_stride + offset * DIM)[:, None] + offs_d[None, :]))
            score = _score(k, q, weight, KEYS, TOKENS, HEADS, PRECISION) * scale
            visible = position[:, None] < visible_t[None, :]
            if AHEAD:
                visible &= present
            else:
                visible &= present[:, None]
            _store(out_ptr, out_offs_t, mask_t, position, stop, tl.where(visible, score, float("-inf")))
        begin += tl.cdiv(high - begin, KEYS) * KEYS
    if FILL:
        _fill(out_ptr, out_offs_t, mask_t, begin, stop, KEYS, TOKENS)


class Config(NamedTuple):
    """How one launch runs: TOKENS share a read of KEYS keys at a time."""

    tokens: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """On NVIDIA: what a thread may use, so that more programs fit on a multiprocessor."""

    def options(self, target: Target) -> dict[str, int]:
        limit = {"maxnreg": self.max_registers} if target.is_cuda and self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def choose(target: Target, dtype: torch.dtype, tokens: int, *, paged: bool, fill: bool = False) -> Config:
    """The configuration for operands of a dtype (uint8: e4m3 converted by bits) and tokens that see the same keys."""
    if dtype == torch.float32:
        return Config(1, 32, 4, 2)
    if dtype != torch.float8_e4m3fn:
        return Config(1, 64, 4, 2) if target.shared_bytes < 160 << 10 else Config(min(2, tokens), 64, 4, 3)
    # Two programs to a multiprocessor of Hopper: one multiplies while the other sums.
    limit = 128 if target.name == "sm90" else None
    if not paged:
        return Config(4, 64, 8, 4, limit if fill else None) if target.is_cuda else Config(2, 64, 8, 2)
    if tokens <= 2:
        return Config(tokens, 64, 4, 4)
    return Config(4, 64, 4, 6) if target.name == "sm90" else Config(4, 64, 8, 4)


def _target(device: torch.device) -> Target:
    """Under Triton's interpreter, whose tensors are on the CPU, one that multiplies e4m3."""
    chip = chip_of(device)
    return TARGETS["sm90"] if chip is None else chip.target


def _native(x: torch.Tensor, target: Target) -> torch.Tensor:
    """e4m3 values as the type that the chip multiplies: its own, or the bytes."""
    if x.dtype not in (torch.uint8, torch.float8_e4m3fn):
        return x
    return x.view(torch.float8_e4m3fn if target.e4m3 else torch.uint8)


def _check_width(index_dim: int) -> None:
    if index_dim not in (16, 32, 64, 128, 256):
        raise ValueError(
            f"k: index_dim must be a power of two from 16 to 256 on a GPU, got {index_dim}; force reference"
        )


def supports(target: Target) -> bool:
    return True


def index_logits_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    *,
    max_visible: int,
    out: torch.Tensor,
    config: Config | None = None,
) -> torch.Tensor:
    launch_paged(q_bnid, weights_bni, index_cache, block_table_bp, visible_bn, out, fill=True, config=config)
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
    """Without `fill` what no token of a sequence sees is left as it is, and the work follows the lengths.

    Then tokens may be left out, too, that see no more keys than are `selected` from the scores.
    """
    sequences, tokens, heads, index_dim = q_bnid.shape
    max_visible = out.shape[2]
    _check_width(index_dim)
    if out.numel() == 0:
        return
    target = _target(q_bnid.device)
    q_bnid, cache = _native(q_bnid, target), _native(index_cache, target)
    pages, page_size, _ = index_cache.shape
    scales = index_cache.view(torch.float32) if index_cache.dtype == torch.uint8 else None
    config = config or choose(target, q_bnid.dtype, tokens, paged=True)
    groups = triton.cdiv(tokens, config.tokens)
    splits = triton.cdiv(max_visible, paged_chunk(sequences * groups, max_visible, config.keys))
    paged_kernel[(sequences * groups * splits,)](
        q_bnid, weights_bni, cache, scales, block_table_bp, visible_bn, out,
        tokens, pages, max_visible, selected, heads, LEAST_TILES * config.keys, block_table_bp.shape[1], splits,
        *q_bnid.stride()[:3], *weights_bni.stride()[:2], index_cache.stride(0),
        index_cache.stride(0) // SCALE_BYTES, block_table_bp.stride(0), visible_bn.stride(0), *out.stride()[:2],
        FILL=fill, PAGE_SIZE=page_size, TOKENS=config.tokens, HEADS=padded_heads(heads), DIM=index_dim,
        KEYS=config.keys, PRECISION=precision(target), **config.options(target),
    )  # fmt: skip


def precision(target: Target) -> str:
    """How float32 is multiplied: as three tf32 products (its own path spills), exactly where there are none."""
    return "tf32x3" if target.is_cuda else "ieee"


def padded_heads(heads: int) -> int:
    return max(16, triton.next_power_of_2(heads))


def paged_chunk(parts: int, max_visible: int, keys: int) -> int:
    """Keys a program scores: few while multiprocessors would idle, else more, to load the queries less often."""
    chunk = LEAST_TILES * keys
    while chunk < 4096 and parts * triton.cdiv(max_visible, 2 * chunk) >= 1024:
        chunk *= 2
    return chunk


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
    config: Config | None = None,
) -> None:
    """Without `fill` what lies outside a token's range is left as it is, or holds any score."""
    num_tokens, heads, index_dim = q_tid.shape
    num_keys = k_sd.shape[0]
    _check_width(index_dim)
    if num_tokens == 0 or num_keys == 0:
        return
    target = _target(q_tid.device)
    q_tid, k_sd = _native(q_tid, target), _native(k_sd, target)
    config = config or choose(target, q_tid.dtype, num_tokens, paged=False, fill=fill)
    chunk = RAGGED_CHUNK
    grid = triton.cdiv(num_tokens, config.tokens) * triton.cdiv(num_keys, chunk)
    ragged_kernel[(grid,)](
        q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t, out,
        num_tokens, num_keys, heads, chunk, *q_tid.stride()[:2], weights_ti.stride(0), k_sd.stride(0), out.stride(0),
        FILL=fill, TOKENS=config.tokens, HEADS=padded_heads(heads), DIM=index_dim, KEYS=config.keys,
        PRECISION=precision(target), **config.options(target),
    )  # fmt: skip
