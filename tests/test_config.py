"""`DsaConfig`: real configs read right, wrong ones refused with the key, what was expected and what came."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest

from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.quantisation import BlockFp8

V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def with_(**changes: Any) -> dict[str, Any]:
    return {**deepcopy(V32), **changes}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in V32.items() if key not in keys}


def test_the_real_config() -> None:
    config = DsaConfig.from_hf(V32)
    assert (config.num_layers, config.num_heads, config.qk_head_dim) == (61, 128, 192)
    assert config.quantisation is not None
    assert config.quantisation.scheme("model.layers.3.self_attn.kv_b_proj") == BlockFp8((128, 128))
    assert not config.index_rope_interleave
    assert [config.is_moe(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert all(config.selects(layer) for layer in range(62))
    config.check(tp_size=8)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_a_config_object_reads_like_the_file(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    changes = {"index_topk_freq": 4, "model_type": name} if name == "glm_moe_dsa" else {}
    changes["architectures"] = [{"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}[name] + "ForCausalLM"]
    raw = with_(**changes)
    loaded = transformers.AutoConfig.for_model(**raw)
    assert DsaConfig.from_hf(loaded) == DsaConfig.from_hf(raw)


def test_glm_rotates_interleaved_unless_the_config_says_otherwise() -> None:
    glm = with_(architectures=["GlmMoeDsaForCausalLM"])
    assert DsaConfig.from_hf(glm).index_rope_interleave
    assert not DsaConfig.from_hf({**glm, "indexer_rope_interleave": False}).index_rope_interleave


def test_the_model_type_names_the_architecture_when_the_list_is_absent() -> None:
    config = SimpleNamespace(**with_(architectures=None))
    assert DsaConfig.from_hf(config).architecture == "DeepseekV32ForCausalLM"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        pytest.param({}, "FFFFFF", id="every-layer-selects"),
        pytest.param({"index_topk_freq": 2}, "FFSFSF", id="every-second"),
        pytest.param({"index_topk_freq": 4}, "FFSSSF", id="every-fourth"),
        pytest.param({"index_topk_freq": 2, "index_skip_topk_offset": 3}, "FFFSFS", id="offset"),
        pytest.param({"index_topk_freq": 0}, "FFFFFF", id="zero-is-one"),
        pytest.param({"index_topk_pattern": "FSFSSS"}, "FSFSSS", id="pattern"),
        pytest.param({"index_topk_pattern": "FSFSSS", "index_topk_freq": 2}, "FSFSSS", id="pattern-before-schedule"),
        pytest.param({"indexer_types": ["full"] + ["shared"] * 5}, "FSSSSS", id="list"),
        pytest.param({"indexer_types": ["full"] * 6, "index_topk_pattern": "FSFSSS"}, "FFFFFF", id="list-first"),
    ],
)
def test_which_layers_select(keys: dict[str, Any], expected: str) -> None:
    config = DsaConfig.from_hf(with_(num_hidden_layers=6, **keys))
    assert "".join("F" if config.selects(layer) else "S" for layer in range(6)) == expected
    assert config.selects(6), "a multi-token prediction layer selects for itself"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GlmMoeDsaConfig(num_hidden_layers=6, **keys).indexer_types
    assert tuple(theirs) == config.indexer_types


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            with_(architectures=["LlamaForCausalLM"]), "architectures: .*'LlamaForCausalLM'", id="other-model"
        ),
        pytest.param({}, "architectures: .*got nothing", id="empty"),
        pytest.param(without("index_topk"), "index_topk: expected a value, got nothing", id="dense-deepseek-v3"),
        pytest.param(with_(index_topk=0), "index_topk: expected an integer of at least 1, got 0", id="topk-zero"),
        pytest.param(with_(index_topk=-5), "index_topk: .*got -5", id="topk-negative"),
        pytest.param(with_(index_topk=4097), "index_topk: .* at most 4096, got 4097", id="topk-4097"),
        pytest.param(with_(index_topk=2048.5), "index_topk: expected a value of type int", id="topk-float"),
        pytest.param(with_(index_topk=True), "index_topk: expected a value of type int", id="topk-bool"),
        pytest.param(with_(scoring_func="softmax"), "scoring_func: expected 'sigmoid'", id="scoring-func"),
        pytest.param(with_(topk_method="greedy"), "topk_method: expected 'noaux_tc'", id="topk-method"),
        pytest.param(with_(hidden_act="gelu"), "hidden_act: expected 'silu'", id="activation"),
        pytest.param(with_(attention_bias=True), "attention_bias: expected false", id="bias"),
        pytest.param(with_(tie_word_embeddings=True), "tie_word_embeddings: expected false", id="tied"),
        pytest.param(with_(index_topk_pattern="S" * 61), "index_topk_pattern: expected a first layer", id="layer-0"),
        pytest.param(with_(index_topk_pattern="FS"), "index_topk_pattern: .*61 layers", id="pattern-short"),
        pytest.param(with_(index_topk_pattern="FX" * 31), "index_topk_pattern: ", id="pattern-letters"),
        pytest.param(with_(index_skip_topk_offset=0, index_topk_freq=2), "index_skip_topk_offset", id="offset"),
        pytest.param(with_(mlp_layer_types=["dense"]), "mlp_layer_types: ", id="mlp-types"),
        pytest.param(without("rope_theta"), "rope_theta: expected a number, got nothing", id="no-theta"),
        pytest.param(with_(rope_scaling={"type": "longrope"}), "rope_scaling: .*'longrope'", id="rope-type"),
        pytest.param(with_(rope_scaling={"type": "yarn"}), r"rope_scaling.factor: expected a number", id="yarn-factor"),
        pytest.param(with_(index_head_dim=32), r"index_head_dim: expected at least qk_rope_head_dim", id="index-dim"),
        pytest.param(with_(qk_rope_head_dim=63), "qk_rope_head_dim: expected an even number", id="odd-rope"),
        pytest.param(with_(n_group=7), r"n_group: expected a divisor of n_routed_experts \(256\)", id="groups"),
        pytest.param(with_(n_group=256), "n_group: expected groups of two experts", id="group-of-one"),
        pytest.param(with_(topk_group=9), r"topk_group: expected at most n_group \(8\), got 9", id="topk-group"),
        pytest.param(with_(num_experts_per_tok=129), "num_experts_per_tok: expected at most the 128", id="experts"),
        pytest.param(
            with_(quantization_config={"quant_method": "exl3"}),
            "quantization_config.quant_method: .*'exl3'",
            id="exl3",
        ),
        pytest.param(with_(quantization_config={"quant_method": "fp8"}), "weight_block_size", id="per-tensor-fp8"),
    ],
)
def test_a_wrong_config_names_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DsaConfig.from_hf(config)


def test_heads_must_divide_over_the_ranks() -> None:
    config = DsaConfig.from_hf(with_(num_attention_heads=12))
    config.check(tp_size=4)
    with pytest.raises(ConfigError, match=r"num_attention_heads: expected a multiple of .* size 8, got 12"):
        config.check(tp_size=8)
