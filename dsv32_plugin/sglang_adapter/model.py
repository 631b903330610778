"""DeepSeek-V3.2 and GLM-5 for SGLang: our own model on SGLang's building blocks."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from transformers import PretrainedConfig

from dsv32_plugin import __version__
from dsv32_plugin.core.attention import DsaAttention, Shared
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.decoder import DecoderLayer, Mlp
from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.rope import rope_table
from dsv32_plugin.kernels.runtime import dispatch
from dsv32_plugin.sglang_adapter import arguments, exchange, guard, rollout, weights
from dsv32_plugin.sglang_adapter.caches import announce_index_keys
from dsv32_plugin.sglang_adapter.layers import AttentionLayers, SglangLayers, WholeLayers
from dsv32_plugin.sglang_adapter.moe import Moe
from dsv32_plugin.sglang_adapter.names import DRAFT_ARCHITECTURES, DRAFT_MODEL_PATH
from dsv32_plugin.sglang_adapter.steps import SglangSteps
from dsv32_plugin.sglang_adapter.upstream import (
    ForwardBatch,
    LogitsProcessor,
    LogitsProcessorOutput,
    ModelRegistry,
    ParallelLMHead,
    PPProxyTensors,
    QuantizationConfig,
    VocabParallelEmbedding,
    get_embedding_tp_kwargs,
    get_parallel,
    get_pp_indices,
)

logger = logging.getLogger(__name__)


class DsaDecoderLayer(DecoderLayer):
    """Layer `layer` of the checkpoint."""

    def __init__(
        self,
        config: DsaConfig,
        quant_config: QuantizationConfig | None,
        layer: int,
        shared: Shared,
        prefix: str,
    ) -> None:
        attention = DsaAttention(config, AttentionLayers(quant_config), layer, shared, f"{prefix}.self_attn")
        layers = (WholeLayers if exchange.is_whole() else SglangLayers)(quant_config)
        mlp: nn.Module
        if config.is_moe(layer):
            mlp = Moe(config, quant_config, layer, f"{prefix}.mlp")
        else:
            mlp = Mlp(config.hidden_size, config.intermediate_size, layers, f"{prefix}.mlp", reduce=False)
        super().__init__(config, layers, attention, mlp)
        self.exchange = exchange.of_layer(config.is_moe(layer))

    def forward(  # type: ignore[override]
        self,
        positions_t: torch.Tensor,
        hidden_th: torch.Tensor,
        residual_th: torch.Tensor | None,
        slots_tk: torch.Tensor,
        batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank that has nothing to do takes part in the feed-forward blocks of the others, with zeros if at all."""
        if batch.forward_mode.is_idle():
            hidden_th = residual_th = torch.zeros_like(hidden_th)
        else:
            hidden_th, residual_th = self.attend(positions_t, hidden_th, residual_th, slots_tk)
        return self.exchange(self.mlp, hidden_th, batch), residual_th


def shared_parts(config: DsaConfig) -> Shared:
    """Of the layers of one model; its table is for every position that the server can reach."""
    options = arguments.of_process()
    max_positions = arguments.longest_sequence(options)
    policy = Policy.from_settings(records=rollout.returns_selections(options))
    return Shared(
        rope_table(config.qk_rope_head_dim, max_positions, None, config.rope).to(torch.get_default_device()),
        Planner(config.index_topk, config.num_heads // AttentionLayers(None).tp_size, policy),
        SglangSteps(config),
    )


class DsaModel(nn.Module):
    """Embedding, this pipeline stage's layers, final norm."""

    def __init__(self, config: DsaConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        shared = shared_parts(config)
        self.register_buffer("rope_table_pr", shared.rope_table_pr, persistent=False)
        self.topk = config.index_topk
        self.stage = get_parallel().pp_group
        self.embed_tokens: nn.Module = nn.Identity()
        if self.stage.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=f"{prefix}.embed_tokens",
                **get_embedding_tp_kwargs(),
            )
        place = self.stage.rank_in_group, self.stage.world_size
        self.start_layer, self.end_layer = get_pp_indices(config.num_layers, *place)
        self.layers = nn.ModuleList(
            DsaDecoderLayer(config, quant_config, layer, shared, f"{prefix}.layers.{layer}")
            if self.start_layer <= layer < self.end_layer
            else nn.Identity()
            for layer in range(config.num_layers)
        )
        self.norm: nn.Module = nn.Identity()
        if self.stage.is_last_rank:
            self.norm = SglangLayers(quant_config).norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: ForwardBatch,
        input_embeds: torch.Tensor | None,
        handed: PPProxyTensors | None,
    ) -> torch.Tensor | PPProxyTensors:
        residual_th: torch.Tensor | None = None
        if self.stage.is_first_rank:
            hidden_th = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        else:
            assert handed is not None, "a later pipeline stage is handed the earlier one's tensors"
            hidden_th, residual_th = handed["hidden_states"], handed["residual"]
        # Written by the layers that select and read by those that share.
        slots_tk = hidden_th.new_empty(hidden_th.shape[0], self.topk, dtype=torch.int32)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_th, residual_th = layer(positions, hidden_th, residual_th, slots_tk, batch)
        if not self.stage.is_last_rank:
            return PPProxyTensors({"hidden_states": hidden_th, "residual": residual_th})
        return self.norm(hidden_th, residual_th)[0] if len(hidden_th) else hidden_th


class DsaForCausalLM(nn.Module):
    """The class that SGLang runs for `DeepseekV32ForCausalLM` and `GlmMoeDsaForCausalLM` checkpoints."""

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        options = arguments.of_process()
        guard.check_options(options)
        guard.check_hooks()
        dsa_config = guard.read_config(options)
        guard.check_sizes(dsa_config, options)
        announce_index_keys(torch.get_default_dtype())
        if options.speculative_algorithm is not None:
            guard.check_draft_layer(dsa_config)
            # SGLang has one name for the draft models of all DeepSeeks. The one that this process loads next is ours.
            ModelRegistry.models.update(dict.fromkeys(DRAFT_ARCHITECTURES, pkgutil.resolve_name(DRAFT_MODEL_PATH)))
        self.config = config
        self.dsa_config = dsa_config
        self.quant_config = quant_config
        prefix = f"{prefix}." if prefix else ""
        self.model = DsaModel(dsa_config, quant_config, f"{prefix}model")
        # By these the pool holds this stage's layers.
        self.start_layer, self.end_layer = self.model.start_layer, self.model.end_layer
        self.lm_head: nn.Module = nn.Identity()
        if self.model.stage.is_last_rank:
            self.lm_head = ParallelLMHead(
                dsa_config.vocab_size,
                dsa_config.hidden_size,
                quant_config=quant_config,
                prefix=f"{prefix}lm_head",
                use_attn_tp_group=options.enable_dp_lm_head,
            )
        self.logits_processor = LogitsProcessor(config)
        self.loader = weights.loader(self, dsa_config)
        choices = dispatch.choices(torch.get_default_device())
        kernels = ", ".join(f"{operation}={choice.name}" for operation, choice in choices.items())
        logger.info(
            "dsv32: serving %s with dsv32-plugin %s; kernels: %s", dsa_config.architecture, __version__, kernels
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> LogitsProcessorOutput | PPProxyTensors:
        hidden_th = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        if not self.model.stage.is_last_rank:
            return hidden_th
        return self.logits_processor(input_ids, hidden_th, self.lm_head, forward_batch)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_embed_and_head(self) -> tuple[nn.Module, nn.Module]:
        """What the draft model shares; SGLang hands it to `set_embed_and_head` of the draft, which is ours, too."""
        return self.model.embed_tokens, self.lm_head

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        # SGLang calls `eval` on a model that it has started.
        self.loader.load(tensors, whole=self.training)
