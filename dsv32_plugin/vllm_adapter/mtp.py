"""Multi-token prediction for vLLM: the draft model that V3.2 and GLM-5 checkpoints bring with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from dsv32_plugin.core.attention import Shared
from dsv32_plugin.core.checkpoint import PACKED_MODULES
from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.decoder import DraftInput
from dsv32_plugin.vllm_adapter import guard, weights
from dsv32_plugin.vllm_adapter.layers import VllmLayers
from dsv32_plugin.vllm_adapter.model import DsaDecoderLayer, shared_parts
from dsv32_plugin.vllm_adapter.upstream import LogitsProcessor, RMSNorm, VllmConfig, get_pp_group, maybe_prefix


class OfTarget(nn.Module):
    """Stands for a module of the target model, which vLLM puts in its place after loading."""

    weight = None


class SharedHead(nn.Module):
    """The norm before the logits; the matrix is the target's."""

    def __init__(self, config: DsaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head: nn.Module = OfTarget()


class MtpLayer(DsaDecoderLayer, DraftInput):
    """A decoder layer over the next token's embedding and this one's hidden state."""

    def __init__(self, config: DsaConfig, vllm_config: VllmConfig, shared: Shared, prefix: str) -> None:
        super().__init__(config, vllm_config, shared, prefix)
        self.add_draft_input(config, VllmLayers(vllm_config), prefix)
        self.shared_head = SharedHead(config)

    def predict(
        self,
        positions_t: torch.Tensor,
        embedded_th: torch.Tensor,
        hidden_th: torch.Tensor,
        slots_tk: torch.Tensor,
    ) -> torch.Tensor:
        # The first token of a sequence has no token before it that could have predicted it.
        embedded_th = torch.where(positions_t.unsqueeze(1) == 0, 0, embedded_th)
        hidden_th, residual_th = self(positions_t, self.draft_input(embedded_th, hidden_th), None, slots_tk)
        return hidden_th + residual_th


class MtpModel(nn.Module):
    """The layers behind the target's last, by their numbers in the checkpoint."""

    def __init__(self, config: DsaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        device = vllm_config.device_config.device
        shared = shared_parts(config, vllm_config)
        self.register_buffer("rope_table_pr", shared.rope_table_pr, persistent=False)
        # vLLM replaces this by the target's buffer of the same name.
        self.topk_indices_buffer = torch.empty(0, config.index_topk, dtype=torch.int32, device=device)
        self.embed_tokens: nn.Module = OfTarget()
        self.first = config.num_layers
        self.layers = nn.ModuleDict(
            {
                str(layer): MtpLayer(config, vllm_config, shared, f"{prefix}.layers.{layer}")
                for layer in range(self.first, self.first + config.num_nextn_predict_layers)
            }
        )

    def layer(self, step: int) -> MtpLayer:
        layer = self.layers[str(self.first + step % len(self.layers))]
        assert isinstance(layer, MtpLayer)
        return layer


class DsaMtp(nn.Module):
    """The class that vLLM runs for `--speculative-config '{"method": "mtp", ...}'` with our target model."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = PACKED_MODULES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        self.config = guard.read_config(vllm_config.speculative_config.target_model_config)
        if self.config.num_nextn_predict_layers == 0:
            raise ConfigError(
                "num_nextn_predict_layers", "at least 1 for method mtp", 0, "leave --speculative-config out"
            )
        if get_pp_group().world_size > 1:
            raise NotImplementedError(
                "--speculative-config: method mtp needs --pipeline-parallel-size 1; use tensor parallelism instead"
            )
        self.quant_config = vllm_config.quant_config
        self.model = MtpModel(self.config, vllm_config, maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.loader = weights.Loader(self, self.config, vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states for the logits, and, normalised as the target's are, for the next draft step."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        layer = self.model.layer(spec_step_idx)
        hidden_th = layer.predict(positions, inputs_embeds, hidden_states, self.model.topk_indices_buffer)
        return hidden_th, layer.shared_head.norm(hidden_th)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        head = self.model.layer(spec_step_idx).shared_head
        return self.logits_processor(head.head, head.norm(hidden_states))

    def load_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return self.loader.load(self, weights_iterator)
