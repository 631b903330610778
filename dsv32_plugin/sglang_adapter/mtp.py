"""Multi-token prediction for SGLang: the draft model that V3.2 and GLM-5 checkpoints bring with them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig

from dsv32_plugin.core.attention import Shared
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.decoder import DraftInput
from dsv32_plugin.sglang_adapter import arguments, guard, weights
from dsv32_plugin.sglang_adapter.layers import SglangLayers
from dsv32_plugin.sglang_adapter.model import DsaDecoderLayer, shared_parts
from dsv32_plugin.sglang_adapter.upstream import (
    ForwardBatch,
    LogitsProcessor,
    LogitsProcessorOutput,
    QuantizationConfig,
)

logger = logging.getLogger(__name__)


class SharedHead(nn.Module):
    """The norm before the logits; the matrix is the target's."""

    def __init__(self, config: DsaConfig) -> None:
        super().__init__()
        self.norm = SglangLayers(None).norm(config.hidden_size, config.rms_norm_eps)


class MtpLayer(DsaDecoderLayer, DraftInput):
    """A decoder layer over the next token's embedding and this one's hidden state."""

    def __init__(
        self,
        config: DsaConfig,
        quant_config: QuantizationConfig | None,
        layer: int,
        shared: Shared,
        prefix: str,
    ) -> None:
        super().__init__(config, quant_config, layer, shared, prefix)
        self.add_draft_input(config, SglangLayers(quant_config), prefix)
        self.shared_head = SharedHead(config)
        self.topk = config.index_topk

    def predict(
        self, positions_t: torch.Tensor, embedded_th: torch.Tensor, hidden_th: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """Hidden states, normalised as the target's are: for the logits and for the next draft step."""
        slots_tk = hidden_th.new_empty(hidden_th.shape[0], self.topk, dtype=torch.int32)
        in_th = self.draft_input(embedded_th, hidden_th) if len(embedded_th) else embedded_th
        hidden_th, residual_th = self(positions_t, in_th, None, slots_tk, batch)
        return self.shared_head.norm(hidden_th, residual_th)[0] if len(hidden_th) else hidden_th


class MtpModel(nn.Module):
    """The layer behind the target's last, by its number in the checkpoint."""

    def __init__(self, config: DsaConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        number = config.num_layers
        self.layers = nn.ModuleDict(
            {str(number): MtpLayer(config, quant_config, number, shared_parts(config), f"{prefix}.layers.{number}")}
        )


class DsaMtp(nn.Module):
    """The class that SGLang runs as the draft of our target model with `--speculative-algorithm EAGLE`."""

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.dsa_config = guard.read_config(arguments.of_process())
        self.config = config
        self.quant_config = quant_config
        # By these the pool of the draft model holds one layer, and knows it by its number.
        self.start_layer = self.dsa_config.num_layers
        self.end_layer = self.start_layer + 1
        self.model = MtpModel(self.dsa_config, quant_config, f"{prefix}.model" if prefix else "model")
        self.logits_processor = LogitsProcessor(config)
        self.loader = weights.loader(self, self.dsa_config)
        self.of_target: tuple[nn.Module, nn.Module] | None = None
        """The target's embedding and head. In a tuple, so that they do not become modules of this model, too."""
        logger.info("dsv32: drafting with layer %d of %s", self.start_layer, self.dsa_config.architecture)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        assert self.of_target is not None, "SGLang calls set_embed_and_head before the first step"
        embed_tokens, lm_head = self.of_target
        embedded_th = embed_tokens(input_ids) if input_embeds is None else input_embeds
        layer = self.model.layers[str(self.start_layer)]
        assert isinstance(layer, MtpLayer)
        hidden_th = layer.predict(positions, embedded_th, forward_batch.spec_info.hidden_states, forward_batch)
        return self.logits_processor(input_ids, hidden_th, lm_head, forward_batch)

    def set_embed_and_head(self, embed_tokens: nn.Module, lm_head: nn.Module) -> None:
        self.of_target = (embed_tokens, lm_head)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loader.load(tensors, whole=self.training)
