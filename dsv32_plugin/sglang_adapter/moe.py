"""The mixture of experts, with its bias-corrected grouped router, on SGLang's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.decoder import Mlp
from dsv32_plugin.sglang_adapter import float32
from dsv32_plugin.sglang_adapter.layers import SglangLayers, WholeLayers
from dsv32_plugin.sglang_adapter.upstream import (
    QuantizationConfig,
    TopK,
    binds_experts,
    get_moe_a2a_backend,
    get_moe_impl_class,
)


class Router(nn.Module):
    """Scores of the experts, before the sigmoid."""

    def __init__(self, config: DsaConfig) -> None:
        super().__init__()
        dtype = torch.float32 if config.routes_in_float32 else None
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=dtype))
        self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts, dtype=torch.float32))
        self.requires_grad_(False)

    def forward(self, x_th: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x_th.to(self.weight.dtype), self.weight)


class Moe(nn.Module):
    """sum over the chosen experts of weight * expert(x), times `routed_scaling_factor`, plus the shared experts.

    Sigmoid scores; the correction bias takes part in the choice (best groups first, by the sum of their two best
    experts) and not in the weights (DeepSeek-V3 technical report, equations 12 to 16).

    Gives this rank's part of the sum over all ranks, or the whole where an all-to-all backend brings the tokens to
    their experts.
    """

    def __init__(self, config: DsaConfig, quant_config: QuantizationConfig | None, layer: int, prefix: str) -> None:
        super().__init__()
        self.scale = config.routed_scaling_factor
        self.num_experts = config.n_routed_experts
        self.gate = Router(config)
        self.topk = TopK(
            top_k=config.num_experts_per_tok,
            layer_id=layer,
            renormalize=config.norm_topk_prob,
            scoring_func=config.scoring_func,
            quant_config=quant_config,
            **_routing(config, self.gate.e_score_correction_bias),
        )
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=layer,
            quant_config=quant_config,
            # The kernels must leave their input to the shared experts.
            inplace=False,
            prefix=f"{prefix}.experts",
        )
        if binds_experts():
            backend, routing = self.experts.runner_backend, self.experts.routing_method_type
            self.topk.bind_runner_backend(backend, routing_method_type=routing)
        self.is_sum = get_moe_a2a_backend().is_none()
        self.shared_experts = Mlp(
            config.hidden_size,
            config.moe_intermediate_size * config.n_shared_experts,
            (SglangLayers if self.is_sum else WholeLayers)(quant_config),
            f"{prefix}.shared_experts",
            reduce=False,
        )

    def forward(self, x_th: torch.Tensor) -> torch.Tensor:
        if not len(x_th):
            # The other ranks' tokens may be for experts of this one.
            return x_th if self.is_sum else self.experts(x_th, self.topk.empty_topk_output(x_th.device))
        routed_th = self.experts(x_th, self.topk(x_th, self.gate(x_th)))
        return torch.add(self.shared_experts(x_th), routed_th, alpha=self.scale)


def _routing(config: DsaConfig, bias_e: torch.Tensor) -> dict[str, Any]:
    """How SGLang chooses experts: by its kernel, which approximates the sigmoid and always normalises, where it may."""
    if torch.get_default_dtype() == torch.float32 or not config.norm_topk_prob:
        return {"custom_routing_function": float32.routing(config, bias_e)}
    return {
        "use_grouped_topk": True,
        "num_expert_group": config.n_group,
        "topk_group": config.topk_group,
        "correction_bias": bias_e,
    }
