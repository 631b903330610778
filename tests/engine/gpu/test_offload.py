"""A prompt longer than the selection that comes back from the engine's CPU offload gives the same answer.

Index keys that did not travel with the latents show only past `index_topk` tokens; up to there no key is left out.
"""

from __future__ import annotations

from pathlib import Path

import needle
import pytest

pytest.importorskip("vllm")

from client import random_prompt
from offline import offline_engine

from dsv32_plugin.kernels.cache_layout import PAGE_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

TOPK, STEPS = 2048, 12
LENGTHS = (2500, 4100, 9000)
PAGES = sum(-(-(length + STEPS) // PAGE_SIZE) for length in LENGTHS)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_round_trip(tmp_path: Path, kv_cache_dtype: str) -> None:
    needle.write(tmp_path / "model", topk=TOPK, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=TOPK, seed=length) for length in LENGTHS]
    prompts = [haystack.tokens for haystack in haystacks]
    options = {"kv_offloading_size": 1.0, "kv_cache_dtype": kv_cache_dtype, "max_model_len": 9216}
    # The GPU has room for one round of prompts: strangers of the same lengths leave nothing of the first one.
    with offline_engine(tmp_path / "model", dtype="bfloat16", num_gpu_blocks_override=PAGES + 4, **options) as engine:
        first = engine.generate(prompts, STEPS)
        engine.generate([random_prompt(length, seed=length) for length in LENGTHS], STEPS)
        engine.forget_prefixes()
        again = engine.generate(prompts, STEPS)
        # Not vllm:external_prefix_cache_hits: offline, vLLM drops the statistics of steps without an output, and the
        # step that starts a copy from the CPU has none.
        restored = engine.metric("vllm:prompt_tokens_by_source", source="external_kv_transfer")
    for haystack, before, after in zip(haystacks, first, again, strict=True):
        assert before.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"
        assert after.tokens == before.tokens, f"{len(haystack.tokens)} tokens, of which {after.cached_tokens} came back"
    whole_pages = [length // PAGE_SIZE * PAGE_SIZE for length in LENGTHS]
    assert [after.cached_tokens for after in again] == whole_pages
    assert restored == sum(whole_pages)
