"""The configs of published checkpoints, and what is known of them from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from published import CONFIGS, GLM_5, GLM_52, REFUSED, SELECTING, V32

from dsv32_plugin.core import checkpoint, relatives
from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.quantisation import BlockFp8, PackedForFp8


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_read(name: str) -> None:
    config = DsaConfig.from_hf(CONFIGS[name])
    config.check(tp_size=8)
    config.check_kernels()
    checkpoint.check_alike(config)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        pytest.param("DeepSeek-V3.2", 685, id="v32"),  # as the hub counts them, with the draft layer
        pytest.param("GLM-5", 754, id="glm-5"),
        pytest.param("GLM-5.2", 753, id="glm-5.2"),
    ],
)
def test_its_tensors_have_the_size_that_is_published(name: str, billions: int) -> None:
    config = DsaConfig.from_hf(CONFIGS[name])
    repeated = sum(
        config.vocab_size * config.hidden_size
        for tensor in checkpoint.tensors(config)
        if tensor.name.startswith(f"model.layers.{config.num_layers}.")
        and tensor.name.endswith(checkpoint.SHARED_WITH_TARGET)
    )
    leaves_out = repeated if config.architecture.startswith("Glm") else 0
    assert round((checkpoint.parameters(config) - leaves_out) / 1e9) == billions


def test_glm_52_shares_selections() -> None:
    config = DsaConfig.from_hf(GLM_52)
    assert tuple(layer for layer in range(78) if config.selects(layer)) == SELECTING
    assert config.indexer_types.count("shared") == 57
    assert config.selects(78), "the draft layer has an indexer of its own"
    by_schedule = {key: value for key, value in GLM_52.items() if key != "indexer_types"}
    assert DsaConfig.from_hf(by_schedule) == config, "the list is what the schedule says"
    indexers = {
        tensor.name for tensor in checkpoint.tensors(config) if ".indexer.wq_b." in tensor.name and not tensor.unused
    }
    assert len(indexers) == 22, "21 layers and the draft layer: so many are counted in GLM-5.3's index"


def test_glm_s_draft_layer_has_the_tensors_that_are_counted() -> None:
    """791 in GLM-5.2's index: it repeats neither embedding nor head."""
    config = DsaConfig.from_hf(GLM_52)
    names = [tensor.name for tensor in checkpoint.tensors(config) if tensor.name.startswith("model.layers.78.")]
    assert len([name for name in names if not name.endswith(checkpoint.SHARED_WITH_TARGET)]) == 791
    every = {tensor.name for tensor in checkpoint.tensors(config) if not tensor.unused}
    without = {name for name in every if not (".78." in name and name.endswith(checkpoint.SHARED_WITH_TARGET))}
    assert checkpoint.lacking(config, without, drafts=True) == []


def test_glm_differs_from_deepseek_where_it_is_known_to() -> None:
    glm, deepseek = DsaConfig.from_hf(GLM_5), DsaConfig.from_hf(V32)
    assert (glm.num_heads, glm.index_n_heads, glm.qk_nope_head_dim, glm.v_head_dim) == (64, 32, 192, 256)
    assert (glm.index_rope_interleave, deepseek.index_rope_interleave) == (True, False)
    assert (glm.routes_in_float32, deepseek.routes_in_float32) == (True, False)
    assert (glm.rms_norm_eps, deepseek.rms_norm_eps) == (1e-5, 1e-6)
    assert (glm.rope["rope_type"], deepseek.rope["rope_type"]) == ("default", "yarn")
    assert all(glm.selects(layer) for layer in range(79))


@pytest.mark.parametrize("name", ["GLM-5", "GLM-5.2"])
def test_transformers_reads_it_alike(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    known = {**CONFIGS[name], "layer_types": None}  # whose name for sparse layers its checks do not know
    if not hasattr(transformers.GlmMoeDsaConfig(), "indexer_types"):
        pytest.skip("a release before GLM-5.2")
    theirs = transformers.GlmMoeDsaConfig(**known)
    ours = DsaConfig.from_hf(CONFIGS[name])
    assert tuple(theirs.indexer_types) == ours.indexer_types
    assert tuple(theirs.mlp_layer_types) == ours.mlp_layer_types
    assert DsaConfig.from_hf(theirs) == ours


def test_the_w4a8_checkpoint_has_int4_experts_and_block_fp8() -> None:
    quantisation = DsaConfig.from_hf(CONFIGS["GLM-5.3-W4A8"]).quantisation
    assert quantisation is not None
    assert quantisation.scheme("model.layers.5.mlp.experts.7.up_proj") == PackedForFp8(bits=4, group=128)
    blocks = BlockFp8((128, 128), scale="weight_scale")
    assert quantisation.scheme("model.layers.5.mlp.shared_experts.up_proj") == blocks
    assert quantisation.scheme("model.layers.5.self_attn.kv_b_proj") == blocks
    assert quantisation.scheme("model.layers.5.mlp.gate") is None
    assert quantisation.scheme("lm_head") is None


@pytest.mark.parametrize(("name", "says"), [("GLM-5.3-W4AFP8", "W4A8"), ("GLM-5.2-NVFP4", "ModelOpt")])
def test_a_format_without_a_path_is_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config\.quant_method: expected one of fp8, awq.*" + says):
        DsaConfig.from_hf(REFUSED[name])


@pytest.mark.parametrize("model_type", relatives.RELATIVES)
def test_a_relative_is_refused_by_name_and_stands_in_the_table(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    relative = relatives.RELATIVES[model_type]
    for config in ({"architectures": [relative.architectures[0]]}, {"model_type": model_type}):
        with pytest.raises(ConfigError, match="it would need " + re.escape(relative.needs)):
            DsaConfig.from_hf({**GLM_5, "architectures": None, **config})
    page = (Path(__file__).parent.parent / "docs" / "support.md").read_text(encoding="utf-8")
    assert f"| `{model_type}` | {relative.checkpoint} | {relative.needs} |" in page
    if model_type in transformers.CONFIG_MAPPING:
        assert any(hasattr(transformers, name) for name in relative.architectures)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"rope_interleave": False}, "rope_interleave: expected true", id="rope"),
        pytest.param({"mlp_bias": True}, "mlp_bias: expected false", id="mlp-bias"),
        pytest.param({"moe_router_dtype": "bfloat16"}, "moe_router_dtype: expected 'float32'", id="router"),
        pytest.param({"layer_types": ["sliding_attention"] * 78}, "layer_types: .*'sliding_attention'", id="layers"),
    ],
)
def test_what_no_code_computes_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DsaConfig.from_hf({**GLM_52, **changes})


@pytest.mark.parametrize(("key", "value"), [("kv_lora_rank", 256), ("qk_rope_head_dim", 32), ("index_head_dim", 96)])
def test_sizes_that_only_the_references_take(key: str, value: int) -> None:
    config = DsaConfig.from_hf({**GLM_5, key: value})
    with pytest.raises(ConfigError, match=f"{key}: expected .* on a GPU, got {value}"):
        config.check_kernels()
