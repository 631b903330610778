"""`dsv32 check`: folders of JSON files in, what serves them out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import published
import pytest
from published import CONFIGS, GLM_5, REFUSED

from dsv32_plugin import cli
from dsv32_plugin.core import chat_format, checkpoint
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.tools import check
from dsv32_plugin.tools.findings import Finding


def names(config: dict[str, Any]) -> Iterator[str]:
    """As a checkpoint of GLM's or DeepSeek's has them."""
    read = DsaConfig.from_hf(config)
    split = checkpoint.matrices(read)
    leaves_out = checkpoint.SHARED_WITH_TARGET if read.architecture.startswith("Glm") else ()
    for tensor in checkpoint.tensors(read):
        module = tensor.name.removesuffix(".weight")
        if tensor.unused or (f".{read.num_layers}." in tensor.name and tensor.name.endswith(leaves_out)):
            continue
        yield from split[module].parts(module) if module in split and not tensor.plain else [tensor.name]


def small(name: str) -> dict[str, Any]:
    """The config with few layers and experts: an index of all has 90,000 names."""
    few = {"num_hidden_layers": 5, "n_routed_experts": 16, "n_group": 1, "topk_group": 1, "indexer_types": None}
    return {**CONFIGS[name], **few, "layer_types": None, "mlp_layer_types": None}


def folder(tmp_path: Path, name: str, **changes: Any) -> Path:
    config = {**small(name), **changes}
    published.write(tmp_path, name, lambda _: names(config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def found(findings: list[Finding], name: str, section: str | None = None) -> Finding:
    return next(row for row in findings if row.name == name and section in (None, row.section))


PARSERS = {
    "DeepSeek-V3.2": "dsv32 --reasoning-parser dsv32",
    "DeepSeek-V3.2-Speciale": "dsv32 --reasoning-parser dsv32",
    "DeepSeek-V3.2-Exp": "deepseek_v31 --reasoning-parser deepseek_v3",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(published.write(tmp_path, name)), "--json"]) == 0
    rows = [Finding(**row) for row in json.loads(capsys.readouterr().out)["findings"]]
    assert found(rows, "architecture").found == CONFIGS[name]["architectures"][0]
    parsers = PARSERS.get(name, "glm47 --reasoning-parser glm45")
    assert found(rows, "parsers", "vLLM").found == f"--tool-call-parser {parsers}"
    assert found(rows, "start", "vLLM").found.endswith(parsers)
    assert "no model.safetensors.index.json" in found(rows, "tensors").found
    block_fp8 = name not in ("GLM-5.3-W4A8", "GLM-5.1-FP8-Dynamic", "GLM-5-AWQ")
    assert found(rows, "GPUs", "SGLang").level == ("ok" if block_fp8 else "warning")


def test_the_names_of_an_index_are_held_against_the_config(tmp_path: Path) -> None:
    rows = check.examine(str(folder(tmp_path, "GLM-5-FP8")))
    assert found(rows, "tensors").level == "ok"
    assert found(rows, "shards").found == "none of 4 is here"
    assert not [row for row in rows if row.level == "wrong"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_format_has_its_names(name: str, tmp_path: Path) -> None:
    rows = check.examine(str(folder(tmp_path, name)))
    assert found(rows, "tensors").level == "ok"


@pytest.mark.parametrize(
    ("lost", "row", "level"),
    [
        pytest.param("model.layers.1.self_attn.kv_b_proj.weight_scale_inv", "missing tensors", "wrong", id="a-scale"),
        pytest.param("model.norm.weight", "missing tensors", "wrong", id="a-norm"),
        pytest.param("model.layers.5.hnorm.weight", "missing tensors of the draft layer", "warning", id="a-draft"),
    ],
)
def test_a_tensor_that_is_in_no_shard(lost: str, row: str, level: str, tmp_path: Path) -> None:
    folder(tmp_path, "GLM-5-FP8")
    path = tmp_path / checkpoint.INDEX
    index = json.loads(path.read_text())
    del index["weight_map"][lost]
    path.write_text(json.dumps(index))
    wrong = found(check.examine(str(tmp_path)), row)
    assert (wrong.level, wrong.found) == (level, f"1: {lost}")


def test_a_tensor_of_another_model(tmp_path: Path) -> None:
    folder(tmp_path, "GLM-5")
    path = tmp_path / checkpoint.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.attn_hc.fn"] = "model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    assert found(check.examine(str(tmp_path)), "unknown tensors").found == "1: model.layers.0.attn_hc.fn"


def test_some_shards_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, "GLM-5")
    for shard in (1, 2, 4):
        (tmp_path / f"model-{shard:05d}-of-00004.safetensors").touch()
    assert cli.main(["check", str(tmp_path), "--json"]) == 1
    assert "1: model-00003-of-00004.safetensors" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1 of 4 shards that .* names are missing, among them model-00003.* with "):
        checkpoint.check_shards(tmp_path)


@pytest.mark.parametrize("file", ["config.json", checkpoint.INDEX, "tokenizer_config.json"])
def test_a_file_that_is_cut_off_is_named(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, "DeepSeek-V3.2")
    path = tmp_path / file
    path.write_text((path.read_text() or "{")[:-1])
    assert cli.main(["check", str(tmp_path), "--json"]) == 1
    assert f"{file}" in capsys.readouterr().out.replace("\\n", "")


def test_no_config_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tmp_path), "--json"]) == 1
    assert "copy the checkpoint's config.json there" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path / "gone"), "--json"]) == 1
    assert "expected a checkpoint's folder or OWNER/NAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "says"),
    [
        pytest.param({"architectures": ["LlamaForCausalLM"]}, "this plugin does not serve it", id="llama"),
        pytest.param({"architectures": ["AXK2ForCausalLM"]}, "its indexer is the same", id="axk2"),
        pytest.param({"architectures": None, "model_type": "dots3_note"}, "its indexer is the same", id="dots3"),
        pytest.param(REFUSED["GLM-5.2-NVFP4"], "ModelOpt", id="nvfp4"),
    ],
)
def test_what_is_not_served(
    config: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.write(tmp_path, "GLM-5")
    (tmp_path / "config.json").write_text(json.dumps({**GLM_5, **config}))
    assert cli.main(["check", str(tmp_path), "--json"]) == 1
    assert says in capsys.readouterr().out


def test_modelopt_s_own_file_is_read(tmp_path: Path) -> None:
    published.write(tmp_path, "GLM-5")
    stored = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / check.MODELOPT).write_text(json.dumps(stored))
    (row,) = check.examine(str(tmp_path))
    assert row.level == "wrong"
    assert "ModelOpt" in row.advice


def test_without_a_tokenizer_it_does_not_chat(tmp_path: Path) -> None:
    published.write(tmp_path, "GLM-5")
    (tmp_path / "tokenizer.json").unlink()
    assert found(check.examine(str(tmp_path)), "tokenizer.json").level == "wrong"


def test_the_hub_is_asked_for_these_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder(tmp_path, "GLM-5-FP8"))

    files = [*check.READ, *(f"model-{shard:05d}-of-00004.safetensors" for shard in (1, 2, 3))]
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, name, revision: files)
    rows = check.examine("zai-org/GLM-5-FP8", "v1")
    assert (asked["name"], asked["revision"]) == ("zai-org/GLM-5-FP8", "v1")
    assert set(asked["allow_patterns"]) == set(check.READ)
    assert not any("safetensors" in pattern and "index" not in pattern for pattern in asked["allow_patterns"])
    assert found(rows, "missing shards").found == "1: model-00004-of-00004.safetensors"


def test_the_table_is_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(published.write(tmp_path, "GLM-5.2"))]) == 0
    assert "can be served" in capsys.readouterr().out


def test_parsers_that_find_nothing_are_told_at_the_start(tmp_path: Path) -> None:
    model = published.write(tmp_path, "GLM-5")
    for engine in ("vllm", "sglang"):
        said = chat_format.complaint(model, engine, "dsv32", None)
        assert said is not None
        assert "expected --tool-call-parser glm47 --reasoning-parser glm45" in said
        assert chat_format.complaint(model, engine, "glm47", "glm45") is None
    model = published.write(tmp_path / "v32", "DeepSeek-V3.2")
    assert chat_format.complaint(model, "vllm", "dsv32", None) is None


def test_speciale_takes_no_tools() -> None:
    """Its config and template are V3.2's: its name alone tells it."""
    from dsv32_plugin.core.chat import render, variant
    from dsv32_plugin.parsers import EncodingError

    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [{"role": "user", "content": "hello"}]
    assert variant("deepseek-ai/DeepSeek-V3.2-Speciale", None) == "speciale"
    assert variant("deepseek-ai/DeepSeek-V3.2-Exp", "exp") == "v3.2"
    with pytest.raises(EncodingError, match="tools"):
        render(messages, {"tools": tools}, "speciale")
    assert render(messages, {"tools": tools}, "v3.2") != render(messages, {}, "speciale")
