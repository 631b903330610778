"""dense_mla by an attention of sparse_mla, which the block table leads in place of a list of slots."""

from __future__ import annotations

import torch

from ..sparse_mla.common import Attend, Attention


def dense_mla(
    attend: Attend,
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
    queries = q_latent_thc, q_rope_thr, latent_cache
    call = Attention(*queries, block_table_bp, scale, max_visible, batch_invariant, seq_t, visible_t)
    return attend(call, out, lse)
