"""A KV connector that works layer by layer gets the index keys with the latents, and its prompts answer as before."""

from __future__ import annotations

from pathlib import Path

import needle
import pytest

pytest.importorskip("vllm")

import torch
from offline import offline_engine

from dsv32_plugin.kernels.cache_layout import PAGE_SIZE

pytestmark = pytest.mark.engine

TOPK, STEPS = 64, 8
LENGTHS = (95, 300, 1000)


def test_round_trip(tmp_path: Path) -> None:
    needle.write(tmp_path / "model", topk=TOPK)
    haystacks = [needle.prompt(length, topk=TOPK, seed=length) for length in LENGTHS]
    prompts = [haystack.tokens for haystack in haystacks]
    store = tmp_path / "pages"
    store.mkdir()
    connector = {
        "kv_connector": "PageStore",
        "kv_connector_module_path": "page_store",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(store)},
    }
    options = {"dtype": "float32", "max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 1 << 28}
    with offline_engine(tmp_path / "model", kv_transfer_config=connector, **options) as engine:
        first = engine.generate(prompts, STEPS)
        engine.forget_prefixes()
        again = engine.generate(prompts, STEPS)
        for index_keys in store.glob("*/*k_cache"):
            torch.save(torch.zeros_like(torch.load(index_keys)), index_keys)
        engine.forget_prefixes()
        without_index_keys = engine.generate(prompts, STEPS)
    whole_pages = [(length - 1) // PAGE_SIZE * PAGE_SIZE for length in LENGTHS]
    assert [answer.cached_tokens for answer in again] == whole_pages
    for haystack, before, after, lost in zip(haystacks, first, again, without_index_keys, strict=True):
        assert before.tokens == haystack.answers(STEPS)
        assert after.tokens == before.tokens
        assert lost.tokens != before.tokens, "the index keys that were used did not come from the store"
