"""A checkpoint's tensors into a model of SGLang's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from dsv32_plugin import weights
from dsv32_plugin.latent_up import LatentUpProjection
from dsv32_plugin.sglang_adapter.layers import PackedLinear
from dsv32_plugin.sglang_adapter.quantisation import DequantisedFp8Config


def load(model: Any, tensors: Iterable[tuple[str, torch.Tensor]], belongs_elsewhere: Callable[[str], bool]) -> None:
    """Load what `model`, which has `dsa_config` and `quant_config`, expects; see `dsv32_plugin.weights.load`."""
    weights.load(
        model.dsa_config,
        tensors,
        dict(_targets(model, model.dsa_config.n_routed_experts)),
        belongs_elsewhere,
        dequantise_all=isinstance(model.quant_config, DequantisedFp8Config),
    )


def _targets(model: nn.Module, num_experts: int) -> Iterator[tuple[str, weights.Load]]:
    for prefix, module in model.named_modules():
        parts = weights.PACKED_MODULES.get(prefix.rpartition(".")[2], ())
        if isinstance(module, LatentUpProjection):
            yield f"{prefix.removesuffix('.kv_up')}.kv_b_proj.weight", module.load_kv_b_proj
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
