"""A prompt longer than the selection that comes back from the engine's CPU offload gives the same answer.

Index keys that did not travel with the latents show only past `index_topk` tokens; up to there no key is left out.
"""

from __future__ import annotations

from pathlib import Path

import needle
import pytest

pytest.importorskip("vllm")

from offline import offline_engine

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

TOPK, STEPS = 2048, 12
LENGTHS = (2500, 4100, 9000)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_round_trip(tmp_path: Path, kv_cache_dtype: str) -> None:
    needle.write(tmp_path / "model", topk=TOPK, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=TOPK, seed=length) for length in LENGTHS]
    prompts = [haystack.tokens for haystack in haystacks]
    options = {"kv_offloading_size": 1.0, "kv_cache_dtype": kv_cache_dtype, "max_model_len": 16384}
    with offline_engine(tmp_path / "model", dtype="bfloat16", **options) as engine:
        first = engine.generate(prompts, STEPS)
        engine.generate([prompts[0][:64]], 1)  # another step, which hands over what is still on its way to the CPU
        engine.forget_prefixes()
        again = engine.generate(prompts, STEPS)
        restored = engine.metric("vllm:external_prefix_cache_hits")
    for haystack, before, after in zip(haystacks, first, again, strict=True):
        assert before.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"
        assert after.tokens == before.tokens, f"{len(haystack.tokens)} tokens"
        assert after.cached_tokens > TOPK, f"{len(haystack.tokens)} tokens: {restored:.0f} came back from the CPU"
    # All but the last, incomplete page of each prompt, and perhaps one page more that is computed for its output.
    assert restored >= sum(length // 64 * 64 - 64 for length in LENGTHS)
