import math

import pytest
import torch
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32 import modeling_deepseek_v32

from dsv32_plugin.core.rope import rope_table, softmax_scale

YARN = {
    "rope_type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}


def without(*keys: str) -> dict:
    return {key: value for key, value in YARN.items() if key not in keys}


CONFIGS = [
    pytest.param(64, 10000.0, YARN, id="deepseek_v32"),
    pytest.param(64, 10000.0, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, id="unequal_mscales"),
    pytest.param(64, 10000.0, without("mscale", "mscale_all_dim"), id="no_mscale"),
    pytest.param(64, 10000.0, {**YARN, "attention_factor": 1.25}, id="attention_factor"),
    pytest.param(64, 5e6, {**YARN, "truncate": False, "factor": 4.5}, id="not_truncated"),
    pytest.param(16, 500.0, {**without("beta_fast", "beta_slow"), "original_max_position_embeddings": 64}, id="small"),
    pytest.param(8, 10000.0, {**YARN, "beta_fast": 1, "beta_slow": 1, "truncate": False}, id="ramp_of_no_width"),
    pytest.param(64, 10000.0, {**YARN, "factor": 1}, id="factor_one"),
    pytest.param(64, 1e6, {"rope_type": "default"}, id="default"),
]


@pytest.mark.parametrize(("rope_dim", "theta", "scaling"), CONFIGS)
def test_equals_hugging_face(rope_dim, theta, scaling):
    parameters = {**scaling, "rope_theta": theta}
    config = DeepseekV32Config(qk_rope_head_dim=rope_dim, rope_parameters=parameters, max_position_embeddings=163840)
    cos, sin = modeling_deepseek_v32.DeepseekV32RotaryEmbedding(config)(
        torch.zeros(1), torch.arange(163840).unsqueeze(0)
    )
    half = rope_dim // 2
    table = rope_table(rope_dim, 163840, theta, scaling)
    assert table.dtype == torch.float32
    assert torch.equal(table, torch.cat((cos[0, :, :half], sin[0, :, :half]), 1))
    assert softmax_scale(192, scaling) == pytest.approx(
        modeling_deepseek_v32.yarn_apply_mscale(parameters, 192**-0.5), rel=1e-15
    )


def test_no_scaling_is_plain_rope():
    table = rope_table(4, 3, 100.0, None)
    expected = [[math.cos(p), math.cos(p / 10), math.sin(p), math.sin(p / 10)] for p in range(3)]
    torch.testing.assert_close(table, torch.tensor(expected))
    assert softmax_scale(64, None) == 0.125


def test_both_spellings_of_the_config():
    published = {**without("rope_type"), "type": "yarn"}
    table = rope_table(64, 100, 10000, published)
    assert torch.equal(rope_table(64, 100, None, {**YARN, "rope_theta": 10000}), table)
    assert torch.equal(rope_table(64, 100, 10000.0, {**YARN, "rope_theta": 10000}), table)
    assert softmax_scale(192, published) == softmax_scale(192, YARN)


def test_the_scale_of_deepseek_v32():
    assert softmax_scale(192, YARN) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert softmax_scale(192, without("mscale_all_dim")) == 192**-0.5


@pytest.mark.parametrize(
    ("theta", "scaling", "message"),
    [
        (1e4, {**YARN, "rope_type": "longrope"}, "rope_type: expected one of default, yarn, got 'longrope'"),
        (1e4, {**without("rope_type"), "type": "linear"}, "^type: expected one of default, yarn, got 'linear'"),
        (1e4, without("rope_type"), "rope_type: expected one of default, yarn, got none; name it"),
        (1e4, without("factor"), "factor: missing; a rope config of type yarn needs it"),
        (1e4, {**YARN, "factor": None}, "factor: missing"),
        (1e4, without("original_max_position_embeddings"), "original_max_position_embeddings: missing"),
        (None, YARN, "rope_theta: missing; give it apart or in the rope config"),
        (None, None, "rope_theta: missing"),
        (1e4, {**YARN, "rope_theta": 5e4}, "rope_theta: 10000.0 was given apart, but the rope config holds 50000.0"),
    ],
)
def test_refuses(theta, scaling, message):
    with pytest.raises(ValueError, match=message):
        rope_table(64, 10, theta, scaling)
