"""Two ranks answer as one does: parity with Hugging Face, and the needle in a context that is prefilled in shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import needle
import pytest

pytest.importorskip("vllm")

from client import random_prompt
from offline import offline_engine
from oracle import assert_same_tokens, hf_greedy

from dsv32_plugin.tools.tiny import TinySpec

pytestmark = [pytest.mark.engine, pytest.mark.gpu(count=2)]

STEPS = 24


def test_float32_tokens_equal_hugging_face(checkpoint: Callable[[TinySpec], Path]) -> None:
    model = checkpoint(TinySpec())
    prompts = [random_prompt(length, seed=1) for length in (2, 17, 64, 65, 130, 600)]
    with offline_engine(model, dtype="float32", tensor_parallel_size=2, max_num_batched_tokens=256) as engine:
        answers = engine.generate(prompts, STEPS)
    for answer, truth in zip(answers, hf_greedy(model, prompts, STEPS), strict=True):
        assert_same_tokens(answer.tokens, truth, tie=0.02)


def test_needle(tmp_path: Path) -> None:
    needle.write(tmp_path / "model", topk=2048, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=2048, seed=length) for length in (1000, 4096, 4099, 32768)]
    options = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "max_model_len": 32768 + 64}
    with offline_engine(tmp_path / "model", tensor_parallel_size=2, **options) as engine:
        answers = engine.generate([haystack.tokens for haystack in haystacks], STEPS)
    for haystack, answer in zip(haystacks, answers, strict=True):
        assert answer.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"
