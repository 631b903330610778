"""The measure of the GPU tests is strict enough: mistakes cost more than all that DeepSeek rounds to fp8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from client import Completion, random_prompt
from judge import Judge
from oracle import Fault, hf_distributions, hf_greedy, hf_logprobs
from rounding import MARGIN, Rounding

from dsv32_plugin.tools.tiny import TinySpec

PROMPTS = [random_prompt(300, seed=seed) for seed in (1, 2)]
ROUNDING = Rounding(index=True, latents=True)
BFLOAT16: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": ROUNDING}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[TinySpec], Path]) -> Path:
    return checkpoint(TinySpec(dtype="bfloat16"))


@pytest.fixture(scope="module")
def judge(model: Path) -> Judge:
    return Judge(model, PROMPTS, ROUNDING, "cpu")


@pytest.mark.parametrize(("length", "selects"), [(64, False), (65, True)])
def test_the_margin_of_a_selection_is_measured(model: Path, length: int, selects: bool) -> None:
    """Of 64 keys nothing is left out."""
    (answer,) = hf_greedy(model, [random_prompt(length, seed=1)], 1)
    assert (answer.margin < float("inf")) is selects


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_exceeds_the_margin(model: Path, judge: Judge, fault: Fault) -> None:
    assert judge.errors_of_prompts([hf_logprobs(model, prompt, fault=fault) for prompt in PROMPTS]).ratio > MARGIN


def test_the_bfloat16_run_is_the_unit(model: Path, judge: Judge) -> None:
    # All prompts at once, as the judge runs them: torch 2.14 on a CPU rounds by the shape of a batch.
    own_bnv = hf_distributions(model, PROMPTS, len(PROMPTS[0]) - 1, **BFLOAT16)
    tokens_bn = torch.tensor(PROMPTS)[:, 1:]
    errors = judge.errors_of_prompts(own_bnv.gather(2, tokens_bn[..., None])[..., 0].tolist())
    assert errors.ratio == pytest.approx(1)
    assert errors.spread == pytest.approx(0, abs=1e-6)
    next_bv = hf_distributions(model, [[*prompt, 0] for prompt in PROMPTS], 1, **BFLOAT16)[:, 0]
    answers = [Completion([int(best)], [float(logprob)], 0) for logprob, best in zip(*next_bv.max(-1), strict=True)]
    assert judge.errors_of_answers(answers).ratio == pytest.approx(1)
