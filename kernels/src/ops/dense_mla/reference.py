"""The definition of dense_mla in plain torch."""

import torch

from ...formulas import chunks, latent_rows, slots_of, softmax_lse, split_finite, weighted_sum


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
    tokens, heads, rank = q_latent_thc.shape
    if out is None:
        out = torch.empty_like(q_latent_thc, memory_format=torch.contiguous_format)
    if lse is None:
        lse = q_latent_thc.new_empty(tokens, heads, dtype=torch.float32)
    query_thd = torch.cat((q_latent_thc, q_rope_thr), dim=-1).float()
    for seq in seq_t.unique():
        tokens_of_seq = (seq_t == seq).nonzero().squeeze(1)
        longest = int(visible_t[tokens_of_seq].clamp(0, max_visible).max())
        position_s = torch.arange(longest, device=seq_t.device)
        slots_s = slots_of(block_table_bp, seq.long(), position_s, latent_cache.shape[1])
        rows_sd, present_s = latent_rows(latent_cache, slots_s)
        latent_s1c, spoiled_s = split_finite(rows_sd[:, None, :rank])
        for part in chunks(len(tokens_of_seq), 12 * heads * longest):
            token_t = tokens_of_seq[part]
            visible_ts = (position_s < visible_t[token_t].unsqueeze(1)) & present_s
            scores_ths = scale * torch.einsum("thd,sd->ths", query_thd[token_t], rows_sd)
            weights_ths, lse_th = softmax_lse(scores_ths, visible_ts.unsqueeze(1))
            out[token_t] = weighted_sum(weights_ths, visible_ts, latent_s1c, spoiled_s).to(out.dtype)
            lse[token_t] = lse_th
    return out, lse
