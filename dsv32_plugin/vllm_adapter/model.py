"""DeepSeek-V3.2 and GLM-5 for vLLM: our own model on vLLM's building blocks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn

from dsv32_plugin import __version__
from dsv32_plugin.core.attention import DsaAttention, Shared
from dsv32_plugin.core.checkpoint import PACKED_MODULES
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.decoder import DecoderLayer, Mlp
from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.rope import rope_table
from dsv32_plugin.kernels.runtime import dispatch
from dsv32_plugin.vllm_adapter import guard, hooks, updates, warmup, weights
from dsv32_plugin.vllm_adapter.layers import VllmLayers
from dsv32_plugin.vllm_adapter.moe import Moe
from dsv32_plugin.vllm_adapter.steps import VllmSteps
from dsv32_plugin.vllm_adapter.upstream import (
    IntermediateTensors,
    LogitsProcessor,
    ParallelLMHead,
    PPMissingLayer,
    RMSNorm,
    SupportsPP,
    VllmConfig,
    VocabParallelEmbedding,
    current_platform,
    extract_layer_index,
    get_forward_context,
    get_pp_group,
    get_tensor_model_parallel_world_size,
    init_logger,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

logger = init_logger("vllm.dsv32_plugin")


class DsaDecoderLayer(DecoderLayer):
    """Layer `prefix` of the checkpoint."""

    def __init__(self, config: DsaConfig, vllm_config: VllmConfig, shared: Shared, prefix: str) -> None:
        layers = VllmLayers(vllm_config)
        layer = extract_layer_index(prefix)
        attention = DsaAttention(config, layers, layer, shared, f"{prefix}.self_attn")
        assert isinstance(shared.source, VllmSteps)
        shared.source.add_layer(layer, f"{prefix}.self_attn")
        mlp: nn.Module
        if config.is_moe(layer):
            mlp = Moe(config, vllm_config, f"{prefix}.mlp")
        else:
            mlp = Mlp(config.hidden_size, config.intermediate_size, layers, f"{prefix}.mlp")
        super().__init__(config, layers, attention, mlp)


def shared_parts(config: DsaConfig, vllm_config: VllmConfig) -> Shared:
    """Of the layers of one model."""
    max_len, device = vllm_config.model_config.max_model_len, vllm_config.device_config.device
    return Shared(
        rope_table(config.qk_rope_head_dim, max_len, None, config.rope).to(device),
        Planner(config.index_topk, config.num_heads // get_tensor_model_parallel_world_size(), Policy.from_settings()),
        VllmSteps(config, vllm_config),
    )


class DsaModel(nn.Module):
    """Embedding, this pipeline stage's layers, final norm."""

    topk_indices_buffer: torch.Tensor

    def __init__(self, config: DsaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        device = vllm_config.device_config.device
        shared = shared_parts(config, vllm_config)
        self.register_buffer("rope_table_pr", shared.rope_table_pr, persistent=False)
        # Slots, written by the layers that select and read by those that share; one buffer, so that a captured graph
        # finds it. By this name vLLM gives it to the draft model, too.
        topk_indices_buffer = torch.empty(
            vllm_config.scheduler_config.max_num_batched_tokens, config.index_topk, dtype=torch.int32, device=device
        )
        self.register_buffer("topk_indices_buffer", topk_indices_buffer, persistent=False)

        stage = get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        if stage.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_layers,
            lambda prefix: DsaDecoderLayer(config, vllm_config, shared, prefix),
            prefix=f"{prefix}.layers",
        )
        self.vllm_config = vllm_config
        self.warm_up: warmup.WarmUp | None = None
        if current_platform.is_cpu():
            from dsv32_plugin.vllm_adapter.cpu import operators

            hooks.at("GPUModelRunner._bookkeeping_sync", operators.bookkeeping_around)
        else:
            # One layer that selects and, where there is one, a layer that shares a selection.
            attentions = [layer.self_attn for layer in islice(self.layers, self.start_layer, self.end_layer)]
            kinds = {attention.indexer is None: attention for attention in attentions}
            self.warm_up = warmup.WarmUp(list(kinds.values()), topk_indices_buffer, vllm_config)
        self.norm: nn.Module = PPMissingLayer()
        if stage.is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config
        self._empty_states: Any = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        residual_th: torch.Tensor | None
        if get_pp_group().is_first_rank:
            hidden_th = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual_th = None
        else:
            assert intermediate_tensors is not None, "a later pipeline stage is handed the earlier one's tensors"
            hidden_th = intermediate_tensors["hidden_states"]
            residual_th = intermediate_tensors["residual"]
            if self._is_handed_slots(self.start_layer):
                self.topk_indices_buffer[: len(hidden_th)] = intermediate_tensors["slots"]
        if self.warm_up is not None and get_forward_context().attn_metadata is None:
            self.warm_up.finish(hidden_th)
            self.warm_up = None
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_th, residual_th = layer(positions, hidden_th, residual_th, self.topk_indices_buffer)
        if not get_pp_group().is_last_rank:
            tensors = {"hidden_states": hidden_th, "residual": residual_th}
            if self._is_handed_slots(self.end_layer):
                tensors["slots"] = self.topk_indices_buffer[: len(hidden_th)]
            return IntermediateTensors(tensors)
        return self.norm(hidden_th, residual_th)[0]

    def _is_handed_slots(self, first: int) -> bool:
        """Whether the stage that begins with a layer needs the selection of an earlier one; slots are alike in all."""
        return first > 0 and not self.config.selects(first)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What this stage is handed, for vLLM's buffers."""
        found = self._empty_states(batch_size, dtype, device)
        if self._is_handed_slots(self.start_layer):
            shape = (batch_size, self.config.index_topk)
            found["slots"] = torch.zeros(shape, dtype=torch.int32, device=device)
        return found


class DsaForCausalLM(nn.Module, SupportsPP):
    """The class that vLLM runs for `DeepseekV32ForCausalLM` and `GlmMoeDsaForCausalLM` checkpoints."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = PACKED_MODULES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = guard.read_config(vllm_config.model_config)
        config.check(get_tensor_model_parallel_world_size())
        guard.check_options(vllm_config)
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = DsaModel(config, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.loader = weights.Loader(self, config, vllm_config)
        guard.check_backend()
        hooks.at("Worker.reload_weights", updates.reload_around)
        choices = dispatch.choices(vllm_config.device_config.device)
        logger.info_once(
            "dsv32: serving %s with dsv32-plugin %s on %s; kernels: %s",
            config.architecture,
            __version__,
            current_platform.get_device_name(),
            ", ".join(f"{operation}={choice.name}" for operation, choice in choices.items()),
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return self.loader.load(self, weights_iterator)
