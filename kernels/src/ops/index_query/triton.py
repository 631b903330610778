"""index_query on every GPU: one program for each token and group of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...device.fp8_rope import e4m3_code, hadamard_rotate, power_of_two_scale, rope_partner, rope_terms
from ...runtime.launch import aligned_rows, native_e4m3, require_aligned, require_power_of_two
from ...runtime.target import Target

HEADS = 4
WARPS = 1
"""Heads and warps per program. One warp rotates by shuffles, without a barrier."""
RUNTIME = (
    "q_token_stride",
    "q_head_stride",
    "weights_token_stride",
    "rope_row_stride",
    "out_token_stride",
    "out_head_stride",
    "weights_out_token_stride",
    "num_heads",
)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("weights_ptr", "weights_out_ptr"))
def _index_query_kernel(
    q_ptr,
    weights_ptr,
    positions_ptr,
    rope_ptr,
    q_out_ptr,
    weights_out_ptr,
    q_token_stride: tl.int64,
    q_head_stride: tl.int64,
    weights_token_stride: tl.int64,
    rope_row_stride: tl.int64,
    out_token_stride: tl.int64,
    out_head_stride: tl.int64,
    weights_out_token_stride: tl.int64,
    num_heads: tl.int32,
    weight_factor,
    ROPE: tl.constexpr,
    INDEX: tl.constexpr,
    INDEX_STEPS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    q_token_stride = tl.multiple_of(q_token_stride, 16)
    q_head_stride = tl.multiple_of(q_head_stride, 16)
    rope_row_stride = tl.multiple_of(rope_row_stride, 16)
    out_token_stride = tl.multiple_of(out_token_stride, 16)
    out_head_stride = tl.multiple_of(out_head_stride, 16)
    # [HEADS, INDEX]
    offs_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask_h = offs_h < num_heads
    mask = mask_h[:, None]
    offs_d = tl.arange(0, INDEX)
    rows_ptr = q_ptr + token * q_token_stride + offs_h[:, None] * q_head_stride

    # The partner of each element is loaded a second time instead of being shuffled.
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos, sin = rope_terms(rope_ptr + position * rope_row_stride, offs_d, ROPE, INTERLEAVED)
    q = tl.load(rows_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    offs_p = rope_partner(offs_d, ROPE, INTERLEAVED)
    partner = tl.load(rows_ptr + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
    q = q * cos[None, :] + partner * sin[None, :]
    if ROTATE:
        q = hadamard_rotate(q, HEADS, INDEX, INDEX_STEPS)

    weights = tl.load(weights_ptr + token * weights_token_stride + offs_h, mask=mask_h, other=0.0)
    weights = weights.to(tl.float32) * weight_factor
    out_ptrs = q_out_ptr + token * out_token_stride + offs_h[:, None] * out_head_stride + offs_d[None, :]
    if QUANTIZE:
        # relu(s * x) = s * relu(x) for s > 0, so the scale of a head goes to its weight.
        scale, inverse = power_of_two_scale(tl.max(tl.abs(q), axis=1))
        weights = weights * scale
        tl.store(out_ptrs, e4m3_code(q * inverse[:, None], NATIVE), mask=mask)
    else:
        tl.store(out_ptrs, q.to(q_out_ptr.dtype.element_ty), mask=mask)
    tl.store(weights_out_ptr + token * weights_out_token_stride + offs_h, weights, mask=mask_h)


def supports(target: Target) -> bool:
    return True


def index_query(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    positions_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    *,
    interleaved: bool = False,
    rotate: bool = False,
    quantize: bool = False,
    out: torch.Tensor | None = None,
    weights_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, index = q_tid.shape
    require_power_of_two("q_tid", index)
    require_power_of_two("rope_table_pr", rope_table_pr.shape[1])
    if out is None:
        out = torch.empty(q_tid.shape, dtype=torch.float8_e4m3fn if quantize else q_tid.dtype, device=q_tid.device)
    if weights_out is None:
        weights_out = torch.empty(weights_ti.shape, dtype=torch.float32, device=q_tid.device)
    if tokens == 0:
        return out, weights_out
    require_aligned("out", out)
    q = aligned_rows(q_tid)
    rope_table = aligned_rows(rope_table_pr)
    _index_query_kernel[(tokens, triton.cdiv(heads, HEADS))](
        q,
        weights_ti,
        aligned_rows(positions_t.long()),
        rope_table,
        out.view(torch.uint8) if quantize else out,
        weights_out,
        q.stride(0),
        q.stride(1),
        weights_ti.stride(0),
        rope_table.stride(0),
        out.stride(0),
        out.stride(1),
        weights_out.stride(0),
        heads,
        (index * heads) ** -0.5,
        ROPE=rope_table.shape[1],
        INDEX=index,
        INDEX_STEPS=index.bit_length() - 1,
        HEADS=HEADS,
        INTERLEAVED=interleaved,
        ROTATE=rotate,
        QUANTIZE=quantize,
        NATIVE=quantize and native_e4m3(q.device),
        num_warps=WARPS,
    )
    return out, weights_out
