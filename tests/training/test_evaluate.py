"""The evaluation's command and the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
import torch

from dsv32_plugin.training import checkpoint, evaluate, measures, plots


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.lively_model()
    checkpoint.save(model, small.recipe().model, tmp_path / "model")
    checkpoint.save(model, small.recipe().model, tmp_path / "model" / "stages" / "1-dense")
    checkpoint.save(model, small.recipe().model, tmp_path / "model" / "stages" / "2-sparse")
    monkeypatch.setattr(measures, "attention_mass", lambda model, length: [0.5] * 4)
    monkeypatch.setattr(measures, "chat_accuracy", lambda model, count: {"tool call": 0.25})
    monkeypatch.setattr(measures, "mtp_acceptance", lambda model: 0.75)
    out, plot = tmp_path / "record.json", tmp_path / "mass.png"
    arguments = ["evaluate", str(tmp_path / "model"), "--questions", "2", "--lengths", "200", "300"]
    arguments += ["--compare", f"another={tmp_path / 'model'}", "--devices", "cpu", "cpu"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(out), "--plot", str(plot)])
    assert evaluate.main() == 0
    printed = capsys.readouterr().out
    assert "| sparse, after stage 1-dense | 0.0 % | 0.0 % |" in printed
    assert "| another | 0.0 % | 0.0 % |" in printed
    assert "| MTP drafts accepted | 75.0 % |" in printed
    record = json.loads(out.read_text())
    assert record["device"] == "CPU"
    assert record["needles"]["dense"] == {"200": 0.0, "300": 0.0}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_line_of_the_needles_is_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small.lively_model()
    checkpoint.save(model, small.recipe().model, tmp_path / "model")
    out = tmp_path / "record.json"
    about = {"device": "CPU", "torch": torch.__version__, "dtype": "float32", "questions": 2, "selected": 4}
    rest = {"chat": {}, "mtp_acceptance": 1.0, "attention_mass": {"final": [0.5] * 4}}
    needles: dict[str, dict[str, float | None]] = {"dense": {"200": 0.5}, "random": {"200": None}}
    out.write_text(json.dumps({**about, **rest, "needles": needles}))
    command = ["evaluate", str(tmp_path / "model"), "--out", str(out), "--lengths", "200", "--devices", "cpu", "--only"]
    monkeypatch.setattr("sys.argv", [*command, "random"])
    assert evaluate.main() == 0
    assert json.loads(out.read_text())["needles"] == {"dense": {"200": 0.5}, "random": {"200": 0.0}}
    monkeypatch.setattr("sys.argv", [*command, "rando"])
    assert evaluate.main() == 2
    assert "expected names of dense, sparse" in capsys.readouterr().err
    out.write_text(out.read_text().replace("CPU", "NVIDIA H100"))
    monkeypatch.setattr("sys.argv", [*command, "random"])
    assert evaluate.main() == 2
    assert "was measured with another device" in capsys.readouterr().err


def test_a_longer_context_than_trained_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path), "--lengths", "512", "8192", "--devices", "cpu"])
    assert evaluate.main() == 2
    captured = capsys.readouterr().err
    assert "contexts of [8192] tokens exceed the 4096 of the training" in captured
    assert "expected a checkpoint folder with a config.json" in captured


def test_curves(tmp_path: Path) -> None:
    line = {"answer_loss": 1.0, "mtp_loss": 1.0, "lookup_accuracy": 0.1}
    log = [{"stage": "dense", "run_step": 1, **line}, {"stage": "warmup", "run_step": 2, **line, "indexer_kl": 1.0}]
    plots.curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
