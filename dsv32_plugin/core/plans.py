"""DeepSeek Sparse Attention over one step: which keys each token attends to, and the attention over them.

A plan is one way of doing that. A new one, such as latents that lie elsewhere or a selection that is replayed, is
another class here and a line in `planner.Planner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch

from dsv32_plugin import kernels
from dsv32_plugin.core.latent_up import LatentUpProjection
from dsv32_plugin.core.layers import Ranks
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import PrefillChunk, Step, aligned
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE
from dsv32_plugin.kernels.limits import mask_words

DECODE_WORKSPACE_BYTES = 128 << 20
"""Bound on the scores that decodes hold at a time. Captured graphs keep a pool of this size."""

LEAST_SHARED_TOKENS = 64
"""Prefill tokens from which on the ranks share them out."""


@dataclass(frozen=True)
class Plan:
    """A way of attending in one step."""

    step: Step
    policy: Policy
    selects: ClassVar[bool] = False
    """Layers with an indexer call `select`, and those without use the slots that the last one of these has left."""

    def select(
        self,
        q_tid: torch.Tensor,
        weights_ti: torch.Tensor,
        index_cache: torch.Tensor,
        slots_tk: torch.Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        """Score the visible index keys of every token and write the slots of the best K (paper, equations 1 and 2).

        Args:
            q_tid: [T, I, D] index queries, as `kernels.index_query` returns them.
            weights_ti: [T, I] float32 head weights, likewise.
            index_cache: [pages, page size, width] index keys, this step's included.
            slots_tk: [T, K] int32, written: slots in ascending position, then -1.
            ranks: with whom the tokens of prefills are shared out; all of them hold the same arguments.
        """
        raise NotImplementedError

    def values(
        self,
        up: LatentUpProjection,
        q_thd: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
        ready: Callable[[], None],
    ) -> torch.Tensor:
        """What the tokens attend to, [T, H, v].

        Args:
            q_thd: [T, H, nope + R] queries, their rope parts rotated.
            slots_tk: [T, K], of plans that select.
            ready: called before `slots_tk` is read.
        """
        q_nope_thd, q_rope_thr = q_thd.split([up.nope, up.rope], dim=-1)
        q_latent_thc = up.absorb(q_nope_thd)
        ready()
        return up.values(self.over_latents(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale))

    def over_latents(
        self,
        q_latent_thc: torch.Tensor,
        q_rope_thr: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention of absorbed queries, [T, H, C]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dense(Plan):
    """To every visible key, on the latents."""

    def over_latents(
        self,
        q_latent_thc: torch.Tensor,
        q_rope_thr: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        step = self.step
        return kernels.dense_mla(
            q_latent_thc,
            q_rope_thr,
            latent_cache,
            step.block_table_bp,
            step.seq_t,
            step.visible_t,
            scale,
            max_visible=step.max_visible,
            batch_invariant=self.policy.batch_invariant,
        )[0]


@dataclass(frozen=True)
class Expanded(Plan):
    """To every visible key: prefills to keys and values of every head, decodes to the latents."""

    @cached_property
    def _decodes(self) -> Dense:
        assert self.step.decodes is not None
        rows = self.step.decodes.tokens
        seq_t, visible_t = aligned(self.step.seq_t[rows]), aligned(self.step.visible_t[rows])
        return Dense(replace(self.step, seq_t=seq_t, visible_t=visible_t), self.policy)

    def values(
        self,
        up: LatentUpProjection,
        q_thd: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
        ready: Callable[[], None],
    ) -> torch.Tensor:
        values_thv = q_thd.new_empty(*q_thd.shape[:2], up.value_dim)
        if self.step.decodes is not None:
            rows = self.step.decodes.tokens
            values_thv[rows] = self._decodes.values(up, q_thd[rows], latent_cache, None, scale, ready)
        for chunk in self.step.prefill_chunks:
            rows, visible = chunk.tokens, (chunk.start_t, chunk.end_t)
            for heads, k_shd, v_shv in expanded(up, chunk, latent_cache, q_thd.dtype):
                kernels.masked_mha(q_thd[rows, heads], k_shd, v_shv, *visible, scale, out=values_thv[rows, heads])
        return values_thv


def expanded(
    up: LatentUpProjection, chunk: PrefillChunk, latent_cache: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some heads, and their keys [S, h, nope + R] and values [S, h, v] of a chunk's sequences, until it were all."""
    rows_sc = kernels.gather_latents(
        latent_cache, chunk.block_table_bp, chunk.cu_seqlens_b1, chunk.total_keys, dtype=dtype
    )
    for heads in up.head_parts(chunk.total_keys, dtype.itemsize):
        yield heads, *up.expand(rows_sc, heads)


@dataclass(frozen=True)
class Sparse(Plan):
    """To the selected slots, on the latents where they lie."""

    selects: ClassVar[bool] = True

    def select(
        self,
        q_tid: torch.Tensor,
        weights_ti: torch.Tensor,
        index_cache: torch.Tensor,
        slots_tk: torch.Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        decodes, topk = self.step.decodes, slots_tk.shape[1]
        if decodes is not None:
            rows, shape_bn = decodes.tokens, decodes.visible_bn.shape
            kernels.index_topk_paged(
                q_tid[rows].unflatten(0, shape_bn),
                weights_ti[rows].unflatten(0, shape_bn),
                index_cache,
                decodes.table_bp,
                decodes.visible_bn,
                topk,
                max_visible=decodes.longest,
                workspace_bytes=DECODE_WORKSPACE_BYTES,
                out=slots_tk[rows].unflatten(0, shape_bn),
            )
        for chunk in self.step.prefill_chunks:
            rows = chunk.tokens
            self._select_chunk(chunk, q_tid[rows], weights_ti[rows], index_cache, slots_tk[rows], ranks)

    def _select_chunk(
        self,
        chunk: PrefillChunk,
        q_tid: torch.Tensor,
        weights_ti: torch.Tensor,
        index_cache: torch.Tensor,
        slots_tk: torch.Tensor,
        ranks: Ranks | None,
    ) -> None:
        keys = kernels.gather_index_keys(index_cache, chunk.block_table_bp, chunk.cu_seqlens_b1, chunk.total_keys)
        pages = self._pages(chunk, index_cache.shape[1])
        out_tk = slots_tk[:, : self._width(chunk, slots_tk.shape[1])]
        tokens, width = out_tk.shape

        def select(rows: slice, out: torch.Tensor) -> None:
            self._select_rows(chunk, rows, q_tid[rows], weights_ti[rows], keys, slots_tk.shape[1], pages, out)

        if ranks is None or tokens < LEAST_SHARED_TOKENS:
            select(slice(None), out_tk)
            return
        # Every rank takes every n-th token, since later tokens see more keys.
        mine = slice(ranks.rank, None, ranks.size)
        most = -(-tokens // ranks.size)
        part_tk = slots_tk.new_empty(most, width)
        select(mine, part_tk[: len(range(tokens)[mine])])
        gathered_rtk = ranks.all_gather(part_tk).unflatten(0, (ranks.size, most))
        out_tk.copy_(gathered_rtk.transpose(0, 1).flatten(0, 1)[:tokens])

    def _select_rows(
        self,
        chunk: PrefillChunk,
        rows: slice,
        q_tid: torch.Tensor,
        weights_ti: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor | None],
        topk: int,
        pages: tuple[torch.Tensor, int],
        out: torch.Tensor,
    ) -> None:
        """Select for some tokens of a chunk, whose index keys and their scales are `keys`."""
        visible = chunk.start_t[rows].contiguous(), chunk.end_t[rows].contiguous()
        seq_t, (table_bp, page_size) = chunk.seq_t[rows].contiguous(), pages
        kernels.index_topk_ragged(
            q_tid, weights_ti, *keys, *visible, topk, block_table_bp=table_bp, seq_t=seq_t, page_size=page_size, out=out
        )

    def _width(self, chunk: PrefillChunk, topk: int) -> int:
        """Of `slots_tk`, how many words a token's selection takes."""
        return topk

    def _pages(self, chunk: PrefillChunk, page_size: int) -> tuple[torch.Tensor, int]:
        """The pages that the slots of a chunk's tokens are of, and their size."""
        return chunk.block_table_bp, page_size

    def over_latents(
        self,
        q_latent_thc: torch.Tensor,
        q_rope_thr: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        assert slots_tk is not None
        invariant = self.policy.batch_invariant
        return kernels.sparse_mla(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale, batch_invariant=invariant)[0]


@dataclass(frozen=True)
class Staged(Sparse):
    """To the selected slots: those of prefills are of a copy of their sequences' latents, made in every layer."""

    def _pages(self, chunk: PrefillChunk, page_size: int) -> tuple[torch.Tensor, int]:
        return chunk.copied.block_table_bp, PAGE_SIZE

    def over_latents(
        self,
        q_latent_thc: torch.Tensor,
        q_rope_thr: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        assert slots_tk is not None
        out_thc = torch.empty_like(q_latent_thc, memory_format=torch.contiguous_format)

        def attend_rows(rows: slice, cache: torch.Tensor) -> None:
            kernels.sparse_mla(q_latent_thc[rows], q_rope_thr[rows], cache, slots_tk[rows], scale, out=out_thc[rows])

        if self.step.decodes is not None:
            attend_rows(self.step.decodes.tokens, latent_cache)
        for chunk in self.step.prefill_chunks:
            copied, dtype = chunk.copied, q_latent_thc.dtype
            rows_sc = kernels.gather_latents(
                latent_cache, chunk.block_table_bp, copied.first_row_b1, copied.rows, dtype=dtype
            )
            attend_rows(chunk.tokens, rows_sc.unflatten(0, (-1, PAGE_SIZE)))
        return out_thc


@dataclass(frozen=True)
class Masked(Sparse):
    """Prefills, to keys and values of every head under a mask of those selected, which is left in place of slots.

    A row of slots has a bit for each of 32 K keys.
    """

    def _select_rows(
        self,
        chunk: PrefillChunk,
        rows: slice,
        q_tid: torch.Tensor,
        weights_ti: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor | None],
        topk: int,
        pages: tuple[torch.Tensor, int],
        out: torch.Tensor,
    ) -> None:
        visible = chunk.start_t[rows].contiguous(), chunk.end_t[rows].contiguous()
        kernels.index_mask_ragged(q_tid, weights_ti, *keys, *visible, topk, out=out)

    def _width(self, chunk: PrefillChunk, topk: int) -> int:
        return mask_words(chunk.total_keys)

    def values(
        self,
        up: LatentUpProjection,
        q_thd: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
        ready: Callable[[], None],
    ) -> torch.Tensor:
        assert slots_tk is not None
        ready()
        values_thv = q_thd.new_empty(*q_thd.shape[:2], up.value_dim)
        for chunk in self.step.prefill_chunks:
            rows, visible = chunk.tokens, (chunk.start_t, chunk.end_t)
            mask_tw = slots_tk[rows, : mask_words(chunk.total_keys)]
            for heads, k_shd, v_shv in expanded(up, chunk, latent_cache, q_thd.dtype):
                query, out = q_thd[rows, heads], values_thv[rows, heads]
                kernels.masked_mha(query, k_shd, v_shv, *visible, scale, mask_tw=mask_tw, out=out)
        return values_thv


@dataclass(frozen=True)
class Parts(Plan):
    """Every part of a step in a way of its own: its rows, and the plan of a step that they are."""

    parts: tuple[tuple[slice, Plan], ...]
    selects: ClassVar[bool] = True

    def select(
        self,
        q_tid: torch.Tensor,
        weights_ti: torch.Tensor,
        index_cache: torch.Tensor,
        slots_tk: torch.Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        for rows, plan in self.parts:
            plan.select(q_tid[rows], weights_ti[rows], index_cache, slots_tk[rows], ranks)

    def values(
        self,
        up: LatentUpProjection,
        q_thd: torch.Tensor,
        latent_cache: torch.Tensor,
        slots_tk: torch.Tensor | None,
        scale: float,
        ready: Callable[[], None],
    ) -> torch.Tensor:
        assert slots_tk is not None
        values_thv = q_thd.new_empty(*q_thd.shape[:2], up.value_dim)
        for rows, plan in self.parts:
            values_thv[rows] = plan.values(up, q_thd[rows], latent_cache, slots_tk[rows], scale, ready)
        return values_thv
