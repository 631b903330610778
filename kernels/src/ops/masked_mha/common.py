"""masked_mha on every GPU that Triton compiles for: flash attention in which each token has its own range of keys.

A chip's own kernel may leave programs to it: those that met a value that is not finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime.target import Target, chip_of

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """Queries and keys a step of one program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


LEFT_CONFIG = Config(block_m=128, block_n=16, num_warps=8, num_stages=1)
"""For blocks that a kernel of sm90 leaves: nearly all programs have nothing to do, and more fit beside each other."""


@triton.jit
def _attend_block(
    q,
    q_rest,
    k_ptr,
    v_ptr,
    mask_rows,
    s,
    first,
    last,
    mask_m,
    end,
    acc,
    running_max,
    running_sum,
    stride_k_s,
    stride_v_s,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    SELECTED: tl.constexpr,
):
    """Add BLOCK_N keys from s on to (acc, running_max, running_sum); without MASKED every token sees all of them."""
    # k [BLOCK_D, BLOCK_N], transposed as it is loaded
    offs_s = s + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    mask_n = (offs_s < end) | (not MASKED)
    k_cols = k_ptr + offs_s[None, :].to(tl.int64) * stride_k_s
    k = tl.load(k_cols + offs_d[:, None], mask=mask_n[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee")
    if BLOCK_REST > 0:
        # A width such as 192 is no power of two: 128, then a block for the rest.
        offs_rest = BLOCK_D + tl.arange(0, BLOCK_REST)
        k_rest = tl.load(k_cols + offs_rest[:, None], mask=mask_n[None, :] & (offs_rest < D)[:, None], other=0.0)
        scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
    # v [BLOCK_N, BLOCK_V]
    v_rows = v_ptr + offs_s[:, None].to(tl.int64) * stride_v_s
    v = tl.load(v_rows + offs_v[None, :], mask=mask_n[:, None] & (offs_v < V)[None, :], other=0.0)
    if MASKED:
        visible = (offs_s[None, :] >= first[:, None]) & (offs_s[None, :] < last[:, None]) & mask_m[:, None]
        if SELECTED:
            # `limits.mask_words` tells where the bit of a key is.
            offs_w = offs_s // 128 * 4 + offs_s % 8 // 2
            word = tl.load(mask_rows[:, None] + offs_w[None, :], mask=visible, other=0)
            bit = offs_s % 128 // 8 * 2 + offs_s % 2
            visible = visible & (((word >> bit[None, :]) & 1) != 0)
        # A value that is not finite must reach the tokens that see it and no other; 0 * NaN would reach all.
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        spoiled = tl.min(finite.to(tl.int32), 1) == 0
        v = tl.where(finite, v, 0.0)
        scores = tl.where(spoiled[None, :], float("nan"), scores)
        scores = tl.where(visible, scores, float("-inf"))

    # The online softmax, in powers of two: `scale` has log2(e) in it. A row that has seen no key keeps -inf, and 0 is
    # subtracted, as -inf minus -inf would be NaN.
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(running_max - shift)
    running_sum = running_sum * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, running_sum


@triton.jit(do_not_specialize=["stride_lse_t", "tokens", "keys", "heads"])
def _mha_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    end_ptr,
    mask_ptr,
    left_ptr,
    out_ptr,
    lse_ptr,
    stride_q_t,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_v_s,
    stride_v_h,
    stride_out_t,
    stride_out_h,
    stride_lse_t,
    stride_mask,
    tokens,
    keys,
    heads,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECTED: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % heads
    # The last tokens see most: their programs begin first.
    block = tl.num_programs(0) // heads - 1 - pid // heads
    if left_ptr is not None:  # noqa: SIM102 - known when compiling
        if tl.max(tl.load(left_ptr + 2 * (block * heads + h) + tl.arange(0, 2)), 0) == 0:
            return
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tokens
    rows = offs_m.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)

    # q [BLOCK_M, D], in a part whose width is a power of two and the rest
    q_rows = q_ptr + rows[:, None] * stride_q_t + h * stride_q_h
    q = tl.load(q_rows + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    q_rest = q
    if BLOCK_REST > 0:
        offs_rest = BLOCK_D + tl.arange(0, BLOCK_REST)
        q_rest = tl.load(q_rows + offs_rest[None, :], mask=mask_m[:, None] & (offs_rest < D)[None, :], other=0.0)

    first = tl.load(start_ptr + offs_m, mask=mask_m, other=0)
    last = tl.minimum(tl.load(end_ptr + offs_m, mask=mask_m, other=0), keys)
    first = tl.maximum(first, 0)
    visible_m = mask_m & (first < last)
    begin = tl.min(tl.where(visible_m, first, keys), 0)
    end = tl.max(tl.where(visible_m, last, 0), 0)

    # acc [BLOCK_M, BLOCK_V]; running_max and running_sum [BLOCK_M], the latter relative to the former
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    k_ptr += h * stride_k_h
    v_ptr += h * stride_v_h
    # The blocks that every token sees whole, from `inner` to `outer`, need no mask; the others follow.
    inner = begin
    outer = begin
    mask_rows = rows
    if SELECTED:
        mask_rows = mask_ptr + rows * stride_mask
    else:
        inner += tl.cdiv(tl.maximum(tl.max(tl.where(mask_m, first, 0), 0) - begin, 0), BLOCK_N) * BLOCK_N
        whole = tl.min(tl.where(mask_m, tl.where(visible_m, last, 0), keys), 0) - inner
        outer = inner + tl.maximum(whole, 0) // BLOCK_N * BLOCK_N
        for s in tl.range(inner, outer, BLOCK_N, num_stages=STAGES):
            acc, running_max, running_sum = _attend_block(
                q, q_rest, k_ptr, v_ptr, mask_rows, s, first, last, mask_m, end, acc, running_max, running_sum,
                stride_k_s, stride_v_s, scale, D, V, BLOCK_D, BLOCK_REST, BLOCK_V, BLOCK_N, False, SELECTED,
            )  # fmt: skip
    skipped = outer - inner
    for s in tl.range(begin, end - skipped, BLOCK_N, num_stages=STAGES):
        acc, running_max, running_sum = _attend_block(
            q, q_rest, k_ptr, v_ptr, mask_rows, tl.where(s < inner, s, s + skipped), first, last, mask_m, end, acc,
            running_max, running_sum, stride_k_s, stride_v_s, scale, D, V, BLOCK_D, BLOCK_REST, BLOCK_V, BLOCK_N,
            True, SELECTED,
        )  # fmt: skip

    result = acc / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
    out_rows = out_ptr + rows[:, None] * stride_out_t + h * stride_out_h
    mask_out = mask_m[:, None] & (offs_v < V)[None, :]
    tl.store(out_rows + offs_v[None, :], result.to(out_ptr.dtype.element_ty), mask=mask_out)
    lse = tl.where(running_sum == 0.0, float("-inf"), (running_max + tl.log2(running_sum)) * LN2)
    tl.store(lse_ptr + rows * stride_lse_t + h, lse, mask=mask_m)


def masked_mha(
    q_thd: torch.Tensor,
    k_shd: torch.Tensor,
    v_shv: torch.Tensor,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    scale: float,
    *,
    mask_tw: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With `left` [blocks of 128 tokens, H, 2] int32 only the blocks for which one of both is not 0."""
    tokens, heads, dim = q_thd.shape
    keys, _, value_dim = v_shv.shape
    if out is None:
        out = torch.empty((tokens, heads, value_dim), dtype=q_thd.dtype, device=q_thd.device)
    if lse is None:
        lse = torch.empty((tokens, heads), dtype=torch.float32, device=q_thd.device)
    if tokens == 0:
        return out, lse
    wide = max(dim, value_dim) > 192
    config = choose_config(_target(q_thd.device), q_thd.dtype is torch.float32, mask_tw is not None, wide)
    if left is not None:
        config = LEFT_CONFIG
    _mha_kernel[(triton.cdiv(tokens, config.block_m) * heads,)](
        q_thd,
        k_shd,
        v_shv,
        start_t,
        end_t,
        mask_tw,
        left,
        out,
        lse,
        *q_thd.stride()[:2],
        *k_shd.stride()[:2],
        *v_shv.stride()[:2],
        *out.stride()[:2],
        lse.stride(0),
        0 if mask_tw is None else mask_tw.stride(0),
        tokens,
        keys,
        heads,
        scale * LOG2E,
        **_widths(dim, value_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SELECTED=mask_tw is not None,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def _target(device: torch.device) -> Target | None:
    """None under the interpreter, whose tensors are on the CPU."""
    chip = chip_of(device)
    return None if chip is None else chip.target


def _widths(dim: int, value_dim: int) -> dict[str, int]:
    main = 1 << (dim.bit_length() - 1)
    if main < 16:
        raise ValueError(f"q_thd: last dim must be at least 16, got {dim}; set DSV32_KERNELS=reference")
    rest = dim - main
    return {
        "D": dim,
        "V": value_dim,
        "BLOCK_D": main,
        "BLOCK_REST": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }


def choose_config(target: Target | None, float32: bool, masked: bool, wide: bool) -> Config:
    """The configuration for a chip; a mask needs registers for the test of its bits, `wide` keys or values more."""
    if float32 or target is None:
        return Config(block_m=16, block_n=16, num_warps=8, num_stages=1)
    if not target.is_cuda:
        return Config(block_m=64, block_n=32, num_warps=4, num_stages=1)
    if target.name == "sm90":
        if wide:
            return Config(block_m=64, block_n=32, num_warps=8, num_stages=2)
        return Config(128, 32, 8, num_stages=2) if masked else Config(128, 64, 8, num_stages=3)
    if target.name == "sm100":
        return Config(block_m=64, block_n=64, num_warps=8, num_stages=2)
    return Config(block_m=32 if masked else 64, block_n=32, num_warps=8, num_stages=2)
