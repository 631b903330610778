"""norm_rope_cache on every GPU: one launch, one program for each token and part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cache_layout import LATENT_ROPE_OFFSET, LATENT_SCALES_OFFSET, LATENT_TILE
from ...device.fp8_rope import e4m3_code, hadamard_rotate, power_of_two_scale, rope_partner, rope_terms
from ...runtime.launch import (
    aligned_rows,
    native_e4m3,
    require_aligned,
    require_aligned_pages,
    require_power_of_two,
)
from ...runtime.target import Target

WARPS = 1
"""One warp rotates by shuffles, without a barrier."""
RUNTIME = (
    "q_row_stride",
    "q_out_row_stride",
    "kv_row_stride",
    "k_pe_row_stride",
    "index_k_row_stride",
    "rope_row_stride",
    "latent_page_stride",
    "index_page_stride",
    "num_slots",
    "q_width",
)

ROPE_AT = tl.constexpr(LATENT_ROPE_OFFSET)
SCALES_AT = tl.constexpr(LATENT_SCALES_OFFSET)


@triton.jit
def _rms_norm(x, weight_ptrs, mask, width, eps, DTYPE: tl.constexpr):
    """x / rms(x), rounded to the model's dtype, then times the weight in that dtype, as Hugging Face does."""
    mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / width
    normed = (x * tl.rsqrt(mean + eps)).to(DTYPE).to(tl.float32)
    weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(DTYPE).to(tl.float32)
    return (normed * weight).to(DTYPE)


@triton.jit
def _write_latent(
    kv_row_ptr,
    kv_weight_ptr,
    k_pe_row_ptr,
    table_row_ptr,
    page_ptr,
    offset,
    present,
    eps,
    LATENT: tl.constexpr,
    TILE: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # [LATENT / TILE, TILE]
    offs_tile = tl.arange(0, LATENT // TILE)
    offs_c = offs_tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    kv = tl.load(kv_row_ptr + offs_c)
    latent = _rms_norm(kv.to(tl.float32), kv_weight_ptr + offs_c, offs_c < LATENT, LATENT, eps, kv.dtype)
    # [ROPE]; the rope key of the attention is always interleaved
    offs_r = tl.arange(0, ROPE)
    cos, sin = rope_terms(table_row_ptr, offs_r, ROPE, True)
    k_pe = tl.load(k_pe_row_ptr + offs_r).to(tl.float32)
    partner = tl.load(k_pe_row_ptr + rope_partner(offs_r, ROPE, True)).to(tl.float32)
    rope_key = k_pe * cos + partner * sin
    if FP8:
        # A row is the codes, a scale for each tile, then the rope key in bfloat16.
        row_ptr = page_ptr + offset * (ROPE_AT + 2 * ROPE)
        latent = latent.to(tl.float32)
        scale, inverse = power_of_two_scale(tl.max(tl.abs(latent), axis=1))
        tl.store(row_ptr + offs_c, e4m3_code(latent * inverse[:, None], NATIVE), mask=present)
        scales_ptr = (row_ptr + SCALES_AT).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scales_ptr + offs_tile, scale, mask=present)
        rope_key_ptr = (row_ptr + ROPE_AT).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        tl.store(rope_key_ptr + offs_r, rope_key.to(tl.bfloat16), mask=present)
    else:
        dtype: tl.constexpr = page_ptr.dtype.element_ty
        row_ptr = page_ptr + offset * (LATENT + ROPE)
        tl.store(row_ptr + offs_c, latent.to(dtype), mask=present)
        tl.store(row_ptr + LATENT + offs_r, rope_key.to(dtype), mask=present)


@triton.jit
def _write_index_key(
    key_row_ptr,
    weight_ptr,
    bias_ptr,
    table_row_ptr,
    page_ptr,
    offset,
    present,
    eps,
    PAGE: tl.constexpr,
    INDEX: tl.constexpr,
    INDEX_STEPS: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # [INDEX]; the partner of each element is normalised a second time instead of being shuffled
    offs_d = tl.arange(0, INDEX)
    offs_p = rope_partner(offs_d, ROPE, INTERLEAVED)
    key = tl.load(key_row_ptr + offs_d)
    partner = tl.load(key_row_ptr + offs_p).to(tl.float32)
    dtype: tl.constexpr = key.dtype
    key = key.to(tl.float32)
    mean = tl.sum(key, axis=0) / INDEX
    centred = key - mean
    factor = tl.rsqrt(tl.sum(centred * centred, axis=0) / INDEX + eps)
    weight = tl.load(weight_ptr + offs_d).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d).to(tl.float32)
    partner_weight = tl.load(weight_ptr + offs_p).to(tl.float32)
    partner_bias = tl.load(bias_ptr + offs_p).to(tl.float32)
    key = (centred * factor * weight + bias).to(dtype).to(tl.float32)
    partner = ((partner - mean) * factor * partner_weight + partner_bias).to(dtype).to(tl.float32)
    cos, sin = rope_terms(table_row_ptr, offs_d, ROPE, INTERLEAVED)
    key = key * cos + partner * sin
    if ROTATE:
        key = tl.reshape(hadamard_rotate(tl.reshape(key, (1, INDEX)), 1, INDEX, INDEX_STEPS), (INDEX,))
    if FP8:
        # A page is the codes of all its tokens, then their scales.
        scale, inverse = power_of_two_scale(tl.max(tl.abs(key), axis=0))
        tl.store(page_ptr + offset * INDEX + offs_d, e4m3_code(key * inverse, NATIVE), mask=present)
        scales_ptr = (page_ptr + PAGE * INDEX).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scales_ptr + offset, scale, mask=present)
    else:
        tl.store(page_ptr + offset * INDEX + offs_d, key.to(page_ptr.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=RUNTIME)
def _norm_rope_cache_kernel(
    q_ptr,
    q_out_ptr,
    q_weight_ptr,
    kv_ptr,
    kv_weight_ptr,
    k_pe_ptr,
    index_k_ptr,
    index_weight_ptr,
    index_bias_ptr,
    positions_ptr,
    slots_ptr,
    rope_ptr,
    latent_ptr,
    index_ptr,
    q_row_stride: tl.int64,
    q_out_row_stride: tl.int64,
    kv_row_stride: tl.int64,
    k_pe_row_stride: tl.int64,
    index_k_row_stride: tl.int64,
    rope_row_stride: tl.int64,
    latent_page_stride: tl.int64,
    index_page_stride: tl.int64,
    num_slots: tl.int64,
    q_width: tl.int32,
    eps,
    index_eps,
    PAGE: tl.constexpr,
    LATENT: tl.constexpr,
    TILE: tl.constexpr,
    ROPE: tl.constexpr,
    INDEX: tl.constexpr,
    INDEX_STEPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    LATENT_FP8: tl.constexpr,
    INDEX_FP8: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    # Of a token: 0 the query's norm, 1 the latent, 2 the index key
    part = tl.program_id(1)
    # The launcher sees to it that rows begin at multiples of 16 elements.
    q_row_stride = tl.multiple_of(q_row_stride, 16)
    q_out_row_stride = tl.multiple_of(q_out_row_stride, 16)
    kv_row_stride = tl.multiple_of(kv_row_stride, 16)
    k_pe_row_stride = tl.multiple_of(k_pe_row_stride, 16)
    index_k_row_stride = tl.multiple_of(index_k_row_stride, 16)
    rope_row_stride = tl.multiple_of(rope_row_stride, 16)
    latent_page_stride = tl.multiple_of(latent_page_stride, 16)
    index_page_stride = tl.multiple_of(index_page_stride, 16)

    if part == 0:
        # [1, BLOCK_Q]
        offs_q = tl.arange(0, BLOCK_Q)[None, :]
        mask_q = offs_q < q_width
        q = tl.load(q_ptr + token * q_row_stride + offs_q, mask=mask_q, other=0.0)
        normed = _rms_norm(q.to(tl.float32), q_weight_ptr + offs_q, mask_q, q_width, eps, q.dtype)
        tl.store(q_out_ptr + token * q_out_row_stride + offs_q, normed, mask=mask_q)
    else:
        # Both loads are under way before either is needed; an absent token is computed and not stored.
        slot = tl.load(slots_ptr + token).to(tl.int64)
        position = tl.load(positions_ptr + token).to(tl.int64)
        present = (slot >= 0) & (slot < num_slots)
        slot = tl.where(present, slot, 0)
        page = slot // PAGE
        offset = slot % PAGE
        table_row_ptr = rope_ptr + tl.where(present, position, 0) * rope_row_stride
        if part == 1:
            _write_latent(
                kv_ptr + token * kv_row_stride,
                kv_weight_ptr,
                k_pe_ptr + token * k_pe_row_stride,
                table_row_ptr,
                latent_ptr + page * latent_page_stride,
                offset,
                present,
                eps,
                LATENT,
                TILE,
                ROPE,
                LATENT_FP8,
                NATIVE,
            )
        elif INDEX > 0:
            _write_index_key(
                index_k_ptr + token * index_k_row_stride,
                index_weight_ptr,
                index_bias_ptr,
                table_row_ptr,
                index_ptr + page * index_page_stride,
                offset,
                present,
                index_eps,
                PAGE,
                INDEX,
                INDEX_STEPS,
                ROPE,
                INDEX_FP8,
                INTERLEAVED,
                ROTATE,
                NATIVE,
            )


def supports(target: Target) -> bool:
    return True


def norm_rope_cache(
    q_a_tl: torch.Tensor,
    kv_a_tc: torch.Tensor,
    k_pe_tr: torch.Tensor,
    index_k_td: torch.Tensor | None,
    positions_t: torch.Tensor,
    slots_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    *,
    q_a_weight_l: torch.Tensor,
    kv_a_weight_c: torch.Tensor,
    eps: float,
    latent_cache: torch.Tensor,
    index_k_weight_d: torch.Tensor | None = None,
    index_k_bias_d: torch.Tensor | None = None,
    index_eps: float = 1e-6,
    index_cache: torch.Tensor | None = None,
    interleaved: bool = False,
    rotate: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, q_width = q_a_tl.shape
    out = torch.empty_like(q_a_tl, memory_format=torch.contiguous_format) if out is None else out
    if tokens == 0:
        return out
    latent, rope = kv_a_tc.shape[1], k_pe_tr.shape[1]
    index = 0 if index_k_td is None or index_cache is None else index_k_td.shape[1]
    require_power_of_two("kv_a_tc", latent)
    require_power_of_two("k_pe_tr", rope)
    require_aligned_pages("latent_cache", latent_cache)
    require_aligned("out", out)
    q, kv, k_pe = aligned_rows(q_a_tl), aligned_rows(kv_a_tc), aligned_rows(k_pe_tr)
    rope_table = aligned_rows(rope_table_pr)
    key = index_k_td
    if index:
        assert key is not None
        assert index_cache is not None
        require_power_of_two("index_k_td", index)
        require_aligned_pages("index_cache", index_cache)
        key = aligned_rows(key)
    else:
        key = index_cache = index_k_weight_d = index_k_bias_d = None
        interleaved = rotate = False
    _norm_rope_cache_kernel[(tokens, 3 if index else 2)](
        q,
        out,
        aligned_rows(q_a_weight_l),
        kv,
        aligned_rows(kv_a_weight_c),
        k_pe,
        key,
        None if index_k_weight_d is None else aligned_rows(index_k_weight_d),
        None if index_k_bias_d is None else aligned_rows(index_k_bias_d),
        aligned_rows(positions_t.long()),
        aligned_rows(slots_t),
        rope_table,
        latent_cache,
        index_cache,
        q.stride(0),
        out.stride(0),
        kv.stride(0),
        k_pe.stride(0),
        0 if key is None else key.stride(0),
        rope_table.stride(0),
        latent_cache.stride(0),
        0 if index_cache is None else index_cache.stride(0),
        latent_cache.shape[0] * latent_cache.shape[1],
        q_width,
        eps,
        index_eps,
        PAGE=latent_cache.shape[1],
        LATENT=latent,
        TILE=min(LATENT_TILE, latent),
        ROPE=rope,
        INDEX=index,
        INDEX_STEPS=max(index, 1).bit_length() - 1,
        BLOCK_Q=triton.next_power_of_2(q_width),
        LATENT_FP8=latent_cache.dtype == torch.uint8,
        INDEX_FP8=index_cache is not None and index_cache.dtype == torch.uint8,
        INTERLEAVED=interleaved,
        ROTATE=rotate,
        NATIVE=native_e4m3(q.device),
        num_warps=WARPS,
    )
    return out
