"""What every engine is asked in the parity tests, and how its answers are judged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
from client import Completion, random_prompt
from oracle import Greedy

STEPS = 32
LENGTHS = (1, 2, 17, 63, 64, 65, 130, 257, 400, 600)
# One prompt in some dozens has a 64th and a 65th score that differ by less than float32 rounding. Which of the two is
# selected then depends on the order of summation, in Hugging Face as here. These prompts have none.
PROMPTS = [random_prompt(length, seed=1) for length in LENGTHS]
LOGPROB_TOLERANCE = 1e-3


def assert_same(answers: Sequence[Completion], expected: Sequence[Greedy]) -> None:
    for length, answer, truth in zip(LENGTHS, answers, expected, strict=True):
        assert answer.tokens == truth.tokens, f"prompt of {length} tokens"
        assert answer.logprobs == pytest.approx(truth.logprobs, abs=LOGPROB_TOLERANCE), f"prompt of {length} tokens"


def mean_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.mean(abs(x - y) for x, y in zip(a, b, strict=True))
