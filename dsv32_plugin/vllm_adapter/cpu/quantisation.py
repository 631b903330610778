"""Quantised checkpoints on a device without products of their formats: dequantised while loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsv32_plugin.core import quantisation
from dsv32_plugin.core.config import ARCHITECTURES
from dsv32_plugin.vllm_adapter.upstream import (
    QuantizationConfig,
    QuantizeMethodBase,
    current_platform,
    register_quantization_config,
)

METHOD = "dsv32_dequantised"


@register_quantization_config(METHOD)
class DequantisedConfig(QuantizationConfig):
    """Claims our checkpoints on a CPU and keeps their layers unquantised, so that `core.weights` dequantises them."""

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DequantisedConfig:
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        ours = set(getattr(hf_config, "architectures", None) or ()) & set(ARCHITECTURES.values())
        return METHOD if ours and current_platform.is_cpu() and _is_read(hf_quant_cfg) else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # Imported late: this module is loaded in every process of the engine, most of which build no layer.
        from dsv32_plugin.vllm_adapter.upstream import (
            LinearBase,
            RoutedExperts,
            UnquantizedFusedMoEMethod,
            UnquantizedLinearMethod,
        )

        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return None


def _is_read(hf_quant_cfg: dict[str, Any]) -> bool:
    """Of one that is not, `guard` says why."""
    try:
        return quantisation.read(hf_quant_cfg) is not None
    except quantisation.Unsupported:
        return False
