"""In the batch-invariant mode an answer is the same, bit for bit, whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from client import random_prompt
from offline import BATCH_INVARIANT, offline_engine

from dsv32_plugin.tools.tiny import TinySpec

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

LENGTHS = (2, 17, 64, 65, 130, 257, 600, 1100, 2100, 3000)
PROMPTS = [random_prompt(length, seed=1) for length in LENGTHS]
STEPS = 32
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16-graphs": {},
    "bf16-eager": {"enforce_eager": True},
    "fp8-cache-graphs": {"kv_cache_dtype": "fp8"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_answer_does_not_depend_on_its_company(checkpoint: Callable[[TinySpec], Path], name: str) -> None:
    model = checkpoint(TinySpec())
    # Without the prefix cache, which would let later runs skip the prefill; 1024 tokens a step, so that the chunks of a
    # prompt depend on what else is in the batch.
    options = {"dtype": "bfloat16", "enable_prefix_caching": False, "max_num_batched_tokens": 1024, **VARIANTS[name]}
    with offline_engine(model, env=BATCH_INVARIANT, **options) as engine:
        alone = [engine.generate([prompt], STEPS)[0] for prompt in PROMPTS]
        for seed in range(4):
            order = random.Random(seed).sample(range(len(PROMPTS)), len(PROMPTS))
            strangers = [random_prompt(length, seed=100 + seed) for length in (3, 90, 700)]
            answers = engine.generate([*strangers, *(PROMPTS[i] for i in order)], STEPS)[len(strangers) :]
            for i, answer in zip(order, answers, strict=True):
                assert answer.tokens == alone[i].tokens, f"prompt of {LENGTHS[i]} tokens, batch {seed}"
                assert answer.logprobs == alone[i].logprobs, f"prompt of {LENGTHS[i]} tokens, batch {seed}"
