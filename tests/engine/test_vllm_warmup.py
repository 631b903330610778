"""The batches made up before the server is ready: every size runs, nothing is written, the caches are given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model

from dsv32_plugin import dsa
from dsv32_plugin.batch import DsaBatch
from dsv32_plugin.serving import free_port
from dsv32_plugin.tiny import TinySpec
from dsv32_plugin.vllm_adapter import warmup
from dsv32_plugin.vllm_adapter.attention import DsaAttention

pytestmark = pytest.mark.engine

MAX_LEN, MAX_TOKENS, MAX_SEQS, TOPK = 100, 24, 8, 12
SPEC = TinySpec(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8, index_topk=TOPK)


@pytest.fixture
def attention(checkpoint: Callable[[TinySpec], Path]) -> Iterator[DsaAttention]:
    options = {"dtype": "float32", "max_model_len": MAX_LEN, "max_num_seqs": MAX_SEQS}
    config = EngineArgs(model=str(checkpoint(SPEC)), kv_cache_memory_bytes=1 << 26, **options).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
        with set_forward_context(None, config), torch.inference_mode():
            yield model.model.layers[0].self_attn
    cleanup_dist_env_and_memory()


def made_up() -> list[DsaBatch]:
    batches = warmup.MadeUp(MAX_LEN, TOPK, torch.device("cpu")).batches(MAX_TOKENS, 3 * MAX_SEQS, [1, 3])
    return list(batches)


def test_the_sizes_are_those_a_server_meets() -> None:
    batches = made_up()
    assert batches[0].slots_t.shape[0] == MAX_TOKENS
    assert batches[0].max_visible == MAX_LEN, "the first is the largest"
    assert max(batch.slots_t.shape[0] for batch in batches) == MAX_TOKENS
    assert {dsa.needs_selection(batch, TOPK) for batch in batches} == {True, False}
    assert {batch.decodes.visible_bn.shape[1] for batch in batches if batch.decodes} == {1, 3}
    assert any(dsa.is_fresh_prefill(batch) for batch in batches)
    for batch in batches:
        assert int(batch.visible_t.max()) <= batch.max_visible <= MAX_LEN
        assert (batch.slots_t == -1).all()


def test_every_batch_runs_and_the_caches_are_given_back(attention: DsaAttention) -> None:
    before = attention.latents.kv_cache
    hidden_th = torch.randn(MAX_TOKENS, SPEC.hidden_size)
    positions_t = torch.zeros(MAX_TOKENS, dtype=torch.int64)
    slots_tk = torch.empty(MAX_TOKENS, TOPK, dtype=torch.int32)
    with warmup.made_up_caches(attention):
        for batch in made_up():
            tokens = slice(0, batch.slots_t.shape[0])
            out_th = attention.run(batch, positions_t[tokens], hidden_th[tokens], slots_tk[tokens])
            assert out_th.isfinite().all()
        assert not attention.latents.kv_cache.any(), "nothing is written"
    assert attention.latents.kv_cache is before
