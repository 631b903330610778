"""The measure of the GPU tests is strict enough: mistakes cost more than all that DeepSeek rounds to fp8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from client import random_prompt
from oracle import Fault, hf_logprobs
from rounding import MARGIN, Rounding, mean_error

from dsv32_plugin.tiny import TinySpec

PROMPT = random_prompt(300, seed=1)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[TinySpec], Path]) -> Path:
    return checkpoint(TinySpec())


@pytest.fixture(scope="module")
def exact(model: Path) -> list[float]:
    return hf_logprobs(model, PROMPT)


@pytest.fixture(scope="module")
def most(model: Path, exact: list[float]) -> float:
    """The largest mean error that the tests on a GPU let pass."""
    rounding = Rounding(index=True, latents=True)
    return MARGIN * mean_error(hf_logprobs(model, PROMPT, dtype=torch.bfloat16, rounding=rounding), exact)


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_exceeds_the_margin(model: Path, exact: list[float], most: float, fault: Fault) -> None:
    assert mean_error(hf_logprobs(model, PROMPT, fault=fault), exact) > most
