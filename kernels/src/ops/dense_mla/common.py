"""dense_mla by an attention of sparse_mla, which the block table leads in place of a list of slots."""

from __future__ import annotations

from collections.abc import Callable

import torch


def dense_mla(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    seq_t: torch.Tensor,
    visible_t: torch.Tensor,
    scale: float,
    *,
    max_visible: int,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(
        q_latent_thc,
        q_rope_thr,
        latent_cache,
        block_table_bp,
        scale,
        num_keys=max_visible,
        seq_t=seq_t,
        visible_t=visible_t,
        out=out,
        lse=lse,
    )
