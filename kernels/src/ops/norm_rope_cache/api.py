"""norm_rope_cache: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for


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
    """Normalise and rotate what a layer caches for each token, write both caches, and return the normalised q_a.

        returned       RMSNorm(q_a)
        latent_cache   [RMSNorm(kv_a) | rope(k_pe, pairs (2j, 2j+1))]                     at slots[t]
        index_cache    rope(LayerNorm(index_k))[first R of D], then x H / sqrt(D) if rotate  at slots[t]

    RMSNorm(x) = weight * cast(x / sqrt(mean(x^2) + eps)): the quotient in float32, the product in the dtype of x, as in
    Hugging Face. LayerNorm is computed in float32 with its weight and bias, then cast to the dtype of index_k. Rope and
    rotation are float32 from there to the cache, whose dtype is the only further rounding; H is the Hadamard matrix in
    Sylvester's order. An fp8 cache stores e4m3fn with power-of-two scales, one for an index key and one for each 128
    latents, and the rope key as bfloat16 (`cache_layout`); a NaN or inf becomes NaN there, and the values that share
    its scale are undefined.

    Args:
        q_a_tl: [T, L] float. The four inputs may be slices of one fused projection: last dim contiguous, row stride
            free.
        kv_a_tc: [T, C] float.
        k_pe_tr: [T, R] float.
        index_k_td: [T, D] float; None, with `index_cache=None`, in a layer that reuses the selection of an earlier one.
        positions_t: [T] int64 or int32, the token's position in its sequence, in 0..P-1.
        slots_t: [T] int64, the row of both caches to write; negative or past the end: the token is not written. Slots
            that are written are distinct.
        rope_table_pr: [P, R] float32, row = cos (R/2) | sin (R/2) (`dsv32_plugin.core.rope.rope_table`).
        q_a_weight_l: [L] float.
        kv_a_weight_c: [C] float.
        eps: of both RMSNorms.
        latent_cache: [pages, page_size, C+R] float or [pages, page_size, 656] uint8; pages contiguous, page stride
            free. Written.
        index_k_weight_d: [D] float, of the LayerNorm.
        index_k_bias_d: [D] float, of the LayerNorm.
        index_eps: of the LayerNorm.
        index_cache: [pages, page_size, D] float or [pages, page_size, D+4] uint8, laid out by page. Written.
        interleaved: index rope in pairs (2j, 2j+1) (GLM-5) instead of (j, j+R/2) (DeepSeek-V3.2).
        rotate: apply the Hadamard rotation to the index key; D is a power of two. The index query must agree.
        out: [T, L], the dtype of q_a, last dim contiguous.

    Returns:
        [T, L] in the dtype of q_a (`out` where given).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device; only some of the index
            arguments are given.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1 and the inference code of the model repository (`Indexer`,
    `MLA`); latents as in DeepSeek-V2 (arXiv 2405.04434), equations 9 to 15.
    """
    device = q_a_tl.device
    checks.tensor("q_a_tl", q_a_tl, (None, None), checks.FLOATS, device)
    tokens, q_rank = q_a_tl.shape
    checks.tensor("kv_a_tc", kv_a_tc, (tokens, None), checks.FLOATS, device)
    checks.tensor("k_pe_tr", k_pe_tr, (tokens, None), checks.FLOATS, device)
    rank, rope_dim = kv_a_tc.shape[1], k_pe_tr.shape[1]
    checks.rows("q_a_tl", q_a_tl)
    checks.rows("kv_a_tc", kv_a_tc)
    checks.rows("k_pe_tr", k_pe_tr)
    checks.vector("positions_t", positions_t, tokens, checks.INTS, device)
    checks.vector("slots_t", slots_t, tokens, checks.INT64, device)
    checks.rope_table("rope_table_pr", rope_table_pr, rope_dim, device)
    checks.vector("q_a_weight_l", q_a_weight_l, q_rank, checks.FLOATS, device)
    checks.vector("kv_a_weight_c", kv_a_weight_c, rank, checks.FLOATS, device)
    checks.latent_cache("latent_cache", latent_cache, rank, rope_dim, device)
    index_arguments = {
        "index_k_td": index_k_td,
        "index_k_weight_d": index_k_weight_d,
        "index_k_bias_d": index_k_bias_d,
        "index_cache": index_cache,
    }
    checks.together(index_arguments)
    if index_k_td is not None:
        assert index_k_weight_d is not None
        assert index_k_bias_d is not None
        assert index_cache is not None
        checks.tensor("index_k_td", index_k_td, (tokens, None), checks.FLOATS, device)
        checks.rows("index_k_td", index_k_td)
        index_dim = index_k_td.shape[1]
        checks.index_rope("index_k_td", index_dim, rope_dim, rotate)
        checks.vector("index_k_weight_d", index_k_weight_d, index_dim, checks.FLOATS, device)
        checks.vector("index_k_bias_d", index_k_bias_d, index_dim, checks.FLOATS, device)
        checks.index_cache("index_cache", index_cache, index_dim, device)
    if out is not None:
        checks.tensor("out", out, (tokens, q_rank), (q_a_tl.dtype,), device)
        checks.rows("out", out)
    result: torch.Tensor = function_for("norm_rope_cache", device)(
        q_a_tl,
        kv_a_tc,
        k_pe_tr,
        index_k_td,
        positions_t,
        slots_t,
        rope_table_pr,
        q_a_weight_l=q_a_weight_l,
        kv_a_weight_c=kv_a_weight_c,
        eps=eps,
        latent_cache=latent_cache,
        index_k_weight_d=index_k_weight_d,
        index_k_bias_d=index_k_bias_d,
        index_eps=index_eps,
        index_cache=index_cache,
        interleaved=interleaved,
        rotate=rotate,
        out=out,
    )
    return result
