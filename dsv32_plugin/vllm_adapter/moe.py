"""The mixture of experts, with its bias-corrected grouped router, on vLLM's kernels."""

from __future__ import annotations

import torch
from torch import nn

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.decoder import Mlp
from dsv32_plugin.vllm_adapter.layers import VllmLayers
from dsv32_plugin.vllm_adapter.upstream import FusedMoE, GateLinear, VllmConfig, says_who_routes


class Moe(nn.Module):
    """sum over the chosen experts of weight * expert(x), times `routed_scaling_factor`, plus the shared experts.

    Sigmoid scores; the correction bias takes part in the choice (best groups first, by the sum of their two best
    experts) and not in the weights (DeepSeek-V3 technical report, equations 12 to 16).
    """

    def __init__(self, config: DsaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        router_dtype = torch.float32 if config.routes_in_float32 else None
        self.gate = GateLinear(
            config.hidden_size, config.n_routed_experts, out_dtype=router_dtype, prefix=f"{prefix}.gate"
        )
        self.gate.e_score_correction_bias = nn.Parameter(
            torch.empty(config.n_routed_experts, dtype=torch.float32), requires_grad=False
        )
        self.shared_experts = Mlp(
            config.hidden_size,
            config.moe_intermediate_size * config.n_shared_experts,
            VllmLayers(vllm_config),
            f"{prefix}.shared_experts",
            reduce=False,
        )
        self.experts = FusedMoE(
            shared_experts=self.shared_experts,
            gate=self.gate,
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=vllm_config.quant_config,
            use_grouped_topk=True,
            num_expert_group=config.n_group,
            topk_group=config.topk_group,
            prefix=f"{prefix}.experts",
            scoring_func=config.scoring_func,
            routed_scaling_factor=config.routed_scaling_factor,
            apply_routed_scale_to_output=True,
            e_score_correction_bias=self.gate.e_score_correction_bias,
            router_logits_dtype=self.gate.out_dtype,
        )

    def forward(self, x_th: torch.Tensor) -> torch.Tensor:
        routed = not says_who_routes() or self.experts.is_internal_router
        return self.experts(hidden_states=x_th, router_logits=x_th if routed else self.gate(x_th)[0])
