"""Block-fp8 weights as SGLang holds them on a GPU: every matrix and its scales arrive where they belong.

On a CPU the plugin multiplies the scales in, so that no other test here meets SGLang's own fp8 layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang")

from checkpoints import Build
from oracle import dequantized_weights
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import fp8

from dsv32_plugin.block_fp8 import dequantise
from dsv32_plugin.sglang_adapter import cpu
from dsv32_plugin.tiny import BLOCK, TinySpec
from dsv32_plugin.weights import PACKED_MODULES

pytestmark = pytest.mark.engine


def test_every_matrix_is_loaded(
    build: Build, checkpoint: Callable[[TinySpec], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of three joined matrices ends within a scale block, which SGLang's own merged layer refuses."""
    model_path = checkpoint(TinySpec(fp8=True))
    monkeypatch.setattr(cpu.DsaCpuPlatform, "get_quantization_config", lambda self, quantization: None)
    for method in (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod):
        # Repacks for the CPU, or the GPU, what has been loaded.
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)
    model = build(model_path, dtype="bfloat16")
    assert isinstance(model.quant_config, fp8.Fp8Config)
    truth, found = dequantized_weights(model_path), {}
    for name, module in model.named_modules():
        if isinstance(module, FusedMoE):
            for expert in range(len(module.w13_weight)):
                gate_up = dequantise(module.w13_weight[expert], module.w13_weight_scale_inv[expert], BLOCK)
                at = f"{name}.{expert}"
                found[f"{at}.gate_proj"], found[f"{at}.up_proj"] = gate_up.chunk(2)
                found[f"{at}.down_proj"] = dequantise(
                    module.w2_weight[expert], module.w2_weight_scale_inv[expert], BLOCK
                )
        elif hasattr(module, "weight_scale_inv"):
            parent, _, leaf = name.rpartition(".")
            whole = dequantise(module.weight, module.weight_scale_inv, BLOCK)
            parts = [f"{parent}.{part}" for part in PACKED_MODULES.get(leaf, [leaf])]
            heights = [len(truth[f"{part}.weight"]) for part in parts]
            found |= zip(parts, whole.split(heights), strict=True)
    for name, weight in found.items():
        assert torch.equal(weight, truth[f"{name}.weight"]), name
    # What is left of two dimensions is not quantised, or cut in two while it is loaded.
    left = {name.removesuffix(".weight") for name, weight in truth.items() if weight.dim() == 2} - set(found)
    plain = {"embed_tokens", "lm_head", "gate", "weights_proj", "kv_b_proj"}
    assert {name.rpartition(".")[2] for name in left} == plain
