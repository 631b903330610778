"""Where each tensor of a checkpoint goes in our models for vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from dsv32_plugin import weights
from dsv32_plugin.latent_up import LatentUpProjection
from dsv32_plugin.vllm_adapter.quantisation import DequantisedFp8Config

if TYPE_CHECKING:
    from dsv32_plugin.vllm_adapter.model import DsaForCausalLM
    from dsv32_plugin.vllm_adapter.mtp import DsaMtp

    Model: TypeAlias = DsaForCausalLM | DsaMtp


def load(
    model: Model, tensors: Iterable[tuple[str, torch.Tensor]], belongs_elsewhere: Callable[[str], bool]
) -> set[str]:
    """`dsv32_plugin.weights.load` into a model of ours. Returns the names of all parameters."""
    weights.load(
        model.config,
        tensors,
        dict(_targets(model)),
        belongs_elsewhere,
        dequantise_all=isinstance(model.quant_config, DequantisedFp8Config),
    )
    return {name for name, _ in model.named_parameters()}


def _targets(model: Model) -> Iterator[tuple[str, weights.Load]]:
    """For every tensor that this rank expects, its name in the checkpoint and what to do with it."""
    for prefix, module in model.named_modules():
        if isinstance(module, LatentUpProjection):
            yield f"{prefix.removesuffix('.kv_up')}.kv_b_proj.weight", module.load_kv_b_proj
        elif isinstance(module, RoutedExperts):
            experts = prefix.removesuffix(".routed_experts")
            yield from weights.expert_targets(experts, module, module.global_num_experts)
        elif isinstance(module, MergedColumnParallelLinear):
            parts = weights.PACKED_MODULES[prefix.rpartition(".")[2]]
            yield from weights.packed_targets(prefix, module, parts, _load_part)
        else:
            yield from weights.parameter_targets(prefix, module, default_weight_loader)


def _load_part(parameter: Any, tensor: torch.Tensor, index: int) -> None:
    parameter.weight_loader(parameter, tensor, index)
