"""On a GPU the engine is as close to Hugging Face's float32 as Hugging Face itself is in bfloat16.

Both sides are teacher forced: the judge is given the tokens that the engine was given or chose, and says what each
one's log-probability is in float32, and in bfloat16 with the values in fp8 that the engine keeps in fp8. The engine's
mean error must not exceed that of the bfloat16 run by more than a factor that leaves room for chance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from client import random_prompt
from judge import Judge
from offline import OfflineEngine, offline_engine
from oracle import assert_same_tokens, hf_greedy
from rounding import MARGIN, Rounding

from dsv32_plugin.cache_layout import PAGE_SIZE
from dsv32_plugin.tiny import TinySpec

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

LENGTHS = (2, 17, 64, 65, 130, 600, 2100, 4000)
PROMPTS = [random_prompt(length, seed=1) for length in LENGTHS]
STEPS = 24
Checkpoints = Callable[[TinySpec], Path]


FLOAT32_MARGIN = 0.1
"""Of a float32 engine. On a GPU vLLM multiplies the experts' float32 matrices in TF32, with 10 bits of mantissa."""
FLOAT32_TIE = 0.02
INDEX = Rounding(index=True)
CACHE = Rounding(index=True, latents=True)


@dataclass(frozen=True)
class Variant:
    """Engine options, and what Hugging Face rounds so that its error is a fair measure."""

    options: dict[str, Any]
    rounding: Rounding = INDEX
    spec: TinySpec = field(default_factory=TinySpec)
    margin: float = MARGIN


MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
BFLOAT16 = {"dtype": "bfloat16"}
FP8_CACHE = {**BFLOAT16, "kv_cache_dtype": "fp8"}
EAGER = {"enforce_eager": True}

VARIANTS = {
    "bf16-graphs": Variant(BFLOAT16),
    "bf16-eager": Variant(BFLOAT16 | EAGER),
    "bf16-topk-2048": Variant(BFLOAT16, spec=TinySpec(index_topk=2048)),
    "bf16-mtp": Variant(BFLOAT16 | MTP, spec=TinySpec(mtp=True)),
    "fp8-cache-graphs": Variant(FP8_CACHE, CACHE),
    "fp8-cache-eager": Variant(FP8_CACHE | EAGER, CACHE),
    "fp8-cache-mtp": Variant(FP8_CACHE | MTP, CACHE, TinySpec(mtp=True)),
    "fp8-weights": Variant(FP8_CACHE, Rounding(index=True, latents=True, activations=True), TinySpec(fp8=True)),
    "fp32-graphs": Variant({"dtype": "float32"}, margin=FLOAT32_MARGIN),
    "fp32-mtp": Variant({"dtype": "float32"} | MTP, spec=TinySpec(mtp=True), margin=FLOAT32_MARGIN),
    "glm": Variant(BFLOAT16, spec=TinySpec.glm_defaults()),
}


def errors(engine: OfflineEngine, judge: Judge, *, drafts: bool) -> dict[str, float]:
    """Every way to the same answers: prefill alone and batched, decode alone and batched, from a cached prefix."""
    found = {"prefill batched": judge.errors_of_prompts(engine.prompt_logprobs(PROMPTS))}
    found["prefill alone"] = judge.errors_of_prompts([engine.prompt_logprobs([prompt])[0] for prompt in PROMPTS])
    engine.forget_prefixes()
    found["decode batched"] = judge.errors_of_answers(engine.generate(PROMPTS, STEPS))
    again = [engine.generate([prompt], STEPS)[0] for prompt in PROMPTS]
    # With drafts vLLM computes the last page again.
    pages = [max(0, (length - 1) // PAGE_SIZE - drafts) for length in LENGTHS]
    assert [answer.cached_tokens for answer in again] == [PAGE_SIZE * count for count in pages]
    found["decode alone, prefix hit"] = judge.errors_of_answers(again)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_error_against_float32(checkpoint: Checkpoints, name: str) -> None:
    variant = VARIANTS[name]
    model = checkpoint(variant.spec)
    # 1024 tokens a step: longer prompts come in chunks, beside the decodes of others.
    with offline_engine(model, max_num_batched_tokens=1024, **variant.options) as engine:
        found = errors(engine, Judge(model, PROMPTS, variant.rounding), drafts=variant.spec.mtp)
    if report := os.environ.get("DSV32_PARITY_REPORT"):
        with Path(report).open("a") as out:
            out.write(json.dumps({"variant": name, "margin": variant.margin, **found}) + "\n")
    assert max(found.values()) <= variant.margin, found


@pytest.mark.parametrize("mtp", [False, True], ids=["plain", "mtp"])
def test_float32_tokens_equal_hugging_face(checkpoint: Checkpoints, mtp: bool) -> None:
    model = checkpoint(TinySpec(mtp=mtp))
    prompts = PROMPTS[:6]
    with offline_engine(model, dtype="float32", max_num_batched_tokens=256, **(MTP if mtp else {})) as engine:
        answers = engine.generate(prompts, STEPS)
    for answer, truth in zip(answers, hf_greedy(model, prompts, STEPS), strict=True):
        assert_same_tokens(answer.tokens, truth, tie=FLOAT32_TIE)
