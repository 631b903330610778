"""DeepSeek Sparse Attention over one step: which keys each token attends to, and the attention over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv32_plugin import kernels, settings
from dsv32_plugin.batch import MAX_GATHERED_KEYS, DsaBatch, PrefillChunk
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE

DECODE_WORKSPACE_BYTES = 128 << 20
"""Bound on the scores that decodes hold at a time. Captured graphs keep a pool of this size."""

LEAST_SHARED_TOKENS = 64
"""Prefill tokens from which on the ranks share them out."""


@dataclass(frozen=True)
class Ranks:
    """The tensor parallel ranks, each of which holds the whole indexer."""

    rank: int
    size: int
    all_gather: Callable[[torch.Tensor], torch.Tensor]
    """[T, K] of this rank -> [size * T, K] of all, in their order."""


MAX_EXPANDED_KEYS = 4096
"""Latents that a prefill expands at a time: 4096 are 320 MiB of keys and values with 128 heads in bfloat16."""


EXPANDED_PAIRS = 1 << 27
"""Pairs of a query and a key, over all heads, from which on latents are expanded. H100, us with what launching takes,
latents against expanded: 128 heads, T = L: 512 844 1276, 1024 1308 1207, 2048 2359 1516; L = 2048: T = 256 910 1027,
T = 512 1246 1134; 16 heads, L = 2048: T = 2048 974 1044, four of them 2463 1234."""


LEAST_COPYING_TOKENS = 256
"""Prefill tokens from which on a copy of the latents may pay; then a program attends to all keys of its token."""

COPIED_KEYS = 4
"""Keys for each head of each prefill token up to which a copy of the latents pays. H200, attention over fp8 against
the copy and attention over bfloat16, T = 256, 1024, 4096: 16 heads, L = 32K 1.05 1.25 1.30 times as fast, L = 128K 0.65
1.02 1.19; 32 heads, L = 128K 0.94 1.29 1.42; 128 heads, L = 8K 1.23 1.24 1.25, L = 128K 1.14 1.37 1.45. By the kernels
of every GPU, T = 1024, L = 32K: 16 heads 2.08, 128 heads 3.70."""


def gathered_keys(max_visible: int, topk: int) -> int:
    """Keys that a prefill chunk of a batch gathers at most, unless one sequence is longer."""
    return MAX_EXPANDED_KEYS if max_visible <= topk else MAX_GATHERED_KEYS


def expands(batch: DsaBatch, heads: int) -> bool:
    """Whether prefills to whom every key is visible have so many that expanding the keys to every head pays.

    Never in the batch-invariant mode: what a token gets would depend on the others.
    """
    pairs = sum(chunk.pairs for chunk in batch.prefill_chunks)
    return not settings.batch_invariant() and heads * pairs >= EXPANDED_PAIRS


def copies_latents(batch: DsaBatch, heads: int, latent_cache: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether prefills attend to a copy of their latents in `dtype`: attention over bfloat16 is faster than over fp8.

    It must, for all heads and tokens, make up for one read and one write of every latent. Never in the batch-invariant
    mode: what a token gets would depend on the others.
    """
    if latent_cache.dtype is not torch.uint8 or dtype is not torch.bfloat16 or settings.batch_invariant():
        return False
    tokens = sum(chunk.tokens.stop - chunk.tokens.start for chunk in batch.prefill_chunks)
    keys = sum(chunk.total_keys for chunk in batch.prefill_chunks)
    most = max((chunk.total_keys for chunk in batch.prefill_chunks), default=0)
    return tokens >= LEAST_COPYING_TOKENS and keys <= COPIED_KEYS * heads * tokens and most <= MAX_GATHERED_KEYS


def needs_selection(batch: DsaBatch, topk: int) -> bool:
    """Whether some token may see more keys than it may select. If not, every key is selected and scoring is skipped."""
    return batch.max_visible > topk


def select_slots(
    batch: DsaBatch,
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    index_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    ranks: Ranks | None = None,
    *,
    copied: bool = False,
) -> torch.Tensor:
    """Score the visible index keys of every token and write the cache slots of the best K (paper, equations 1 and 2).

    Args:
        q_tid: [T, I, D] index queries, as `kernels.index_query` returns them.
        weights_ti: [T, I] float32 head weights, likewise.
        index_cache: [pages, page size, width] index keys, this step's included.
        slots_tk: [T, K] int32, written: slots in ascending position, then -1.
        ranks: with whom the tokens of prefills are shared out; all of them hold the same arguments.
        copied: whether the slots of prefill tokens are those of `PrefillChunk.copied`, as `attend` is then told, too.
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
            max_visible=batch.decodes.longest,
            workspace_bytes=DECODE_WORKSPACE_BYTES,
            out=slots_tk[rows].unflatten(0, shape_bn),
        )
    for chunk in batch.prefill_chunks:
        rows = chunk.tokens
        _select_chunk(chunk, q_tid[rows], weights_ti[rows], index_cache, slots_tk[rows], ranks, copied)
    return slots_tk


def _select_chunk(
    chunk: PrefillChunk,
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    index_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    ranks: Ranks | None,
    copied: bool,
) -> None:
    tokens, topk = slots_tk.shape
    table_bp, page_size = chunk.block_table_bp, index_cache.shape[1]
    k_sd, k_scale_s = kernels.gather_index_keys(
        index_cache, chunk.block_table_bp, chunk.cu_seqlens_b1, chunk.total_keys
    )

    if copied:
        table_bp, page_size = chunk.copied.block_table_bp, PAGE_SIZE

    def select(rows: slice, out: torch.Tensor) -> None:
        kernels.index_topk_ragged(
            q_tid[rows],
            weights_ti[rows],
            k_sd,
            k_scale_s,
            chunk.start_t[rows].contiguous(),
            chunk.end_t[rows].contiguous(),
            topk,
            block_table_bp=table_bp,
            seq_t=chunk.seq_t[rows].contiguous(),
            page_size=page_size,
            out=out,
        )

    if ranks is None or tokens < LEAST_SHARED_TOKENS:
        select(slice(None), slots_tk)
        return
    # Every rank takes every n-th token, since later tokens see more keys.
    mine = slice(ranks.rank, None, ranks.size)
    most = -(-tokens // ranks.size)
    part_tk = slots_tk.new_empty(most, topk)
    select(mine, part_tk[: len(range(tokens)[mine])])
    gathered_rtk = ranks.all_gather(part_tk).unflatten(0, (ranks.size, most))
    slots_tk.copy_(gathered_rtk.transpose(0, 1).flatten(0, 1)[:tokens])


def attend(
    batch: DsaBatch,
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor | None,
    scale: float,
    *,
    copied: bool = False,
) -> torch.Tensor:
    """Attend to the selected slots, or to every visible key where `slots_tk` is None. Returns [T, H, C].

    copied: whether the slots of prefill tokens are those of a copy of their sequences' latents, which is made here.
    """
    if slots_tk is None:
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
    if not copied:
        return kernels.sparse_mla(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale)[0]
    out_thc = torch.empty_like(q_latent_thc, memory_format=torch.contiguous_format)

    def attend_rows(rows: slice, cache: torch.Tensor) -> None:
        kernels.sparse_mla(q_latent_thc[rows], q_rope_thr[rows], cache, slots_tk[rows], scale, out=out_thc[rows])

    if batch.decodes is not None:
        attend_rows(batch.decodes.tokens, latent_cache)
    for chunk in batch.prefill_chunks:
        rows_sc = kernels.gather_latents(
            latent_cache, chunk.block_table_bp, chunk.copied.first_row_b1, chunk.copied.rows, dtype=q_latent_thc.dtype
        )
        attend_rows(chunk.tokens, rows_sc.unflatten(0, (-1, PAGE_SIZE)))
    return out_thc
