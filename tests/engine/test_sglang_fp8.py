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
from test_updates import buckets, stored

from dsv32_plugin.core.block_fp8 import SCALE_SUFFIX, dequantise
from dsv32_plugin.core.checkpoint import PACKED_MODULES
from dsv32_plugin.sglang_adapter import upstream
from dsv32_plugin.sglang_adapter.cpu import platform
from dsv32_plugin.tools.tiny import BLOCK, TinySpec

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform.DsaCpuPlatform, "get_quantization_config", lambda self, quantization: None)
    for method in (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod):
        # Repacks for the CPU, or the GPU, what has been loaded.
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)


def matrices(model: torch.nn.Module, truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The numbers of every block-fp8 matrix of a model, under its name in the checkpoint, whose numbers are `truth`."""
    found = {}
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
    return found


def test_every_matrix_is_loaded(build: Build, checkpoint: Callable[[TinySpec], Path]) -> None:
    """The last of three joined matrices ends within a scale block, which SGLang's own merged layer refuses."""
    model_path = checkpoint(TinySpec(fp8=True))
    model = build(model_path, dtype="bfloat16")
    assert isinstance(model.quant_config, fp8.Fp8Config)
    truth = dequantized_weights(model_path)
    found = matrices(model, truth)
    for name, weight in found.items():
        assert torch.equal(weight, truth[f"{name}.weight"]), name
    # What is left of two dimensions is not quantised, or cut in two while it is loaded.
    left = {name.removesuffix(".weight") for name, weight in truth.items() if weight.dim() == 2} - set(found)
    plain = {"embed_tokens", "lm_head", "gate", "weights_proj", "kv_b_proj"}
    assert {name.rpartition(".")[2] for name in left} == plain


def as_bytes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().view(torch.uint8).clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("order", ["one-by-one", "scales-first", "scales-last"])
def test_an_update_may_part_matrices_and_scales(
    build: Build, checkpoint: Callable[[TinySpec], Path], order: str
) -> None:
    """`kv_b_proj` is dequantised while it is loaded, all others are not."""
    new = checkpoint(TinySpec(fp8=True, seed=1))
    expected = as_bytes(build(new, dtype="bfloat16"))
    model = build(checkpoint(TinySpec(fp8=True)), dtype="bfloat16")
    for bucket in buckets(stored(new), order):
        model.load_weights(bucket)
    found = as_bytes(model)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_floats_of_a_trainer_become_what_the_fp8_checkpoint_is(
    build: Build, checkpoint: Callable[[TinySpec], Path]
) -> None:
    """They were refused. A block whose greatest number was rounded down to a power of two may get half the scale: the
    numbers are the same, and all else is to the bit.
    """
    new = checkpoint(TinySpec(fp8=True, seed=1))
    expected = build(new, dtype="bfloat16")
    model, floats = build(checkpoint(TinySpec(fp8=True)), dtype="bfloat16"), dict(stored(new))
    for scale in [name for name in floats if name.endswith(SCALE_SUFFIX)]:
        name = scale.removesuffix(SCALE_SUFFIX)
        floats[name] = dequantise(floats[name], floats.pop(scale), BLOCK).to(torch.bfloat16)
    model.load_weights(list(floats.items()))
    truth = dequantized_weights(new)
    found, numbers = matrices(model, truth), matrices(expected, truth)
    assert [name for name in numbers if not torch.equal(found[name], numbers[name])] == []
    found, plain = as_bytes(model), as_bytes(expected)
    scales = {name for name in plain if name.endswith(SCALE_SUFFIX)}
    unquantised = plain.keys() - scales - {name.removesuffix(SCALE_SUFFIX) for name in scales}
    assert [name for name in unquantised if not torch.equal(found[name], plain[name])] == []


def test_the_router_knows_what_its_experts_run_on(build: Build, checkpoint: Callable[[TinySpec], Path]) -> None:
    """Without it SGLang ends the first step on a GPU, and there alone."""
    if not upstream.binds_experts():
        pytest.skip("this release does not ask for it")
    routers = [module for module in build(checkpoint(TinySpec())).modules() if isinstance(module, upstream.TopK)]
    assert routers
    assert all(router.topk_config.output_format is not None for router in routers)
