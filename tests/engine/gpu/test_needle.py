"""Only the right selection answers the needle checkpoint: on a GPU, from 1K to 128K tokens, the draft layer included.

`../test_needle.py` proves on a CPU that wrong selections lose the needle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import needle
import pytest

pytest.importorskip("vllm")

from offline import offline_engine

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

STEPS = 12
TOPK = 2048
LENGTHS = (1000, 4096, 32768, 131072)
"""The first selects every key; a decoy then answers, because attention prefers it."""
DRAFTS = 3


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("mtp", [False, True], ids=["plain", "mtp"])
def test_needle_in_long_contexts(tmp_path: Path, kv_cache_dtype: str, mtp: bool) -> None:
    needle.write(tmp_path / "model", topk=TOPK, mtp=mtp, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=TOPK, seed=length) for length in LENGTHS]
    options: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "dtype": "bfloat16", "max_model_len": 131072 + 64}
    if mtp:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": DRAFTS}
    with offline_engine(tmp_path / "model", max_num_batched_tokens=8192, **options) as engine:
        alone = [engine.generate([haystack.tokens], STEPS)[0] for haystack in haystacks]
        if mtp:
            # The draft layer is the model's own layer, so every draft is right if its selection is.
            drafted = engine.metric("vllm:spec_decode_num_draft_tokens")
            assert engine.metric("vllm:spec_decode_num_accepted_tokens") == drafted > 0
        hits = engine.generate([haystack.tokens for haystack in haystacks], STEPS)
        engine.forget_prefixes()
        together = engine.generate([haystack.tokens for haystack in haystacks], STEPS)
    assert all(answer.cached_tokens > 0 for answer in hits)
    for way, answers in {"alone": alone, "prefix hits": hits, "together": together}.items():
        for haystack, answer in zip(haystacks, answers, strict=True):
            assert answer.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens, {way}"


def test_needle_in_a_thousand_tokens(tmp_path: Path) -> None:
    needle.write(tmp_path / "model", topk=512, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=512, seed=length) for length in (550, 600, 1000, 1024)]
    with offline_engine(tmp_path / "model", dtype="bfloat16") as engine:
        answers = engine.generate([haystack.tokens for haystack in haystacks], STEPS)
    for haystack, answer in zip(haystacks, answers, strict=True):
        assert answer.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"


def test_short_run(tmp_path: Path) -> None:
    """Small enough for compute-sanitizer (tests/kernels/sanitize.sh): prefill in chunks, decode, both cache formats."""
    needle.write(tmp_path / "model", topk=64, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=64, seed=length) for length in (28, 95, 129, 200)]
    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True}
    for kv_cache_dtype in ("auto", "fp8"):
        options |= {"kv_cache_dtype": kv_cache_dtype, "kv_cache_memory_bytes": 1 << 26}
        with offline_engine(tmp_path / "model", max_num_batched_tokens=256, max_num_seqs=8, **options) as engine:
            answers = engine.generate([haystack.tokens for haystack in haystacks], 3)
        for haystack, answer in zip(haystacks, answers, strict=True):
            assert answer.tokens == haystack.answers(3), f"{len(haystack.tokens)} tokens"
