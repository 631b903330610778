"""Block-fp8 checkpoints on a device without fp8 matrix products: dequantised while loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsv32_plugin.vllm_adapter.upstream import (
    QuantizationConfig,
    QuantizeMethodBase,
    current_platform,
    register_quantization_config,
)

METHOD = "dsv32_dequantised_fp8"


@register_quantization_config(METHOD)
class DequantisedFp8Config(QuantizationConfig):
    """Claims block-fp8 checkpoints on a CPU and keeps their layers unquantised; `weights` multiplies the scales in."""

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
    def from_config(cls, config: dict[str, Any]) -> DequantisedFp8Config:
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        block_fp8 = hf_quant_cfg.get("quant_method") == "fp8" and hf_quant_cfg.get("weight_block_size")
        return METHOD if block_fp8 and current_platform.is_cpu() else None

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
