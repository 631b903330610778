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


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_exceeds_the_margin(checkpoint: Callable[[TinySpec], Path], fault: Fault) -> None:
    model, prompt = checkpoint(TinySpec()), random_prompt(400, seed=1)
    exact = hf_logprobs(model, prompt)
    rounded = hf_logprobs(model, prompt, dtype=torch.bfloat16, rounding=Rounding(index=True, latents=True))
    assert mean_error(hf_logprobs(model, prompt, fault=fault), exact) > MARGIN * mean_error(rounded, exact)
