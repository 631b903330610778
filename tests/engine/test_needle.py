"""Only the right selection answers the needle checkpoint; on a CPU, and what wrong selections answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import needle
import pytest
from oracle import Fault, hf_greedy

TOPK, STEPS = 64, 8
SPARSE = [needle.prompt(length, topk=TOPK, seed=length) for length in (95, 129, 300, 1000, 2000)]
DENSE = [needle.prompt(length, topk=TOPK, seed=length) for length in (28, 32)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the multi-token prediction layer, which Hugging Face leaves out."""
    out = tmp_path_factory.mktemp("needle") / "model"
    needle.write(out, topk=TOPK, mtp=True)
    return out


def test_hugging_face_answers(model: Path) -> None:
    haystacks = SPARSE + DENSE
    answers = hf_greedy(model, [haystack.tokens for haystack in haystacks], STEPS)
    for haystack, answer in zip(haystacks, answers, strict=True):
        assert answer.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"
        assert min(answer.gaps) > 20, "the answer is not a matter of rounding"


@pytest.mark.parametrize("fault", sorted(set(Fault) - {Fault.WRONG_INDEX_ROPE}, key=lambda fault: fault.name))
def test_a_wrong_selection_loses_the_needle(model: Path, fault: Fault) -> None:
    """No direction that carries a meaning here is rotated, so rope is left to the parity tests."""
    answers = hf_greedy(model, [haystack.tokens for haystack in SPARSE], STEPS, fault=fault)
    for haystack, answer in zip(SPARSE, answers, strict=True):
        assert answer.tokens != haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"


@pytest.mark.engine
def test_vllm_answers(model: Path) -> None:
    """In chunks; alone, when every draft is right since the draft layer selects as well, and then batched."""
    pytest.importorskip("vllm")
    from offline import offline_engine

    haystacks = SPARSE + DENSE
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "kv_cache_memory_bytes": 1 << 28}
    drafts = {"method": "mtp", "num_speculative_tokens": 3}
    with offline_engine(model, max_num_batched_tokens=512, speculative_config=drafts, **options) as engine:
        alone = [engine.generate([haystack.tokens], STEPS)[0] for haystack in SPARSE]
        drafted = engine.metric("vllm:spec_decode_num_draft_tokens")
        assert engine.metric("vllm:spec_decode_num_accepted_tokens") == drafted > 0
        engine.forget_prefixes()
        together = engine.generate([haystack.tokens for haystack in haystacks], STEPS)
    for haystack, answer in zip(SPARSE + haystacks, alone + together, strict=True):
        assert answer.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"
