"""MLA with the lightning indexer, on whatever linear layers an engine has: one layer's projections around a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dsv32_plugin import kernels
from dsv32_plugin.core.checkpoint import alike
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.latent_up import LatentUpProjection
from dsv32_plugin.core.layers import Layers
from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.recorder import Recorder
from dsv32_plugin.core.rope import softmax_scale
from dsv32_plugin.core.step import LayerCaches, Step, StepSource
from dsv32_plugin.core.streams import SideStream

INDEX_NORM_EPS = 1e-6
"""LayerNorm of the index keys; not in config.json."""


@dataclass(frozen=True)
class Shared:
    """What the layers of one model have in common."""

    rope_table_pr: torch.Tensor
    planner: Planner
    source: StepSource


class Projections(Protocol):
    """The matrix products of a layer that are the engine's. Those of the hidden state come first, `output` last."""

    def index_weights(self, hidden_th: torch.Tensor) -> torch.Tensor:
        """Head weights [T, I] of the index queries."""

    def project(self, hidden_th: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """q_a [T, L], index key [T, D] of a layer that selects, latent | rope key [T, C + R]; none normalised yet."""

    def index_query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        """Index queries [T, I * D]."""

    def query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        """Queries [T, H * (nope + R)], whose rope parts are not yet rotated."""

    def output(self, values_tv: torch.Tensor) -> torch.Tensor:
        """[T, H * v] -> [T, hidden size]."""


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

    def query(
        self, q_tx: torch.Tensor, weights_ti: torch.Tensor, positions_t: torch.Tensor, rope_table_pr: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries [T, I, D] and their head weights [T, I], of what `wq_b` and `weights_proj` gave."""
        return kernels.index_query(
            q_tx.unflatten(-1, (self.heads, self.dim)),
            weights_ti,
            positions_t,
            rope_table_pr,
            interleaved=self.interleaved,
            rotate=self.quantised,
            quantize=self.quantised,
        )


class DsaAttention(nn.Module):
    """One layer's attention. A layer without an indexer attends to the slots that an earlier layer selected."""

    def __init__(self, config: DsaConfig, layers: Layers, layer: int, shared: Shared, prefix: str) -> None:
        super().__init__()
        self.layer, self.shared = layer, shared
        self.recorder: Recorder | None = None
        """Of a server that tells what was selected; only where the plan leaves slots (`Policy.keeps_slots`)."""
        self.num_heads = config.num_heads // layers.tp_size
        self.ranks = layers.ranks
        self.nope, self.rope, self.latent = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        self.eps, self.scale = config.rms_norm_eps, softmax_scale(config.qk_head_dim, config.rope)

        selects = config.selects(layer)
        # One product for all that is projected from the hidden state. The widths before the last are multiples of the
        # 128-wide scale blocks of fp8 checkpoints in every released model, the last need not be.
        self.a_widths = [config.q_lora_rank, *([config.index_head_dim] if selects else []), self.latent + self.rope]
        self.a_proj_name = "q_index_kv_a_proj" if selects else "q_kv_a_proj"
        a_prefix = f"{prefix}.{self.a_proj_name}"
        a_proj = layers.merged(config.hidden_size, self.a_widths, a_prefix, quantised=alike(config, a_prefix))
        self.add_module(self.a_proj_name, a_proj)
        self.indexer = Indexer(config, layers, f"{prefix}.indexer") if selects else None
        self.q_a_layernorm: Any = layers.norm(config.q_lora_rank, self.eps)
        self.kv_a_layernorm: Any = layers.norm(self.latent, self.eps)
        self.q_b_proj = layers.column(config.q_lora_rank, config.num_heads * config.qk_head_dim, f"{prefix}.q_b_proj")
        self.kv_up = LatentUpProjection(config, self.num_heads, layers.tp_rank)
        self.o_proj = layers.row(config.num_heads * config.v_head_dim, config.hidden_size, f"{prefix}.o_proj")

    def forward(self, positions_t: torch.Tensor, hidden_th: torch.Tensor, slots_tk: torch.Tensor) -> torch.Tensor:
        """Attend in the step that runs, and leave the selection in `slots_tk` for the layers that share it.

        Args:
            positions_t: [T], of the tokens of the step, and of padding behind them.
            hidden_th: likewise; what padding gives is 0.
            slots_tk: [T or more, K] int32.
        """
        current = self.shared.source.current(self.layer)
        if current is None:
            return self._without_caches(hidden_th)
        step, caches = current
        num_tokens, padded = step.slots_t.shape[0], hidden_th.shape[0]
        out_th = self.attend(step, positions_t[:num_tokens], hidden_th[:num_tokens], slots_tk[:num_tokens], caches)
        self.shared.source.done(self.layer)
        return out_th if num_tokens == padded else nn.functional.pad(out_th, (0, 0, 0, padded - num_tokens))

    def attend(
        self,
        step: Step,
        positions_t: torch.Tensor,
        hidden_th: torch.Tensor,
        slots_tk: torch.Tensor,
        caches: LayerCaches,
        projections: Projections | None = None,
    ) -> torch.Tensor:
        """Project, attend as planned, and project back; `projections` stand in for the layer's own."""
        products, shared = projections or self, self.shared
        plan = shared.planner.plan(step, caches.latents.dtype, hidden_th.dtype)
        indexer = self.indexer if plan.selects else None
        # In steps of decodes alone many launches leave most of a GPU idle: there some run at once.
        aside = SideStream(hidden_th.device, enabled=indexer is not None and not step.prefill_chunks)
        if indexer is not None:
            with aside.work():
                weights_ti = products.index_weights(hidden_th)
        q_a_tl = self._write_caches(*products.project(hidden_th), positions_t, step, caches)
        if indexer is not None:
            assert caches.index_keys is not None, "a layer that selects has index keys"
            aside.join()
            query = indexer.query(products.index_query(q_a_tl), weights_ti, positions_t, shared.rope_table_pr)
            with aside.work():
                plan.select(*query, caches.index_keys, slots_tk, self.ranks)
                if self.recorder is not None:
                    self.recorder.record(self.layer, slots_tk)
        q_thd = self._heads(products.query(q_a_tl))
        q_rope_thr = q_thd[..., self.nope :]
        kernels.rope_query(q_rope_thr, positions_t, shared.rope_table_pr, out=q_rope_thr)
        values_thv = plan.values(self.kv_up, q_thd, caches.latents, slots_tk, self.scale, aside.join)
        return products.output(values_thv.flatten(1))

    def _without_caches(self, hidden_th: torch.Tensor) -> torch.Tensor:
        """Every product and nothing attended to: so an engine may run its model before there are caches."""
        q_nope_thd = self._heads(self.query(self.project(hidden_th)[0]))[..., : self.nope]
        return self.output(self.kv_up.values(self.kv_up.absorb(q_nope_thd)).flatten(1))

    def index_weights(self, hidden_th: torch.Tensor) -> torch.Tensor:
        assert self.indexer is not None
        return self.indexer.weights_proj(hidden_th)[0]

    def project(self, hidden_th: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        return self.split(getattr(self, self.a_proj_name)(hidden_th)[0])

    def index_query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        assert self.indexer is not None
        return self.indexer.wq_b(q_a_tl)[0]

    def query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        return self.q_b_proj(q_a_tl)[0]

    def output(self, values_tv: torch.Tensor) -> torch.Tensor:
        return self.o_proj(values_tv)[0]

    def split(self, projected_tx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What is projected from the hidden state as one, in its parts."""
        q_a_tl, *index_k, kv_tr = projected_tx.split(self.a_widths, dim=-1)
        return q_a_tl, index_k[0] if index_k else None, kv_tr

    def _heads(self, q_tx: torch.Tensor) -> torch.Tensor:
        return q_tx.unflatten(-1, (self.num_heads, self.nope + self.rope))

    def _write_caches(
        self,
        q_a_tl: torch.Tensor,
        index_k_td: torch.Tensor | None,
        kv_tr: torch.Tensor,
        positions_t: torch.Tensor,
        step: Step,
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
            step.slots_t,
            self.shared.rope_table_pr,
            q_a_weight_l=self.q_a_layernorm.weight,
            kv_a_weight_c=self.kv_a_layernorm.weight,
            eps=self.eps,
            latent_cache=caches.latents,
            **index,
        )
