"""rope_query on every GPU: one program for each token and group of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...device.fp8_rope import rope_partner, rope_terms
from ...runtime.launch import aligned_rows, require_aligned, require_power_of_two
from ...runtime.target import Target

HEADS = 16
WARPS = 1
"""Heads and warps a program. Not tuned: the launch moves 256 bytes a head. A single warp has read all that it writes,
so the result may go where the queries are."""
RUNTIME = (
    "q_token_stride",
    "q_head_stride",
    "rope_row_stride",
    "out_token_stride",
    "out_head_stride",
    "num_heads",
)


@triton.jit(do_not_specialize=RUNTIME)
def _rope_query_kernel(
    q_ptr,
    positions_ptr,
    rope_ptr,
    out_ptr,
    q_token_stride: tl.int64,
    q_head_stride: tl.int64,
    rope_row_stride: tl.int64,
    out_token_stride: tl.int64,
    out_head_stride: tl.int64,
    num_heads: tl.int32,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    q_token_stride = tl.multiple_of(q_token_stride, 16)
    q_head_stride = tl.multiple_of(q_head_stride, 16)
    rope_row_stride = tl.multiple_of(rope_row_stride, 16)
    out_token_stride = tl.multiple_of(out_token_stride, 16)
    out_head_stride = tl.multiple_of(out_head_stride, 16)
    # [HEADS, ROPE]
    offs_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask = (offs_h < num_heads)[:, None]
    offs_r = tl.arange(0, ROPE)
    rows_ptr = q_ptr + token * q_token_stride + offs_h[:, None] * q_head_stride

    position = tl.load(positions_ptr + token).to(tl.int64)
    cos, sin = rope_terms(rope_ptr + position * rope_row_stride, offs_r, ROPE, True)
    q = tl.load(rows_ptr + offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
    offs_p = rope_partner(offs_r, ROPE, True)
    partner = tl.load(rows_ptr + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
    q = q * cos[None, :] + partner * sin[None, :]
    out_ptrs = out_ptr + token * out_token_stride + offs_h[:, None] * out_head_stride + offs_r[None, :]
    tl.store(out_ptrs, q.to(out_ptr.dtype.element_ty), mask=mask)


def supports(target: Target) -> bool:
    return True


def rope_query(
    q_pe_thr: torch.Tensor,
    positions_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, heads, rope = q_pe_thr.shape
    require_power_of_two("q_pe_thr", rope)
    if out is None:
        out = torch.empty(q_pe_thr.shape, dtype=q_pe_thr.dtype, device=q_pe_thr.device)
    if tokens == 0:
        return out
    require_aligned("out", out)
    q = aligned_rows(q_pe_thr)
    rope_table = aligned_rows(rope_table_pr)
    _rope_query_kernel[(tokens, triton.cdiv(heads, HEADS))](
        q,
        aligned_rows(positions_t.long()),
        rope_table,
        out,
        q.stride(0),
        q.stride(1),
        rope_table.stride(0),
        out.stride(0),
        out.stride(1),
        heads,
        ROPE=rope,
        HEADS=HEADS,
        num_warps=WARPS,
    )
    return out
