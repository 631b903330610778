"""`dsv32 tiny`: the checkpoint is what a real one is, only small, and an oracle notices mistakes in serving it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dsv32_plugin import cli
from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.tiny import BLOCK, TinySpec

pytest.importorskip("transformers")
from oracle import Fault, dequantized_weights, hf_greedy, hf_logprobs, load

Checkpoints = Callable[[TinySpec], Path]

V32 = TinySpec()
GLM = TinySpec.glm_defaults()
SMALL = TinySpec(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[0, *torch.randint(3, 128000, (length - 1,), generator=generator).tolist()] for length in lengths]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(V32, id="v32"),
        pytest.param(GLM, id="glm"),
        pytest.param(replace(GLM, index_topk_freq=2), id="glm-every-second-layer-selects"),
        pytest.param(replace(GLM, index_topk_pattern="FSSF"), id="glm-pattern"),
        pytest.param(replace(SMALL, fp8=True), id="fp8"),
        pytest.param(replace(SMALL, dtype="bfloat16"), id="bfloat16"),
        pytest.param(replace(SMALL, mtp=True), id="mtp"),
    ],
)
def test_hugging_face_loads_every_weight(checkpoint: Checkpoints, spec: TinySpec) -> None:
    model = load(str(checkpoint(spec)))  # raises if a weight is missing, left over or of another shape
    assert type(model).__name__ == spec.config()["architectures"][0]
    config = DsaConfig.from_hf(model.config)
    assert config.index_topk == spec.index_topk
    assert config.indexer_types == DsaConfig.from_hf(spec.config()).indexer_types


@pytest.mark.parametrize("spec", [pytest.param(V32, id="v32"), pytest.param(GLM, id="glm")])
def test_greedy_decoding_has_no_near_ties_and_depends_on_the_prompt(checkpoint: Checkpoints, spec: TinySpec) -> None:
    answers = hf_greedy(checkpoint(spec), prompts(1, 40, 64, 65, 200), 24)
    gaps = [gap for answer in answers for gap in answer.gaps]
    assert statistics.median(gaps) > 0.3
    assert min(gaps) > 1e-3, "float32 noise is 1e-5"
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)
    assert all(len(set(answer.tokens)) > 12 for answer in answers), "no loops"


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name.lower()) for fault in Fault])
@pytest.mark.parametrize("spec", [pytest.param(V32, id="v32"), pytest.param(GLM, id="glm")])
def test_a_mistake_in_the_selection_changes_the_answer(checkpoint: Checkpoints, spec: TinySpec, fault: Fault) -> None:
    longer = prompts(200)
    right = hf_greedy(checkpoint(spec), longer, 8)[0]
    wrong = hf_greedy(checkpoint(spec), longer, 8, fault=fault)[0]
    assert sum(a != b for a, b in zip(right.tokens, wrong.tokens, strict=True)) >= 6
    assert hf_greedy(checkpoint(spec), longer, 8)[0] == right, "the fault is gone afterwards"


def test_a_short_prompt_does_not_notice_the_indexer(checkpoint: Checkpoints) -> None:
    short = prompts(20)
    assert hf_greedy(checkpoint(V32), short, 8, fault=Fault.NO_RELU) == hf_greedy(checkpoint(V32), short, 8)


def test_teacher_forcing_agrees_with_decoding(checkpoint: Checkpoints) -> None:
    (prompt,) = prompts(100)
    (answer,) = hf_greedy(checkpoint(V32), [prompt], 8)
    forced = hf_logprobs(checkpoint(V32), prompt + answer.tokens)
    assert forced[len(prompt) - 1 :] == pytest.approx(answer.logprobs, abs=1e-4)


def test_the_tokenizer_is_the_real_one(checkpoint: Checkpoints) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint(SMALL))
    text = (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    ids = [0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16, 1]
    ids += [128803, 19, 13, 19, 127252, 128804, 128798]
    assert tokenizer.encode(text) == ids, "and no token is added by itself"
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    # As in published outputs of V3.2: the mark is one token, flagged special; a tag is not.
    assert tokenizer.encode("<｜DSML｜function_calls") == [30, 128793, 8701, 4941, 12548]
    assert tokenizer.decode(tokenizer.encode("a<｜DSML｜b"), skip_special_tokens=True) == "a<b"
    assert tokenizer.chat_template is None
    for sample in ("  spaces\n\n\tand tabs", "naïve café 漢字かな 한국어 🎉", "1234567 x_y->z{}"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_shards_and_index_agree(checkpoint: Checkpoints) -> None:
    folder = checkpoint(V32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) >= 2
    held: dict[str, str] = {}
    for shard in shards:
        with safe_open(folder / shard, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), shard)
    assert index["weight_map"] == held
    assert sum((folder / shard).stat().st_size for shard in shards) < 200e6


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tiny.write(replace(SMALL, seed=seed), tmp_path / name)
    a, b, c = (stored(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_fp8_stores_what_the_published_checkpoint_stores(checkpoint: Checkpoints) -> None:
    quantised, exact = stored(checkpoint(replace(SMALL, fp8=True))), stored(checkpoint(SMALL))
    plain = ("norm", "gate.weight", "e_score_correction_bias", "weights_proj", "embed_tokens", "lm_head")
    for name, tensor in exact.items():
        if any(part in name for part in plain):
            assert torch.equal(quantised[name], tensor)
            assert f"{name}_scale_inv" not in quantised
            continue
        scale = quantised[f"{name}_scale_inv"]
        assert quantised[name].dtype == torch.float8_e4m3fn
        assert scale.dtype == torch.float32
        assert scale.shape == tuple(-(-size // step) for size, step in zip(tensor.shape, BLOCK, strict=True))
        assert torch.equal(scale.log2(), scale.log2().round()), "a power of two"
    for name, value in dequantized_weights(checkpoint(replace(SMALL, fp8=True))).items():
        # e4m3 keeps 3 bits after the leading one: half a step of 1/8; below its normal range the step is 2**-9 scales.
        step = quantised[f"{name}_scale_inv"].max() * 2.0**-9 if f"{name}_scale_inv" in quantised else 0.0
        assert ((value - exact[name]).abs() <= exact[name].abs() / 16 + step / 2).all()


def test_the_config_is_the_real_ones_with_other_sizes() -> None:
    config = V32.config()
    assert config["topk_method"] == "noaux_tc"
    assert config["num_experts"] == config["n_routed_experts"]
    assert config["rope_scaling"]["factor"] == 40
    assert (config["index_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]) == (128, 64, 512)
    assert config["index_n_heads"] >= 32
    assert replace(V32, fp8=True).config()["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        pytest.param({"index_topk": 0}, "index_topk", id="topk-zero"),
        pytest.param({"hidden_size": -1}, "hidden_size", id="negative"),
        pytest.param({"n_group": 3}, "n_group", id="groups"),
        pytest.param({"num_experts_per_tok": 17}, "num_experts_per_tok", id="experts"),
        pytest.param({"index_topk_pattern": "SFFF"}, "index_topk_pattern", id="first-layer-shares"),
        pytest.param({"index_topk_pattern": "FF"}, "index_topk_pattern", id="pattern-too-short"),
        pytest.param({"qk_rope_head_dim": 256}, "index_head_dim", id="rope-wider-than-index-head"),
        pytest.param({"first_k_dense_replace": 4}, "first_k_dense_replace", id="no-experts"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(V32, **changes).config()
    assert caught.value.key == key


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "model"
    sizes = ["--hidden-size", "16", "--num-hidden-layers", "2", "--glm", "--v-head-dim", "32"]
    assert cli.main(["tiny", str(out), *sizes]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["v_head_dim"], config["qk_nope_head_dim"]) == (16, 32, 192)
    assert "GlmMoeDsaForCausalLM" in capsys.readouterr().out

    assert cli.main(["tiny", str(out), *sizes]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["tiny", str(out), *sizes, "--force", "--seed", "1", "--index-topk", "-3"]) == 2
    assert "index_topk" in capsys.readouterr().err
    assert (out / "config.json").exists(), "a refused replacement leaves the old one"
    assert cli.main(["tiny", str(out), *sizes, "--force", "--seed", "1"]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["model"]
