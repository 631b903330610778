"""DeepSeek Sparse Attention over one step: which keys each token attends to, and the attention over them."""

from __future__ import annotations

import torch

from dsv32_plugin import kernels
from dsv32_plugin.batch import DsaBatch

DECODE_WORKSPACE_BYTES = 128 << 20
"""Bound on the scores that decodes hold at a time. Captured graphs keep a pool of this size."""


def needs_selection(batch: DsaBatch, topk: int) -> bool:
    """Whether some token may see more keys than it may select. If not, every key is selected and scoring is skipped."""
    return batch.max_visible > topk


def select_slots(
    batch: DsaBatch,
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    index_cache: torch.Tensor,
    slots_tk: torch.Tensor,
) -> torch.Tensor:
    """Score the visible index keys of every token and write the cache slots of the best K (paper, equations 1 and 2).

    Args:
        q_tid: [T, I, D] index queries, as `kernels.index_query` returns them.
        weights_ti: [T, I] float32 head weights, likewise.
        index_cache: [pages, page size, width] index keys, this step's included.
        slots_tk: [T, K] int32, written: slots in ascending position, then -1.
    """
    topk = slots_tk.shape[1]
    if batch.decodes is not None:
        rows, shape_bn = batch.decodes.tokens, batch.decodes.visible_bn.shape
        kernels.index_topk_paged(
            q_tid[rows].unflatten(0, shape_bn),
            weights_ti[rows].unflatten(0, shape_bn),
            index_cache,
            batch.decodes.table_bp,
            batch.decodes.visible_bn,
            topk,
            max_visible=batch.decodes.max_visible,
            workspace_bytes=DECODE_WORKSPACE_BYTES,
            out=slots_tk[rows].unflatten(0, shape_bn),
        )
    for chunk in batch.prefill_chunks:
        k_sd, k_scale_s = kernels.gather_index_keys(
            index_cache, chunk.block_table_bp, chunk.cu_seqlens_b1, chunk.total_keys
        )
        kernels.index_topk_ragged(
            q_tid[chunk.tokens],
            weights_ti[chunk.tokens],
            k_sd,
            k_scale_s,
            chunk.start_t,
            chunk.end_t,
            topk,
            block_table_bp=chunk.block_table_bp,
            seq_t=chunk.seq_t,
            page_size=index_cache.shape[1],
            out=slots_tk[chunk.tokens],
        )
    return slots_tk


def attend(
    batch: DsaBatch,
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attend to the selected slots, or to every visible key where `slots_tk` is None. Returns [T, H, C]."""
    if slots_tk is not None:
        return kernels.sparse_mla(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale)[0]
    return kernels.dense_mla(
        q_latent_thc,
        q_rope_thr,
        latent_cache,
        batch.block_table_bp,
        batch.seq_t,
        batch.visible_t,
        scale,
        max_visible=batch.max_visible,
    )[0]
