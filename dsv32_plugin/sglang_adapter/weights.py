"""A checkpoint's tensors into a model of SGLang's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dsv32_plugin.core import weights
from dsv32_plugin.core.checkpoint import PACKED_MODULES
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.latent_up import LatentUpProjection
from dsv32_plugin.sglang_adapter.layers import PackedLinear
from dsv32_plugin.sglang_adapter.upstream import FusedMoE, MergedColumnParallelLinear, default_weight_loader


def loader(model: nn.Module, config: DsaConfig) -> weights.Loader:
    """Of a model of ours, once it is built."""
    return weights.Loader(config, _targets(model, config.n_routed_experts))


def _targets(model: nn.Module, num_experts: int) -> Iterator[tuple[str, weights.Target]]:
    for prefix, module in model.named_modules():
        parts = PACKED_MODULES.get(prefix.rpartition(".")[2], ())
        if isinstance(module, LatentUpProjection):
            yield from weights.latent_up_targets(prefix, module)
        elif isinstance(module, FusedMoE):
            yield from weights.expert_targets(prefix, module, num_experts)
        elif isinstance(module, PackedLinear):
            yield from weights.packed_targets(prefix, module, parts, module.load_part)
        elif isinstance(module, MergedColumnParallelLinear):
            yield from weights.packed_targets(prefix, module, parts, _load_merged)
        else:
            yield from weights.parameter_targets(prefix, module, default_weight_loader)


def _load_merged(parameter: Any, tensor: torch.Tensor, index: int) -> None:
    parameter.weight_loader(parameter, tensor, index)
