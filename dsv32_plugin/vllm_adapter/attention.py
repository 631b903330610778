"""MLA with the lightning indexer: the projections of one layer around the operations of `dsv32_plugin.dsa`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from dsv32_plugin import dsa, kernels
from dsv32_plugin.batch import DsaBatch
from dsv32_plugin.config import DsaConfig
from dsv32_plugin.rope import softmax_scale
from dsv32_plugin.vllm_adapter.caches import index_key_cache, latent_cache
from dsv32_plugin.vllm_adapter.latent_up import LatentUpProjection

INDEX_NORM_EPS = 1e-6
"""LayerNorm of the index keys; not in config.json."""


class Indexer(nn.Module):
    """The weights that score keys (paper, equation 1) and the cache of index keys. The same on every rank.

    `wk` is computed together with the other projections of the hidden state, in `DsaAttention`.
    """

    def __init__(self, config: DsaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.interleaved = config.index_rope_interleave
        # Keys in float32 models stay exact, which makes them equal to Hugging Face; all others are quantised.
        self.quantised = dtype != torch.float32
        quant = vllm_config.quant_config
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank, self.heads * self.dim, bias=False, quant_config=quant, prefix=f"{prefix}.wq_b"
        )
        self.weights_proj = ReplicatedLinear(
            config.hidden_size, self.heads, bias=False, quant_config=None, prefix=f"{prefix}.weights_proj"
        )
        self.k_norm = nn.LayerNorm(self.dim, eps=INDEX_NORM_EPS)
        self.k_cache = index_key_cache(f"{prefix}.k_cache", self.dim, dtype, self.quantised)

    def query(
        self, hidden_th: torch.Tensor, q_a_tl: torch.Tensor, positions_t: torch.Tensor, rope_table_pr: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries [T, I, D] and their head weights [T, I]."""
        q_tid = self.wq_b(q_a_tl)[0].unflatten(-1, (self.heads, self.dim))
        return kernels.index_query(
            q_tid,
            self.weights_proj(hidden_th)[0],
            positions_t,
            rope_table_pr,
            interleaved=self.interleaved,
            rotate=self.quantised,
            quantize=self.quantised,
        )


class DsaAttention(nn.Module):
    """One layer's attention. A layer without an indexer attends to the slots that an earlier layer selected."""

    def __init__(
        self, config: DsaConfig, vllm_config: VllmConfig, layer: int, rope_table_pr: torch.Tensor, prefix: str
    ) -> None:
        super().__init__()
        quant = vllm_config.quant_config
        group = get_tp_group()
        self.num_heads = config.num_heads // group.world_size
        self.ranks = None
        if group.world_size > 1:
            self.ranks = dsa.Ranks(group.rank_in_group, group.world_size, partial(group.all_gather, dim=0))
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.topk = config.kv_lora_rank, config.index_topk
        self.eps, self.scale = config.rms_norm_eps, softmax_scale(config.qk_head_dim, config.rope)
        self.rope_table_pr = rope_table_pr

        selects = config.selects(layer)
        # One product for all that is projected from the hidden state. The widths before the last are multiples of the
        # 128-wide scale blocks of fp8 checkpoints in every released model, the last need not be.
        self.a_widths = [config.q_lora_rank, *([config.index_head_dim] if selects else []), self.latent + self.rope]
        name = "q_index_kv_a_proj" if selects else "q_kv_a_proj"
        self.a_proj_name = name
        self.add_module(
            name,
            MergedColumnParallelLinear(
                config.hidden_size,
                self.a_widths,
                bias=False,
                quant_config=quant,
                prefix=f"{prefix}.{name}",
                disable_tp=True,
            ),
        )
        self.indexer = Indexer(config, vllm_config, f"{prefix}.indexer") if selects else None
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=self.eps)
        self.kv_a_layernorm = RMSNorm(self.latent, eps=self.eps)
        self.q_b_proj = ColumnParallelLinear(
            config.q_lora_rank,
            config.num_heads * config.qk_head_dim,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.q_b_proj",
        )
        self.kv_up = LatentUpProjection(config, self.num_heads)
        self.o_proj = RowParallelLinear(
            config.num_heads * config.v_head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.latents = latent_cache(
            f"{prefix}.attn", self.latent, self.rope, vllm_config.cache_config, torch.get_default_dtype()
        )

    def forward(self, positions_t: torch.Tensor, hidden_th: torch.Tensor, slots_tk: torch.Tensor) -> torch.Tensor:
        """Attend, and leave this layer's selection in `slots_tk` [max tokens, K] for the layers that share it."""
        batch = self._batch()
        if batch is None:
            # A run without caches, to measure memory: `warmup` runs the attention itself, once for all layers.
            q_nope_thd, _ = self._queries(self._projected(hidden_th)[0])
            return self._output(self.kv_up.values(self.kv_up.absorb(q_nope_thd)))
        num_tokens = batch.slots_t.shape[0]
        out_th = self.run(batch, positions_t[:num_tokens], hidden_th[:num_tokens], slots_tk[:num_tokens])
        if num_tokens == hidden_th.shape[0]:
            return out_th
        return torch.nn.functional.pad(out_th, (0, 0, 0, hidden_th.shape[0] - num_tokens))

    def run(
        self, batch: DsaBatch, positions_t: torch.Tensor, hidden_th: torch.Tensor, slots_tk: torch.Tensor
    ) -> torch.Tensor:
        """`forward` of exactly the tokens of `batch`."""
        q_a_tl = self._write_caches(*self._projected(hidden_th), positions_t, batch)
        selected_tk = slots_tk if dsa.needs_selection(batch, self.topk) else None
        if selected_tk is not None and self.indexer is not None:
            q_tid, weights_ti = self.indexer.query(hidden_th, q_a_tl, positions_t, self.rope_table_pr)
            dsa.select_slots(batch, q_tid, weights_ti, self.indexer.k_cache.kv_cache, selected_tk, self.ranks)
        q_nope_thd, q_rope_thr = self._queries(q_a_tl)
        q_rope_thr = kernels.rope_query(q_rope_thr, positions_t, self.rope_table_pr)
        if selected_tk is None and dsa.expands(batch, self.num_heads):
            return self._output(self._attend_expanded(batch, q_nope_thd, q_rope_thr))
        return self._output(self._attend_latents(batch, q_nope_thd, q_rope_thr, selected_tk))

    def _attend_latents(
        self, batch: DsaBatch, q_nope_thd: torch.Tensor, q_rope_thr: torch.Tensor, selected_tk: torch.Tensor | None
    ) -> torch.Tensor:
        q_latent_thc = self.kv_up.absorb(q_nope_thd)
        out_thc = dsa.attend(batch, q_latent_thc, q_rope_thr, self.latents.kv_cache, selected_tk, self.scale)
        return self.kv_up.values(out_thc)

    def _attend_expanded(self, batch: DsaBatch, q_nope_thd: torch.Tensor, q_rope_thr: torch.Tensor) -> torch.Tensor:
        """To all visible keys: prefills to keys and values of every head, decodes to the latents."""
        values_thv = q_nope_thd.new_empty(*q_nope_thd.shape[:2], self.kv_up.value_dim)
        if batch.decodes is not None:
            rows = batch.decodes.tokens
            decodes = replace(batch, seq_t=batch.seq_t[rows], visible_t=batch.visible_t[rows])
            values_thv[rows] = self._attend_latents(decodes, q_nope_thd[rows], q_rope_thr[rows], None)
        for chunk in batch.prefill_chunks:
            rows = chunk.tokens
            rows_sc = kernels.gather_latents(
                self.latents.kv_cache,
                chunk.block_table_bp,
                chunk.cu_seqlens_b1,
                chunk.total_keys,
                dtype=q_nope_thd.dtype,
            )
            k_shd, v_shv = self.kv_up.expand(rows_sc)
            q_thd = torch.cat([q_nope_thd[rows], q_rope_thr[rows]], dim=-1)
            kernels.masked_mha(q_thd, k_shd, v_shv, chunk.start_t, chunk.end_t, self.scale, out=values_thv[rows])
        return values_thv

    def _projected(self, hidden_th: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """q_a [T, L], index key [T, D] of a layer that selects, latent | rope key [T, C + R]; none normalised yet."""
        q_a_tl, *index_k, kv_tr = getattr(self, self.a_proj_name)(hidden_th)[0].split(self.a_widths, dim=-1)
        return q_a_tl, index_k[0] if index_k else None, kv_tr

    def _queries(self, q_a_tl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, H, nope], and their rope part [T, H, R], not yet rotated."""
        q_thd = self.q_b_proj(q_a_tl)[0].unflatten(-1, (self.num_heads, self.nope + self.rope))
        q_nope_thd, q_rope_thr = q_thd.split([self.nope, self.rope], dim=-1)
        return q_nope_thd, q_rope_thr

    def _output(self, values_thv: torch.Tensor) -> torch.Tensor:
        return self.o_proj(values_thv.flatten(1))[0]

    def _batch(self) -> DsaBatch | None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return None
        batch = metadata[self.latents.layer_name]
        if self.indexer is not None:
            index_pages = metadata[self.indexer.k_cache.layer_name]
            assert index_pages.data_ptr() == batch.block_table_bp.data_ptr(), "index keys must share the latents' pages"
        return batch

    def _write_caches(
        self,
        q_a_tl: torch.Tensor,
        index_k_td: torch.Tensor | None,
        kv_tr: torch.Tensor,
        positions_t: torch.Tensor,
        batch: DsaBatch,
    ) -> torch.Tensor:
        kv_a_tc, k_rope_tr = kv_tr.split([self.latent, self.rope], dim=-1)
        index: dict[str, Any] = {}
        if self.indexer is not None:
            index = {
                "index_k_weight_d": self.indexer.k_norm.weight,
                "index_k_bias_d": self.indexer.k_norm.bias,
                "index_eps": INDEX_NORM_EPS,
                "index_cache": self.indexer.k_cache.kv_cache,
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
            latent_cache=self.latents.kv_cache,
            **index,
        )
