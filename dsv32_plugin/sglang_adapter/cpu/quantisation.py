"""Quantised checkpoints on a device without products of their formats: dequantised while loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsv32_plugin.sglang_adapter.upstream import QuantizationConfig, QuantizeMethodBase


class DequantisedConfig(QuantizationConfig):
    """Stands in for any format on a CPU and keeps the layers unquantised, so that `core.weights` dequantises them."""

    @classmethod
    def get_name(cls) -> str:
        return "dsv32_dequantised"

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

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from dsv32_plugin.sglang_adapter.upstream import LinearBase, UnquantizedLinearMethod

        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
