"""MLA with the lightning indexer, on whatever linear layers an engine has: one layer's projections around `dsa`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from dsv32_plugin import kernels
from dsv32_plugin.core import dsa
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.latent_up import LatentUpProjection
from dsv32_plugin.core.rope import softmax_scale
from dsv32_plugin.core.step import DsaBatch, aligned
from dsv32_plugin.core.streams import SideStream

INDEX_NORM_EPS = 1e-6
"""LayerNorm of the index keys; not in config.json."""


class Layers(Protocol):
    """What an engine builds a model from. Linear layers have no bias and return a tuple that begins with the result."""

    tp_rank: int
    tp_size: int
    ranks: dsa.Ranks | None
    """With whom the selection of prefills is shared out."""

    def replicated(self, inputs: int, outputs: int, prefix: str, *, quantised: bool = True) -> nn.Module:
        """The whole matrix on every rank."""

    def merged(self, inputs: int, widths: Sequence[int], prefix: str) -> nn.Module:
        """Several matrices over one input, whole on every rank, as one product."""

    def column(self, inputs: int, outputs: int, prefix: str) -> nn.Module:
        """The outputs cut over the ranks."""

    def gate_up(self, inputs: int, width: int, prefix: str) -> nn.Module:
        """Two matrices of the same width over one input as one product, each one's outputs cut over the ranks."""

    def row(self, inputs: int, outputs: int, prefix: str, *, reduce: bool = True) -> nn.Module:
        """The inputs cut over the ranks, the results added up unless told not to."""

    def silu_and_mul(self) -> nn.Module:
        """silu(first half) * second half."""

    def norm(self, size: int, eps: float) -> nn.Module:
        """RMSNorm."""


@dataclass(frozen=True)
class LayerCaches:
    """One layer's paged caches, [pages, page size, width]; a layer that shares a selection has no index keys."""

    latents: torch.Tensor
    index_keys: torch.Tensor | None


def quantises_index_keys(dtype: torch.dtype) -> bool:
    """Keys in float32 models stay exact, which makes them equal to Hugging Face; all others are fp8."""
    return dtype != torch.float32


class Indexer(nn.Module):
    """The weights that score keys (paper, equation 1). The same on every rank.

    `wk` is computed together with the other projections of the hidden state, in `DsaAttention`.
    """

    def __init__(self, config: DsaConfig, layers: Layers, prefix: str) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.interleaved = config.index_rope_interleave
        self.quantised = quantises_index_keys(torch.get_default_dtype())
        self.wq_b = layers.replicated(config.q_lora_rank, self.heads * self.dim, f"{prefix}.wq_b")
        self.weights_proj = layers.replicated(config.hidden_size, self.heads, f"{prefix}.weights_proj", quantised=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=INDEX_NORM_EPS)
        self.k_cache: Any = None
        """For an engine that keeps caches in the modules."""

    def query(
        self, weights_ti: torch.Tensor, q_a_tl: torch.Tensor, positions_t: torch.Tensor, rope_table_pr: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries [T, I, D] and their head weights [T, I], of what `weights_proj` gave."""
        q_tid = self.wq_b(q_a_tl)[0].unflatten(-1, (self.heads, self.dim))
        return kernels.index_query(
            q_tid,
            weights_ti,
            positions_t,
            rope_table_pr,
            interleaved=self.interleaved,
            rotate=self.quantised,
            quantize=self.quantised,
        )


class DsaAttention(nn.Module):
    """One layer's attention. A layer without an indexer attends to the slots that an earlier layer selected."""

    def __init__(self, config: DsaConfig, layers: Layers, layer: int, rope_table_pr: torch.Tensor, prefix: str) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads // layers.tp_size
        self.ranks = layers.ranks
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.topk = config.kv_lora_rank, config.index_topk
        self.eps, self.scale = config.rms_norm_eps, softmax_scale(config.qk_head_dim, config.rope)
        self.rope_table_pr = rope_table_pr

        selects = config.selects(layer)
        # One product for all that is projected from the hidden state. The widths before the last are multiples of the
        # 128-wide scale blocks of fp8 checkpoints in every released model, the last need not be.
        self.a_widths = [config.q_lora_rank, *([config.index_head_dim] if selects else []), self.latent + self.rope]
        self.a_proj_name = "q_index_kv_a_proj" if selects else "q_kv_a_proj"
        self.add_module(
            self.a_proj_name, layers.merged(config.hidden_size, self.a_widths, f"{prefix}.{self.a_proj_name}")
        )
        self.indexer = Indexer(config, layers, f"{prefix}.indexer") if selects else None
        self.q_a_layernorm: Any = layers.norm(config.q_lora_rank, self.eps)
        self.kv_a_layernorm: Any = layers.norm(self.latent, self.eps)
        self.q_b_proj = layers.column(config.q_lora_rank, config.num_heads * config.qk_head_dim, f"{prefix}.q_b_proj")
        self.kv_up = LatentUpProjection(config, self.num_heads, layers.tp_rank)
        self.o_proj = layers.row(config.num_heads * config.v_head_dim, config.hidden_size, f"{prefix}.o_proj")

    def attend(
        self,
        batch: DsaBatch,
        positions_t: torch.Tensor,
        hidden_th: torch.Tensor,
        slots_tk: torch.Tensor,
        caches: LayerCaches,
    ) -> torch.Tensor:
        """Attend, and leave this layer's selection in `slots_tk` [T, K] for the layers that share it."""
        selected_tk = slots_tk if dsa.needs_selection(batch, self.topk) else None
        indexer = self.indexer if selected_tk is not None else None
        copied = selected_tk is not None and dsa.copies_latents(batch, self.num_heads, caches.latents, hidden_th.dtype)
        # In steps of decodes alone many launches leave most of a GPU idle: there some run at once.
        aside = SideStream(hidden_th.device, enabled=indexer is not None and not batch.prefill_chunks)
        if indexer is not None:
            with aside.work():
                weights_ti = indexer.weights_proj(hidden_th)[0]
        q_a_tl = self._write_caches(*self._projected(hidden_th), positions_t, batch, caches)
        if indexer is not None:
            assert selected_tk is not None
            assert caches.index_keys is not None, "a layer that selects has index keys"
            aside.join()
            query = indexer.query(weights_ti, q_a_tl, positions_t, self.rope_table_pr)
            with aside.work():
                dsa.select_slots(batch, *query, caches.index_keys, selected_tk, self.ranks, copied=copied)
        q_thd = self._queries(q_a_tl)
        q_nope_thd, q_rope_thr = q_thd.split([self.nope, self.rope], dim=-1)
        kernels.rope_query(q_rope_thr, positions_t, self.rope_table_pr, out=q_rope_thr)
        if selected_tk is None and dsa.expands(batch, self.num_heads):
            values_thv = self._attend_expanded(batch, q_thd, caches.latents)
        else:
            q_latent_thc = self.kv_up.absorb(q_nope_thd)
            aside.join()
            values_thv = self._attend_latents(batch, q_latent_thc, q_rope_thr, caches.latents, selected_tk, copied)
        return self.o_proj(values_thv.flatten(1))[0]

    def project_only(self, hidden_th: torch.Tensor) -> torch.Tensor:
        """Every matrix product of `attend`, and no attention: for a run without caches."""
        q_nope_thd = self._queries(self._projected(hidden_th)[0])[..., : self.nope]
        return self.o_proj(self.kv_up.values(self.kv_up.absorb(q_nope_thd)).flatten(1))[0]

    def _attend_latents(
        self,
        batch: DsaBatch,
        q_latent_thc: torch.Tensor,
        q_rope_thr: torch.Tensor,
        latent_cache: torch.Tensor,
        selected_tk: torch.Tensor | None,
        copied: bool = False,
    ) -> torch.Tensor:
        out_thc = dsa.attend(batch, q_latent_thc, q_rope_thr, latent_cache, selected_tk, self.scale, copied=copied)
        return self.kv_up.values(out_thc)

    def _attend_expanded(self, batch: DsaBatch, q_thd: torch.Tensor, latent_cache: torch.Tensor) -> torch.Tensor:
        """To all visible keys: prefills to keys and values of every head, decodes to the latents."""
        values_thv = q_thd.new_empty(*q_thd.shape[:2], self.kv_up.value_dim)
        if batch.decodes is not None:
            rows = batch.decodes.tokens
            decodes = replace(batch, seq_t=aligned(batch.seq_t[rows]), visible_t=aligned(batch.visible_t[rows]))
            q_nope_thd, q_rope_thr = q_thd[rows].split([self.nope, self.rope], dim=-1)
            q_latent_thc = self.kv_up.absorb(q_nope_thd)
            values_thv[rows] = self._attend_latents(decodes, q_latent_thc, q_rope_thr, latent_cache, None)
        for chunk in batch.prefill_chunks:
            rows = chunk.tokens
            rows_sc = kernels.gather_latents(
                latent_cache, chunk.block_table_bp, chunk.cu_seqlens_b1, chunk.total_keys, dtype=q_thd.dtype
            )
            k_shd, v_shv = self.kv_up.expand(rows_sc)
            kernels.masked_mha(q_thd[rows], k_shd, v_shv, chunk.start_t, chunk.end_t, self.scale, out=values_thv[rows])
        return values_thv

    def _projected(self, hidden_th: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """q_a [T, L], index key [T, D] of a layer that selects, latent | rope key [T, C + R]; none normalised yet."""
        q_a_tl, *index_k, kv_tr = getattr(self, self.a_proj_name)(hidden_th)[0].split(self.a_widths, dim=-1)
        return q_a_tl, index_k[0] if index_k else None, kv_tr

    def _queries(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        """Queries [T, H, nope + R], whose rope part is not yet rotated."""
        return self.q_b_proj(q_a_tl)[0].unflatten(-1, (self.num_heads, self.nope + self.rope))

    def _write_caches(
        self,
        q_a_tl: torch.Tensor,
        index_k_td: torch.Tensor | None,
        kv_tr: torch.Tensor,
        positions_t: torch.Tensor,
        batch: DsaBatch,
        caches: LayerCaches,
    ) -> torch.Tensor:
        """Write this step's latents, rope keys and index keys; returns the normalised q_a [T, L]."""
        kv_a_tc, k_rope_tr = kv_tr.split([self.latent, self.rope], dim=-1)
        index: dict[str, Any] = {}
        if self.indexer is not None:
            index = {
                "index_k_weight_d": self.indexer.k_norm.weight,
                "index_k_bias_d": self.indexer.k_norm.bias,
                "index_eps": INDEX_NORM_EPS,
                "index_cache": caches.index_keys,
                "interleaved": self.indexer.interleaved,
                "rotate": self.indexer.quantised,
            }
        return kernels.norm_rope_cache(
            q_a_tl,
            kv_a_tc,
            k_rope_tr,
            index_k_td,
            positions_t,
            batch.slots_t,
            self.rope_table_pr,
            q_a_weight_l=self.q_a_layernorm.weight,
            kv_a_weight_c=self.kv_a_layernorm.weight,
            eps=self.eps,
            latent_cache=caches.latents,
            **index,
        )
