"""`quantization_config`: what is read of it, and what is refused by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import AWQ, FP8_DYNAMIC, GLM_5, W4A8
from torch import nn

from dsv32_plugin.core import checkpoint, weights
from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.quantisation import Awq, Gptq, Packed, PackedForFp8, Rows

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
ATTENTION = "model.layers.1.self_attn"


def read(quantisation: dict[str, Any], key: str = "quantization_config") -> DsaConfig:
    return DsaConfig.from_hf(
        {**GLM_5, "num_hidden_layers": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, key: quantisation}
    )


def group(**changes: Any) -> dict[str, Any]:
    """One group of compressed-tensors, int4 in groups of 128 unless changed."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    made = {"format": "pack-quantized", "targets": ["Linear"], "input_activations": None, "weights": weights}
    made |= {key: value for key, value in changes.items() if key in made or key == "output_activations"}
    made["weights"] = {**weights, **{key: value for key, value in changes.items() if key in {*weights, "actorder"}}}
    return {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"group_0": made}}


def test_both_keys_are_read_and_the_newer_wins() -> None:
    for key in ("quantization_config", "compression_config"):
        assert read(W4A8, key).quantisation == read(W4A8).quantisation
    both = DsaConfig.from_hf({**GLM_5, "quantization_config": AWQ, "compression_config": W4A8}).quantisation
    assert both is not None
    assert both.method == "awq"


@pytest.mark.parametrize(
    ("quantisation", "scheme"),
    [
        pytest.param(AWQ | {"modules_to_not_convert": None}, Awq(128), id="awq"),
        pytest.param({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, Awq(64), id="awq-older-keys"),
        pytest.param(GPTQ, Gptq(4, 128, offset=1), id="gptq"),
        pytest.param(GPTQ | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}, Gptq(8, 0, 0), id="gptq-v2"),
        pytest.param(group(), Packed(4, 128), id="w4a16"),
        pytest.param(group(num_bits=8, strategy="channel"), Packed(8, 0), id="w8a16"),
        pytest.param(group(symmetric=False, actorder="group"), Packed(4, 128, False, True), id="asymmetric-ordered"),
        pytest.param(group(actorder="weight"), Packed(4, 128), id="ordered-when-it-was-made"),
        pytest.param(FP8_DYNAMIC, Rows("fp8"), id="w8a8-fp8"),
    ],
)
def test_a_format(quantisation: dict[str, Any], scheme: Any) -> None:
    found = read(quantisation).quantisation
    assert found is not None
    assert found.scheme(f"{ATTENTION}.kv_b_proj") == scheme


def test_who_is_left_out() -> None:
    awq, gptq = read(AWQ).quantisation, read(GPTQ | {"dynamic": {r"-:.*self_attn.*": {}}}).quantisation
    mixed = read(W4A8).quantisation
    assert awq is not None
    assert gptq is not None
    assert mixed is not None
    assert [found.scheme(f"{ATTENTION}.kv_b_proj") is None for found in (awq, gptq, mixed)] == [True, True, False]
    expert = "model.layers.3.mlp.experts.1.up_proj"
    assert (awq.scheme(expert), gptq.scheme(expert)) == (Awq(128), Gptq(4, 128, 1))
    assert mixed.scheme(expert) == PackedForFp8(4, 128)


DYNAMIC = {"type": "float", "num_bits": 8, "dynamic": True}


@pytest.mark.parametrize(
    ("quantisation", "says"),
    [
        pytest.param(AWQ | {"bits": 8}, "bits: expected 4, got 8", id="awq-8"),
        pytest.param(AWQ | {"version": "gemv"}, "version: expected 'gemm', got 'gemv'", id="awq-gemv"),
        pytest.param(AWQ | {"zero_point": False}, "zero_point: expected true", id="awq-symmetric"),
        pytest.param(AWQ | {"group_size": 0}, "group_size: expected a positive integer or -1, got 0", id="group-0"),
        pytest.param(
            AWQ | {"modules_to_not_convert": "self_attn"}, "modules_to_not_convert: expected a list", id="text"
        ),
        pytest.param(GPTQ | {"bits": 3}, "bits: expected 4 or 8, got 3", id="gptq-3"),
        pytest.param(GPTQ | {"sym": False}, "sym: expected true", id="gptq-asymmetric"),
        pytest.param(GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: .*got 'marlin'", id="gptq-marlin"),
        pytest.param(
            GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic: expected rules that leave", id="gptq-dynamic"
        ),
        pytest.param(group(num_bits=3), "config_groups.group_0: .*got 'pack-quantized, int3", id="int3"),
        pytest.param(group(strategy="tensor"), "weights.strategy: expected 'group' or 'channel'", id="strategy"),
        pytest.param(group(format="nvfp4-pack-quantized"), "got 'nvfp4-pack-quantized", id="nvfp4"),
        pytest.param(group(input_activations=DYNAMIC | {"dynamic": False}), "dynamic: expected true", id="static"),
        pytest.param(group(input_activations=DYNAMIC | {"num_bits": 4}), "input_activations: .*'float4'", id="a4"),
        pytest.param(group(output_activations=DYNAMIC), "output_activations: expected none", id="outputs"),
        pytest.param(group() | {"ignore": ["re:("]}, "expected regular expressions", id="regex"),
        pytest.param(group() | {"config_groups": {}}, "config_groups: expected one group", id="no-groups"),
        pytest.param(group() | {"transform_config": {"R1": {}}}, "transform_config: expected none", id="rotated"),
        pytest.param({"quant_method": "auto-round"}, "got 'auto-round'; export it with AutoRound", id="auto-round"),
        pytest.param({"quant_method": "mxfp4"}, "MXFP4", id="mxfp4"),
        pytest.param({"quant_method": "gguf"}, "one of fp8, awq, gptq, compressed-tensors", id="gguf"),
    ],
)
def test_a_variant_without_a_path_names_its_key(quantisation: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"config key quantization_config\\..*{says}"):
        read(quantisation)


@pytest.mark.parametrize(
    ("left_out", "first", "second"),
    [
        pytest.param("mlp.gate", "layers.0.mlp.gate_proj is not quantised", "mlp.up_proj: AWQ int4", id="by-a-part"),
        pytest.param("experts.2.up_proj", "experts.0.gate_proj is AWQ", "experts.2.up_proj: not", id="an-expert"),
    ],
)
def test_what_is_multiplied_at_once_is_stored_alike(left_out: str, first: str, second: str) -> None:
    config = read(AWQ | {"modules_to_not_convert": [left_out]})
    with pytest.raises(ConfigError) as caught:
        checkpoint.check_alike(config)
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_what_is_joined_need_not_be_stored_alike() -> None:
    config = read(AWQ | {"modules_to_not_convert": ["indexer.wk"]})
    assert not checkpoint.alike(config, f"{ATTENTION}.q_index_kv_a_proj")
    assert checkpoint.alike(config, f"{ATTENTION}.q_kv_a_proj")


def loader(config: DsaConfig, name: str, **parameters: torch.Tensor) -> weights.Loader:
    module = nn.Module()
    for parameter, tensor in parameters.items():
        module.register_parameter(parameter, nn.Parameter(tensor, requires_grad=False))
    targets = [
        (f"{name}.{parameter}", weights.Target(name, module, (parameter,), lambda to, tensor: to.copy_(tensor)))
        for parameter in parameters
    ]
    return weights.Loader(config, targets)


def test_a_layer_without_a_place_for_a_part_is_refused() -> None:
    """An engine that made another layer than the config says would load half of a matrix."""
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match=rf"{name}\.qzeros has no place in the engine's layer.*AWQ int4"):
        loader(read(AWQ | {"modules_to_not_convert": []}), name, qweight=torch.zeros(2, 2, dtype=torch.int32))


def test_a_plain_tensor_for_a_quantised_layer_is_refused() -> None:
    name = "model.layers.0.mlp.down_proj"
    config = read(GPTQ)
    shapes = checkpoint.matrices(config)[name].parts(name)
    ints = {
        suffix: torch.zeros(shapes[f"{name}.{suffix}"].shape, dtype=torch.int32) for suffix in ("qweight", "qzeros")
    }
    scales = torch.zeros(shapes[f"{name}.scales"].shape)
    made = loader(config, name, **ints, scales=scales)
    plain = torch.zeros(GLM_5["hidden_size"], GLM_5["intermediate_size"], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"{name}\.weight is a float, but by quantization_config .* is GPTQ int4"):
        made.load([(f"{name}.weight", plain)], whole=False)
