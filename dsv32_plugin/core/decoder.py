"""A decoder layer, its dense feed-forward block and what drafts need, on whatever layers an engine has."""

from __future__ import annotations

import torch
from torch import nn

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.layers import Layers


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), cut over the tensor parallel ranks."""

    def __init__(self, hidden_size: int, width: int, layers: Layers, prefix: str, *, reduce: bool = True) -> None:
        super().__init__()
        self.gate_up_proj = layers.gate_up(hidden_size, width, f"{prefix}.gate_up_proj")
        self.down_proj = layers.row(width, hidden_size, f"{prefix}.down_proj", reduce=reduce)
        self.act = layers.silu_and_mul()

    def forward(self, x_th: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x_th)[0]))[0]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(.)), with the residual carried apart."""

    def __init__(self, config: DsaConfig, layers: Layers, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = layers.norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = layers.norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        positions_t: torch.Tensor,
        hidden_th: torch.Tensor,
        residual_th: torch.Tensor | None,
        slots_tk: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_th, residual_th = self.attend(positions_t, hidden_th, residual_th, slots_tk)
        return self.mlp(hidden_th), residual_th

    def attend(
        self,
        positions_t: torch.Tensor,
        hidden_th: torch.Tensor,
        residual_th: torch.Tensor | None,
        slots_tk: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into the feed-forward block, normalised, and the residual."""
        if residual_th is None:
            residual_th = hidden_th
            hidden_th = self.input_layernorm(hidden_th)
        else:
            hidden_th, residual_th = self.input_layernorm(hidden_th, residual_th)
        hidden_th = self.self_attn(positions_t, hidden_th, slots_tk)
        hidden_th, residual_th = self.post_attention_layernorm(hidden_th, residual_th)
        return hidden_th, residual_th


class DraftInput:
    """For a multi-token prediction layer: where its input comes from (DeepSeek-V3, equation 21)."""

    enorm: nn.Module
    hnorm: nn.Module
    eh_proj: nn.Module

    def add_draft_input(self, config: DsaConfig, layers: Layers, prefix: str) -> None:
        size = config.hidden_size
        self.enorm, self.hnorm = (layers.norm(size, config.rms_norm_eps) for _ in range(2))
        # In bfloat16 also where the checkpoint is block-fp8.
        self.eh_proj = layers.replicated(2 * size, size, f"{prefix}.eh_proj", quantised=False)

    def draft_input(self, embedded_th: torch.Tensor, hidden_th: torch.Tensor) -> torch.Tensor:
        """eh_proj([norm(next token's embedding) | norm(this one's hidden state)])"""
        return self.eh_proj(torch.cat([self.enorm(embedded_th), self.hnorm(hidden_th)], dim=-1))[0]
