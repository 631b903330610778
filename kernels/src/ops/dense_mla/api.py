"""dense_mla: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for


def dense_mla(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    seq_t: torch.Tensor,
    visible_t: torch.Tensor,
    scale: float,
    *,
    max_visible: int,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with absorbed queries to every visible row: what `sparse_mla` gives while all keys are selected (L <= K).

        rows      = the cached rows of positions 0..min(visible[t], max_visible)-1 of sequence seq[t]
        score     = scale * (q_latent[t, h] . latent[s] + q_rope[t, h] . rope_key[s])
        out[t, h] = sum_s softmax_s(score) * latent[s],     lse[t, h] = ln sum_s exp(score)

    A row whose page is not in the cache or beyond the block table is absent: never read, no part in the result. A token
    that sees nothing gives out 0 and lse -inf. What lies in rows a token does not see, NaN included, never reaches its
    result.

    Args:
        q_latent_thc: [T, H, C] float, the query multiplied by the key half of kv_b_proj; last dim contiguous.
        q_rope_thr: [T, H, R], the dtype of q_latent, rotated in pairs (2j, 2j+1); last dim contiguous.
        latent_cache: [pages, page_size, C+R] float or [pages, page_size, 656] uint8; pages contiguous, page stride
            free.
        block_table_bp: [B, pages a sequence] int32, last dim contiguous; entries past the visible pages may be
            anything.
        seq_t: [T] int32, row of the block table, in 0..B-1.
        visible_t: [T] int32, how many positions the token sees; may be 0.
        scale: of the scores, positive.
        max_visible: bound on visible_t, on the host.
        batch_invariant: on a GPU, split the keys of every token at the same places, so that its result does not depend
            on the other tokens of the call.
        out: [T, H, C], the dtype of q_latent, last dim contiguous.
        lse: [T, H] float32, last dim contiguous.

    Returns:
        (out [T, H, C] in the dtype of q_latent, lse [T, H] float32).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1, absorbed as in DeepSeek-V3.2 (arXiv 2512.02556), appendix A.
    """
    device = q_latent_thc.device
    tokens, heads, rank, rope_dim = checks.absorbed_query(q_latent_thc, q_rope_thr)
    checks.latent_cache("latent_cache", latent_cache, rank, rope_dim, device)
    checks.tensor("block_table_bp", block_table_bp, (None, None), checks.INT32, device)
    checks.rows("block_table_bp", block_table_bp)
    checks.vector("seq_t", seq_t, tokens, checks.INT32, device)
    checks.vector("visible_t", visible_t, tokens, checks.INT32, device)
    checks.at_least("max_visible", max_visible, 0)
    checks.attention_outputs(out, lse, (tokens, heads, rank), q_latent_thc.dtype, device)
    result: tuple[torch.Tensor, torch.Tensor] = function_for("dense_mla", device)(
        q_latent_thc,
        q_rope_thr,
        latent_cache,
        block_table_bp,
        seq_t,
        visible_t,
        scale,
        max_visible=max_visible,
        batch_invariant=batch_invariant,
        out=out,
        lse=lse,
    )
    return result
