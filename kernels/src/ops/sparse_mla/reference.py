"""The definition of sparse_mla in plain torch."""

import torch

from ...formulas import chunks, latent_rows, softmax_lse


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
    tokens, heads, rank = q_latent_thc.shape
    if out is None:
        out = torch.empty_like(q_latent_thc, memory_format=torch.contiguous_format)
    if lse is None:
        lse = q_latent_thc.new_empty(tokens, heads, dtype=torch.float32)
    query_thd = torch.cat((q_latent_thc, q_rope_thr), dim=-1).float()
    for part in chunks(tokens, 4 * slots_tk.shape[1] * (2 * query_thd.shape[2] + 3 * heads)):
        rows_tkd, present_tk = latent_rows(latent_cache, slots_tk[part])
        scores_thk = scale * torch.einsum("thd,tkd->thk", query_thd[part], rows_tkd)
        weights_thk, lse[part] = softmax_lse(scores_thk, present_tk.unsqueeze(1))
        out[part] = torch.einsum("thk,tkc->thc", weights_thk, rows_tkd[..., :rank])
    return out, lse
