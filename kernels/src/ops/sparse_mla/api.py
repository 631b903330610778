"""sparse_mla: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for


def sparse_mla(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    scale: float,
    *,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with absorbed queries to the selected rows of a paged latent cache, one key head for all query heads.

        score[t, h, j] = scale * (q_latent[t, h] . latent[slots[t, j]] + q_rope[t, h] . rope_key[slots[t, j]])
        out[t, h]      = sum_j softmax_j(score[t, h]) * latent[slots[t, j]]
        lse[t, h]      = ln sum_j exp(score[t, h, j])

    A slot that is negative or past the end of the cache is absent: it is never read and takes no part. A token without
    any slot gives out 0 and lse -inf. What lies in rows that are not selected, NaN included, never reaches the result.

    Args:
        q_latent_thc: [T, H, C] float, the query multiplied by the key half of kv_b_proj; last dim contiguous.
        q_rope_thr: [T, H, R], the dtype of q_latent, rotated in pairs (2j, 2j+1); last dim contiguous.
        latent_cache: [pages, page_size, C+R] float or [pages, page_size, 656] uint8; pages contiguous, page stride
            free.
        slots_tk: [T, K] int32, distinct within a row, in any order; last dim contiguous.
        scale: of the scores, positive.
        batch_invariant: on a GPU, split the keys of every token at the same places, so that its result does not depend
            on the other tokens of the call.
        out: [T, H, C], the dtype of q_latent, last dim contiguous.
        lse: [T, H] float32, last dim contiguous.

    Returns:
        (out [T, H, C] in the dtype of q_latent, lse [T, H] float32).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 2 and appendix A (multi-query mode); DeepSeek-V2 (arXiv
    2405.04434).
    """
    device = q_latent_thc.device
    tokens, heads, rank, rope_dim = checks.absorbed_query(q_latent_thc, q_rope_thr)
    checks.latent_cache("latent_cache", latent_cache, rank, rope_dim, device)
    checks.tensor("slots_tk", slots_tk, (tokens, None), checks.INT32, device)
    checks.rows("slots_tk", slots_tk)
    checks.attention_outputs(out, lse, (tokens, heads, rank), q_latent_thc.dtype, device)
    result: tuple[torch.Tensor, torch.Tensor] = function_for("sparse_mla", device)(
        q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale, batch_invariant=batch_invariant, out=out, lse=lse
    )
    return result
