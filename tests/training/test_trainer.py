"""The three stages at a size for a CPU: who learns when, that it learns, and that a resumed run is the same run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from dsv32_plugin.console import CommandError
from dsv32_plugin.training import checkpoint, trainer
from dsv32_plugin.training.data import answer_mask
from dsv32_plugin.training.muon import Muon, orthogonalised
from dsv32_plugin.training.recipe import Recipe, Stage
from dsv32_plugin.training.steps import is_indexer, learning_rate_factor, probes
from dsv32_plugin.training.tokenizer import encode
from dsv32_plugin.training.trainer import Trainer, differing


def train(out: Path, recipe: Recipe | None = None, **options: Any) -> Trainer:
    options = {"device": "cpu", "workers": 0, "report": lambda line: None} | options
    made = Trainer(recipe or small.recipe(), out, **options)
    made.run()
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train(tmp_path_factory.mktemp("whole"))


def moved(before: Path, after: Path) -> set[bool]:
    """Of the tensors that differ between two checkpoints, whether each is the indexer's."""
    first, second = (dict(checkpoint.hf_tensors(checkpoint.load(folder))) for folder in (before, after))
    return {is_indexer(name) for name in first if not torch.equal(first[name], second[name])}


class TestStages:
    def test_the_warm_up_moves_the_indexer_alone(self, whole: Trainer) -> None:
        assert moved(whole.out / "stages" / "1-dense", whole.out / "stages" / "2-warmup") == {True}

    def test_sparse_training_moves_everything(self, whole: Trainer) -> None:
        assert moved(whole.out / "stages" / "2-warmup", whole.out / "stages" / "3-sparse") == {True, False}

    def test_dense_training_leaves_the_indexer(self, whole: Trainer, tmp_path: Path) -> None:
        start = Trainer(small.recipe(), tmp_path, device="cpu", workers=0)
        checkpoint.save(start.model, small.recipe().model, tmp_path)
        assert moved(tmp_path, whole.out / "stages" / "1-dense") == {False}

    def test_the_end_is_the_last_stage(self, whole: Trainer) -> None:
        assert moved(whole.out / "stages" / "3-sparse", whole.out) == set()

    def test_each_step_is_logged(self, whole: Trainer) -> None:
        assert [(line["stage"], line["step"], line["length"]) for line in whole.log] == [
            ("dense", 4, 128),
            ("warmup", 3, 128),
            ("sparse", 2, 128),
        ]
        assert all({"answer_loss", "mtp_loss", "lookup_accuracy"} <= line.keys() for line in whole.log)
        assert ["indexer_kl" in line for line in whole.log] == [False, True, True]


def test_it_learns(tmp_path: Path) -> None:
    """Dense training lowers the language loss, the warm-up the divergence."""
    stages = (
        Stage("dense", ((64, 30),), 1024, 0.02, 3e-3, warmup_steps=5),
        Stage("warmup", ((64, 30),), 1024, 0.0, 3e-3, warmup_steps=5, probes=32),
    )
    log = train(tmp_path, replace(small.recipe(), stages=stages, needle_share=1.0)).log
    dense, warmup = ([line for line in log if line["stage"] == kind] for kind in ("dense", "warmup"))
    assert dense[-1]["answer_loss"] < 0.75 * dense[0]["answer_loss"]
    assert warmup[-1]["indexer_kl"] < 0.75 * warmup[0]["indexer_kl"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("steps", [3, 4, 6, 8], ids=lambda steps: f"after-{steps}-steps")
def test_a_resumed_run_is_the_same_run(
    whole: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Stopped within a length, at the end of a stage, within the warm-up and within sparse training."""
    monkeypatch.setattr(trainer, "REPORT_STEPS", 1)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    seen = []

    def stop(line: dict[str, Any]) -> None:
        seen.append(line)
        if len(seen) > steps:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path, report=stop)
    assert not (tmp_path / checkpoint.FILE).exists()
    resumed = train(tmp_path, resume=True)
    assert len(resumed.log) == 9
    for (name, first), (_, second) in zip(
        checkpoint.hf_tensors(whole.model), checkpoint.hf_tensors(resumed.model), strict=True
    ):
        assert torch.equal(first, second), name


class TestBadResume:
    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(CommandError, match="expected the state of an earlier run, found none"):
            Trainer(small.recipe(), tmp_path, device="cpu", workers=0, resume=True)

    def test_another_recipe(self, whole: Trainer) -> None:
        other = replace(small.recipe(), seed=5).resized(hidden_size=128)
        with pytest.raises(CommandError) as caught:
            Trainer(other, whole.out, device="cpu", workers=0, resume=True)
        assert "seed was 0, is 5; model.hidden_size was 64, is 128" in str(caught.value)

    def test_differences(self) -> None:
        before, now = {"a": 1, "b": ({"c": 2}, 3)}, {"a": 1, "b": [{"c": 4}, 3], "d": 5}
        assert differing(before, now) == ["b[0].c was 2, is 4", "d was None, is 5"]
        assert differing(before, before) == []


def test_learning_rate() -> None:
    stage = Stage("dense", ((64, 100), (128, 100)), 64, 1.0, 1.0, warmup_steps=10)
    factors = [learning_rate_factor(step, stage) for step in range(stage.steps)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[105] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in pairwise(factors[9:]))


def test_half_of_the_probes_are_where_the_model_answers() -> None:
    text = "<｜User｜>" + "a" * 400 + "<｜Assistant｜></think>" + "b" * 60 + "<｜end▁of▁sentence｜>" + "c" * 40
    tokens = torch.tensor([encode(text)] * 3)
    chosen = probes(tokens, 40, torch.Generator().manual_seed(0))
    assert chosen.shape == (3, 40)
    assert chosen.max() < tokens.shape[1] - 2
    answers = answer_mask(tokens).roll(-1, 1)
    assert (answers.gather(1, chosen).sum(1) >= 20).all()
    assert (answers.gather(1, chosen).sum(1) < 40).all()


class TestMuon:
    @pytest.mark.parametrize("shape", [(2, 8, 8), (1, 16, 4), (3, 4, 16)])
    def test_singular_values_become_about_one(self, shape: tuple[int, ...]) -> None:
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalised(matrices).float())
        assert values.min() > 0.5, "the polynomial leaves them between 0.7 and 1.2"
        assert values.max() < 1.4

    def test_a_stack_is_updated_like_each_of_its_matrices(self) -> None:
        generator = torch.Generator().manual_seed(0)
        start, gradients = torch.randn(2, 3, 8, 4, generator=generator)
        stack = torch.nn.Parameter(start.clone())
        alone = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        for parameters, slopes in (([stack], [gradients]), (alone, list(gradients))):
            optimizer = Muon(parameters, 0.1)
            for _ in range(2):
                for parameter, slope in zip(parameters, slopes, strict=True):
                    parameter.grad = slope.clone()
                optimizer.step()
        torch.testing.assert_close(stack.data, torch.stack([p.data for p in alone]), atol=1e-3, rtol=1e-2)
        assert not torch.equal(stack.data, start)
