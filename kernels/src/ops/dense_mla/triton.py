"""dense_mla on every GPU that Triton compiles for: sparse_mla's kernel, led by the block table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...runtime.aot import AotCase, Target
from ..sparse_mla import triton as sparse


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
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]] = sparse.attend,
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


def aot_cases(target: Target) -> list[AotCase]:
    return sparse.aot_cases(target, paged=True)
