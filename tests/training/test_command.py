"""`dsv32 train-tiny`, and how it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch

from dsv32_plugin import cli
from dsv32_plugin.training import checkpoint, recipe


@pytest.fixture(autouse=True)
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short stage of each kind."""
    stages = tuple(replace(stage, lengths=((64, 1),), tokens_per_step=128) for stage in small.STAGES)
    monkeypatch.setattr(recipe, "Recipe", lambda: replace(small.recipe(), stages=stages))


def run(*arguments: str | Path) -> int:
    return cli.main(["train-tiny", *map(str, arguments), "--device", "cpu", "--workers", "0"])


def test_it_writes_a_checkpoint_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(out) == 0
    assert checkpoint.load(out).config == small.recipe().config
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [line["stage"] for line in json.loads((out / "curves.json").read_text())] == ["dense", "warmup", "sparse"]
    captured = capsys.readouterr()
    assert f"python -m dsv32_plugin.training.evaluate {out}" in captured.out
    assert "sparse 1 at 64 tokens" in captured.err


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    assert run(tmp_path / "out") == 0
    before = (tmp_path / "out" / checkpoint.FILE).read_bytes()
    assert run(tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out" / checkpoint.FILE).read_bytes() == before


def test_without_the_warm_up(tmp_path: Path) -> None:
    assert run(tmp_path / "out", "--skip-warmup") == 0
    assert [path.name for path in sorted((tmp_path / "out" / "stages").iterdir())] == ["1-dense", "2-sparse"]


def test_an_existing_folder_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    assert run(tmp_path) == 2
    assert "exists; choose another folder, go on with --resume, or replace it with --force" in capsys.readouterr().err
    assert (tmp_path / "mine").exists()


def test_force_replaces(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    assert run(tmp_path / "out", "--force") == 0
    assert not (tmp_path / "out" / "old").exists()


def test_another_seed_is_not_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out") == 0
    assert run(tmp_path / "out", "--resume", "--seed", "1") == 2
    assert "another recipe than the one to resume: seed was 0, is 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train-tiny", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "got cuda, and torch sees no GPU" in capsys.readouterr().err


def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dsv32_plugin.training.plots", None)
    monkeypatch.delattr("dsv32_plugin.training.plots", raising=False)
    assert run(tmp_path / "out") == 2
    assert "pip install 'dsv32-plugin[train]'" in capsys.readouterr().err
