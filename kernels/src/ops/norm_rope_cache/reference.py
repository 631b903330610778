"""The definition of norm_rope_cache in plain torch."""

import torch
from torch.nn.functional import layer_norm

from ...cache_layout import LATENT_TILE
from ...formulas import deliver, index_pages, page_and_offset, quantize, rope
from ...formulas import rotate as rotated


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
    cos_sin_tr = rope_table_pr[positions_t]

    latent_tc = rms_norm(kv_a_tc, kv_a_weight_c, eps)
    rope_key_tr = rope(k_pe_tr, cos_sin_tr, interleaved=True)
    write_latents(latent_cache, slots_t, latent_tc, rope_key_tr)

    if index_k_td is not None and index_cache is not None:
        assert index_k_weight_d is not None
        assert index_k_bias_d is not None
        index_dim = index_k_td.shape[1]
        normed_td = layer_norm(
            index_k_td.float(), (index_dim,), index_k_weight_d.float(), index_k_bias_d.float(), index_eps
        )
        key_td = rope(normed_td.to(index_k_td.dtype), cos_sin_tr, interleaved=interleaved)
        key_td = rotated(key_td) if rotate else key_td
        write_index_keys(index_cache, slots_t, key_td)

    return deliver(rms_norm(q_a_tl, q_a_weight_l, eps), out)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, times the weight in that dtype."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


def write_latents(
    latent_cache: torch.Tensor, slots_t: torch.Tensor, latent_tc: torch.Tensor, rope_key_tr: torch.Tensor
) -> None:
    present, page, offset = page_and_offset(latent_cache, slots_t)
    if latent_cache.dtype == torch.uint8:
        values, scales = quantize(latent_tc, LATENT_TILE)
        parts = (values, scales, rope_key_tr.to(torch.bfloat16))
        row = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
    else:
        row = torch.cat((latent_tc.to(latent_cache.dtype), rope_key_tr.to(latent_cache.dtype)), dim=-1)
    latent_cache[page[present], offset[present]] = row[present]


def write_index_keys(index_cache: torch.Tensor, slots_t: torch.Tensor, key_td: torch.Tensor) -> None:
    present, page, offset = page_and_offset(index_cache, slots_t)
    page, offset, key_td = page[present], offset[present], key_td[present]
    if index_cache.dtype == torch.uint8:
        values, scales = quantize(key_td, key_td.shape[1])
        value_pages, scale_pages = index_pages(index_cache)
        value_pages[page, offset] = values.view(torch.uint8)
        scale_pages[page, offset] = scales[:, 0]
    else:
        index_cache[page, offset] = key_td.to(index_cache.dtype)
