"""One layer's attention by itself: its ways through a short batch agree, and the batches made up before a start run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model

from dsv32_plugin.core import planner, warmup
from dsv32_plugin.core.attention import DsaAttention
from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.plans import Dense, Expanded, Masked, Parts
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import LayerCaches, Step, mixed_batch
from dsv32_plugin.tools.serving import free_port
from dsv32_plugin.tools.tiny import TinySpec
from dsv32_plugin.vllm_adapter import warmup as vllm_warmup

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


def made_up() -> list[Step]:
    of = warmup.MadeUp(MAX_LEN, TOPK, torch.device("cpu"))
    return [*of.largest(MAX_TOKENS), *of.batches(MAX_TOKENS, 3 * MAX_SEQS, 3)]


def test_the_sizes_are_those_a_server_meets() -> None:
    batches = made_up()
    assert batches[0].slots_t.shape[0] == MAX_TOKENS
    assert batches[0].max_visible == MAX_LEN, "the first is the largest"
    assert max(batch.slots_t.shape[0] for batch in batches) == MAX_TOKENS
    plans = [Planner(TOPK, 1 << 20, Policy()).plan(batch, torch.float32, torch.float32) for batch in batches]
    assert {made.selects for made in plans} == {True, False}
    assert {batch.decodes.visible_bn.shape[1] for batch in batches if batch.decodes} == {1, 2, 3}
    assert {type(made) for made in plans if not made.selects} == {Dense, Expanded}
    for batch in batches:
        assert int(batch.visible_t.max()) <= batch.max_visible <= MAX_LEN
        assert (batch.slots_t == -1).all()


def test_every_batch_runs_and_writes_nothing(attention: DsaAttention) -> None:
    hidden_th = torch.randn(MAX_TOKENS, SPEC.hidden_size)
    slots_tk = torch.empty(MAX_TOKENS, TOPK, dtype=torch.int32)
    caches = attention.shared.source.one_page(0, torch.device("cpu"))
    for batch in made_up():
        assert warmup.run_one(attention, caches, batch, hidden_th, slots_tk).isfinite().all()
    assert caches.index_keys is not None
    assert not caches.latents.any()
    assert not caches.index_keys.any()


def test_warm_up_runs_the_largest_batches(attention: DsaAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    seen: list[int] = []
    attend = DsaAttention.attend

    def noted(self: DsaAttention, batch: Step, *arguments: Any) -> torch.Tensor:
        seen.append(batch.slots_t.shape[0])
        return attend(self, batch, *arguments)

    monkeypatch.setattr(DsaAttention, "attend", noted)
    slots_tk = torch.empty(MAX_TOKENS, TOPK, dtype=torch.int32)
    warm_up = vllm_warmup.WarmUp([attention], slots_tk, get_current_vllm_config())
    sizes = [batch.slots_t.shape[0] for batch in made_up() if batch.decodes is None]
    assert set(sizes) == set(seen), "every size is looked at"
    seen.clear()
    warm_up.finish(torch.randn(MAX_TOKENS, SPEC.hidden_size))
    assert seen[:2] == sizes[:2], "vLLM's measurement sees the largest"
    assert set(sizes) == set(seen)


def test_projections_are_left_out(attention: DsaAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their results have the shapes of the layer's own."""
    none, tokens = warmup.Unprojected(attention), 3
    hidden_th, q_a_tl = torch.randn(tokens, SPEC.hidden_size), torch.randn(tokens, SPEC.q_lora_rank)
    for name, given in (("project", hidden_th), ("index_weights", hidden_th), ("index_query", q_a_tl)):
        own, left_out = getattr(attention, name)(given), getattr(none, name)(given)
        assert [part.shape for part in own] == [part.shape for part in left_out]
    assert none.query(q_a_tl).shape == attention.query(q_a_tl).shape


@pytest.mark.parametrize("decodes", [0, 2])
def test_expanded_keys_give_what_the_latents_give(
    attention: DsaAttention, monkeypatch: pytest.MonkeyPatch, decodes: int
) -> None:
    """Three sequences, no longer than topk, of which the first ones may have only their last token in the step."""
    lengths = [9, 12, 5]
    counts = [1 if seq < decodes else length for seq, length in enumerate(lengths)]
    batch, positions_t = step(lengths, counts, decodes)
    hidden_th = torch.randn(sum(counts), SPEC.hidden_size)
    out = []
    for pairs in (0, 1 << 62):
        monkeypatch.setattr(planner, "EXPANDED_PAIRS", pairs)
        batch = replace(batch)  # a step is planned once
        made = attention.shared.planner.plan(batch, torch.float32, torch.float32)
        assert isinstance(made, Expanded) == (pairs == 0)
        latents = torch.randn(3, 64, 512 + 64, generator=generator())
        caches = LayerCaches(latents, torch.zeros(3, 64, attention.indexer.dim))
        slots_tk = torch.empty(len(hidden_th), TOPK, dtype=torch.int32)
        out.append(attention.attend(batch, positions_t, hidden_th, slots_tk, caches))
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decodes", [0, 2])
def test_a_mask_gives_what_the_latents_give(
    attention: DsaAttention, monkeypatch: pytest.MonkeyPatch, decodes: int
) -> None:
    """Sequences longer than topk, one with a prefix, in two chunks; the first ones may be decodes."""
    lengths, counts = [15, 17, 9, 40], [15, 17, 9, 13]
    counts = [1 if seq < decodes else count for seq, count in enumerate(counts)]
    batch, positions_t = step(lengths, counts, decodes)
    hidden_th = torch.randn(sum(counts), SPEC.hidden_size)
    out = []
    monkeypatch.setattr(planner, "measured", lambda *about: True)
    for pays in (True, False):
        monkeypatch.setattr(planner, "masked_pays", lambda *sizes, pays=pays: pays)
        batch = replace(batch)  # a step is planned once
        made = attention.shared.planner.plan(batch, torch.float32, torch.float32)
        assert isinstance(made, Masked | Parts) == pays
        assert isinstance(made, Parts) == (pays and decodes > 0)
        latents = torch.randn(4, 64, 512 + 64, generator=generator())
        index_keys = torch.randn(4, 64, attention.indexer.dim, generator=generator())
        slots_tk = torch.empty(len(hidden_th), TOPK, dtype=torch.int32)
        out.append(attention.attend(batch, positions_t, hidden_th, slots_tk, LayerCaches(latents, index_keys)))
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-5)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def step(lengths: list[int], counts: list[int], decodes: int) -> tuple[Step, torch.Tensor]:
    """A step of the last `counts` tokens of sequences that have a page each, and the positions of these tokens."""
    positions = [torch.arange(length - count, length) for length, count in zip(lengths, counts, strict=True)]
    query_start_b1 = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    seq_lens_b = torch.tensor(lengths, dtype=torch.int32)
    batch = mixed_batch(
        slots_t=torch.cat([64 * seq + position for seq, position in enumerate(positions)]),
        block_table_bp=torch.arange(len(lengths), dtype=torch.int32)[:, None],
        seq_lens_b=seq_lens_b,
        query_start_b1=query_start_b1,
        seq_lens_cpu_b=seq_lens_b,
        query_start_cpu_b1=query_start_b1,
        max_visible=max(lengths),
        num_decodes=decodes,
        longest=MAX_LEN,
        max_gathered_keys=20,
    )
    return batch, torch.cat(positions)
