"""Parts of the SGLang adapter that need no server: pages without a GPU, packed matrices, start-up options."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from dsv32_plugin import settings
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.sglang_adapter import arguments, caches, engine_config, upstream, warmup
from dsv32_plugin.sglang_adapter.arguments import in_effect
from dsv32_plugin.sglang_adapter.backend import DraftSteps, DsaBackend
from dsv32_plugin.sglang_adapter.cpu import platform
from dsv32_plugin.sglang_adapter.cpu.pages import CpuPagedAllocator
from dsv32_plugin.sglang_adapter.layers import PackedLinear
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME

pytestmark = pytest.mark.engine

PAGE = 16


def make_allocator(pages: int) -> CpuPagedAllocator:
    return CpuPagedAllocator(pages * PAGE, PAGE, torch.float32, "cpu", kvcache=None, need_sort=False)


@pytest.mark.parametrize("lengths", [[(0, 1)], [(0, 16), (16, 17)], [(5, 40), (0, 33), (31, 32), (16, 48)]], ids=str)
def test_slots_are_those_of_sglang(lengths: list[tuple[int, int]]) -> None:
    """Against SGLang's own plain version of its kernel."""
    prefix, length = (torch.tensor(column) for column in zip(*lengths, strict=True))
    # What a sequence already has lies in pages from 100 on.
    last = torch.tensor([(100 + i) * PAGE + (p - 1) % PAGE if p else -1 for i, (p, _) in enumerate(lengths)])
    allocator = make_allocator(64)
    expected = torch.empty(int((length - prefix).sum()), dtype=torch.int64)
    alloc_extend_naive(prefix, length, last, allocator.free_pages, expected, PAGE, "cpu")
    before = set(allocator.free_pages.tolist())
    slots = allocator.alloc_extend(prefix, prefix, length, length, last, len(expected))
    assert torch.equal(slots, expected)
    taken = before - set(allocator.free_pages.tolist())
    assert taken == set((slots // PAGE).tolist()) & before


def test_decodes_open_a_page_when_theirs_is_full() -> None:
    allocator = make_allocator(4)
    lengths = torch.tensor([17, 20])
    slots = allocator.alloc_decode(lengths, lengths, torch.tensor([7 * PAGE + 15, 9 * PAGE + 2]))
    assert slots.tolist() == [1 * PAGE, 9 * PAGE + 3]
    assert allocator.free_pages.tolist() == [2, 3, 4]


def test_too_few_pages_take_none() -> None:
    allocator = make_allocator(2)
    zero, length = torch.tensor([0]), torch.tensor([33])
    assert allocator.alloc_extend(zero, zero, length, length, torch.tensor([-1]), 33) is None
    assert len(allocator.free_pages) == 2


@pytest.fixture
def backend() -> Any:
    """Three requests of 1, 16 and 40 tokens, in pages 5, 6 and 7 to 9."""
    made: Any = object.__new__(DsaBackend)
    made.page_size, made.max_context_len, made.topk, made.on_cpu, made.drafted = PAGE, 64, 8, True, 3
    made.policy = Policy()
    req_to_token = torch.zeros(4, 70, dtype=torch.int32)
    for row, length, first in ((1, 1, 5), (2, 16, 6), (3, 40, 7)):
        req_to_token[row, :length] = first * PAGE + torch.arange(length)
    made.req_to_token_pool = SimpleNamespace(req_to_token=req_to_token)
    return made


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_a_decode_step(backend: Any, in_graph: bool) -> None:
    lengths = torch.tensor([16, 40, 1])
    step = SimpleNamespace(
        batch_size=3,
        req_pool_indices=torch.tensor([2, 3, 1]),
        seq_lens=lengths,
        seq_lens_cpu=None if in_graph else lengths,
        out_cache_loc=torch.tensor([6 * PAGE + 15, 9 * PAGE + 7, 5 * PAGE]),
        forward_mode=ForwardMode.DECODE,
    )
    (backend.init_forward_metadata_in_graph if in_graph else backend.init_forward_metadata)(step)
    batch = backend.forward_metadata
    assert batch.block_table_bp.tolist() == [[6, 0, 0, 0], [7, 8, 9, 0], [5, 0, 0, 0]], "as wide as the longest context"
    assert batch.visible_t.tolist() == [16, 40, 1]
    assert batch.slots_t.tolist() == step.out_cache_loc.tolist()
    assert batch.max_visible == (64 if in_graph else 40)
    assert batch.decodes is not None
    assert not batch.prefill_chunks


def test_a_mixed_step(backend: Any) -> None:
    """Decodes come after the prefills, as extensions by one token."""
    step = SimpleNamespace(
        batch_size=3,
        req_pool_indices=torch.tensor([3, 2, 1]),
        seq_lens=torch.tensor([40, 16, 1]),
        seq_lens_cpu=torch.tensor([40, 16, 1]),
        extend_num_tokens=10,
        extend_seq_lens=torch.tensor([8, 1, 1], dtype=torch.int32),
        extend_seq_lens_cpu=[8, 1, 1],
        out_cache_loc=torch.arange(10),
        forward_mode=ForwardMode.MIXED,
    )
    backend.init_forward_metadata(step)
    batch = backend.forward_metadata
    assert batch.visible_t.tolist() == [*range(33, 41), 16, 1]
    assert batch.seq_t.tolist() == [0] * 8 + [1, 2]
    assert batch.decodes is not None
    assert batch.decodes.tokens == slice(8, 10)
    assert batch.decodes.table_bp.tolist() == [[6, 0, 0, 0], [5, 0, 0, 0]]
    assert batch.decodes.visible_bn.tolist() == [[16], [1]]
    assert [chunk.tokens for chunk in batch.prefill_chunks] == [slice(0, 8)]


def test_padding_behind_a_prefill_is_no_token(backend: Any) -> None:
    """SGLang counts it among the tokens of the extension, and gives it slots."""
    step = SimpleNamespace(
        batch_size=1,
        req_pool_indices=torch.tensor([3]),
        seq_lens=torch.tensor([40]),
        seq_lens_cpu=torch.tensor([40]),
        extend_num_tokens=10,
        extend_seq_lens=torch.tensor([8], dtype=torch.int32),
        extend_seq_lens_cpu=[8],
        out_cache_loc=torch.arange(10),
        forward_mode=ForwardMode.EXTEND,
    )
    backend.init_forward_metadata(step)
    assert backend.forward_metadata.slots_t.tolist() == list(range(8))
    assert backend.forward_metadata.visible_t.tolist() == list(range(33, 41))


def test_an_idle_step_leaves_nothing_of_the_step_before(backend: Any) -> None:
    backend.init_forward_metadata(eagle_step(ForwardMode.DECODE, [10, 37], tokens=2))
    backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE))
    assert backend.forward_metadata is None


@pytest.mark.parametrize(("enabled", "served"), [(True, True), (True, False), (False, True)])
def test_determinism_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch, enabled: bool, served: bool) -> None:
    monkeypatch.setattr(engine_config, "serves", lambda args: served)
    args: Any = SimpleNamespace(enable_deterministic_inference=enabled, attention_backend="dsv32")
    seen = []
    with patch.dict(os.environ):
        engine_config.adjust_for_determinism(lambda args: seen.append(in_effect(args).attention_backend), args)
        assert settings.batch_invariant() is (enabled and served)
    assert seen == ["triton" if enabled and served else "dsv32"]
    assert in_effect(args).attention_backend == "dsv32"


def eagle_step(mode: ForwardMode, lengths: list[int], tokens: int) -> Any:
    """Requests 2 and 3, with `tokens` new ones in all."""
    return SimpleNamespace(
        batch_size=2,
        req_pool_indices=torch.tensor([2, 3]),
        seq_lens=torch.tensor(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        out_cache_loc=torch.arange(tokens),
        forward_mode=mode,
    )


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("mode", "lengths"),
    # SGLang's lengths are those before a verdict, and those after what the draft model reads of it.
    [(ForwardMode.TARGET_VERIFY, [10, 37]), (ForwardMode.DRAFT_EXTEND_V2, [13, 40])],
    ids=["verify", "draft-extend"],
)
def test_a_verdict(backend: Any, mode: ForwardMode, lengths: list[int], in_graph: bool) -> None:
    """The three tokens of a sequence share one read of its keys."""
    step = eagle_step(mode, lengths, tokens=6)
    (backend.init_forward_metadata_in_graph if in_graph else backend.init_forward_metadata)(step)
    batch = backend.forward_metadata
    assert batch.visible_t.tolist() == [11, 12, 13, 38, 39, 40]
    assert batch.seq_t.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.decodes.visible_bn.shape == (2, 3)
    assert batch.block_table_bp[:, :3].tolist() == [[6, 0, 0], [7, 8, 9]]
    assert batch.max_visible == (64 if in_graph else 40)


def test_padding_shorter_than_its_tokens_sees_nothing(backend: Any) -> None:
    backend.init_forward_metadata_in_graph(eagle_step(ForwardMode.DRAFT_EXTEND_V2, [1, 2], tokens=6))
    assert backend.forward_metadata.visible_t.tolist() == [0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_the_draft_models_own_steps(backend: Any, in_graph: bool) -> None:
    """Slots come for all steps at once, sequence after sequence, those of the last step unused."""
    steps: Any = object.__new__(DraftSteps)
    steps.num_drafts, steps.attn_backends = 3, [backend, copy.copy(backend)]
    step = eagle_step(ForwardMode.DECODE, [10, 37], tokens=6)
    (steps.init_forward_metadata_in_graph if in_graph else steps.init_forward_metadata)(step)
    batches = [made.forward_metadata for made in steps.attn_backends]
    assert [batch.slots_t.tolist() for batch in batches] == [[0, 3], [1, 4]]
    assert [batch.visible_t.tolist() for batch in batches] == [[11, 38], [12, 39]]
    assert [batch.max_visible for batch in batches] == ([64, 64] if in_graph else [38, 39])


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """q_a, an index key and kv_a of a block-fp8 checkpoint, the last of them half a block too high."""
    layer: Any = object.__new__(PackedLinear)
    torch.nn.Module.__init__(layer)
    layer.widths, layer.output_size = [256, 128, 192], 576
    layer.quant_config = SimpleNamespace(weight_block_size=[128, 128])
    return layer


@pytest.mark.parametrize("rows", [576, 5], ids=["matrix", "scales"])
def test_a_packed_matrix_holds_its_parts_in_order(packed: Any, rows: int) -> None:
    heights = packed.widths if rows == 576 else [2, 1, 2]
    parts = [torch.full((height, 3), float(index)) for index, height in enumerate(heights)]
    for order in itertools.permutations(range(3)):
        parameter = torch.nn.Parameter(torch.full((rows, 3), torch.nan))
        for index in order:
            packed.load_part(parameter, parts[index], index)
        assert torch.equal(parameter, torch.cat(parts))


def test_a_part_of_another_size_is_refused(packed: Any) -> None:
    with pytest.raises(ValueError, match=r"expected \(128, 3\)"):
        packed.load_part(torch.nn.Parameter(torch.zeros(576, 3)), torch.zeros(127, 3), 1)


@pytest.mark.parametrize(("chunk", "most"), [(8192, 8192), (-1, 40000), (None, 40000)])
def test_the_warm_up_reaches_the_longest_prefill(monkeypatch: pytest.MonkeyPatch, chunk: int | None, most: int) -> None:
    monkeypatch.setattr(warmup, "model_config", lambda options: SimpleNamespace(context_len=40000))
    chosen = SimpleNamespace(chunked_prefill_size=chunk, max_prefill_tokens=16384)
    assert warmup.most_tokens(chosen) == most


@pytest.mark.parametrize(("dtype", "needed"), [(torch.bfloat16, 132), (torch.float32, 4 * 128)], ids=str)
def test_sglang_makes_room_for_index_keys(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, needed: int) -> None:
    """As its pool configurator reckons: this many elements of the class's type, 128 values and a scale of 4 bytes."""
    monkeypatch.setattr(caches.DsaTokenToKVPool, "index_k_with_scale_buffer_dtype", torch.uint8)
    caches.announce_index_keys(dtype)
    elements = 128 + 128 // caches.DsaTokenToKVPool.quant_block_size * 4
    reckoned = elements * caches.DsaTokenToKVPool.index_k_with_scale_buffer_dtype.itemsize
    assert needed <= reckoned <= 1.05 * needed


@pytest.mark.skipif(upstream.reckons_fp8_latents(), reason="SGLang reckons them by itself")
@pytest.mark.parametrize(
    ("dtype", "latent_bytes"),
    [
        pytest.param(torch.float8_e4m3fn, layout.LATENT_BYTES_FP8, id="fp8"),
        pytest.param(torch.bfloat16, 2 * layout.LATENT_WIDTH, id="bfloat16"),
    ],
)
def test_sglang_makes_room_for_latents(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, latent_bytes: int) -> None:
    """By 576 bytes for the latents a server ran out of memory while it made its caches."""
    from sglang.srt.model_executor import pool_configurator

    sizes = {"kv_lora_rank": layout.LATENT_RANK, "qk_rope_head_dim": layout.ROPE_DIM}
    hf_config = SimpleNamespace(architectures=["DeepseekV32ForCausalLM"], index_topk=2048, index_head_dim=128)
    runner = SimpleNamespace(
        use_mla_backend=True, kv_cache_dtype=dtype, model_config=SimpleNamespace(hf_config=hf_config, **sizes)
    )
    monkeypatch.setattr(pool_configurator, "get_attention_tp_size", lambda: 1)
    monkeypatch.setattr(caches.DsaTokenToKVPool, "index_k_with_scale_buffer_dtype", torch.uint8)
    monkeypatch.setattr(pool_configurator, "DSATokenToKVPool", caches.DsaTokenToKVPool)
    monkeypatch.setattr(arguments, "of_process", lambda: None)
    monkeypatch.setattr(arguments, "attention_backends", lambda options: {BACKEND_NAME})
    configurator_class = pool_configurator.DefaultPoolConfigurator
    made = object.__new__(configurator_class)
    # Another test may have put our hook around it.
    original = inspect.unwrap(configurator_class._compute_cell_size)
    reckoned = caches.reckon_latents(original, made, runner, 3)
    assert reckoned == 3 * (latent_bytes + layout.INDEX_BYTES)
    monkeypatch.setattr(arguments, "attention_backends", lambda options: {"another"})
    assert caches.reckon_latents(lambda *given: 5, made, runner, 3) == 5


def test_a_pool_must_be_ours_and_hold_what_is_selected_from() -> None:
    """One layer selects, the other shares; from 0.5.18 on SGLang gives the latter no index keys."""
    made: Any = object.__new__(caches.DsaTokenToKVPool)
    made.start_layer = 4
    made._hold_index_keys([torch.zeros(3, 8), torch.zeros(0, 8)])
    assert caches.as_dsa_pool(made, [4]) is made
    with pytest.raises(RuntimeError, match=r"found none in layers \[5\]"):
        caches.as_dsa_pool(made, [4, 5])
    made.__class__ = type("Sharded", (caches.DsaTokenToKVPool,), {})
    with pytest.raises(RuntimeError, match="Sharded; an option chose another kind of cache"):
        caches.as_dsa_pool(made, [4])


def test_the_last_slot_of_a_sequence() -> None:
    req_to_token = torch.arange(12, dtype=torch.int32).view(3, 4) * 10
    last = platform.get_last_loc(req_to_token, torch.tensor([2, 0, 1]), torch.tensor([4, 0, 1]))
    assert last.tolist() == [110, -1, 40]


@pytest.mark.parametrize(("backend", "expected"), [("dsv32", False), ("torch_native", False), ("flashinfer", True)])
def test_who_runs_triton(backend: str, expected: bool) -> None:
    assert platform.support_triton_around(lambda name: name != "torch_native", backend) is expected


def test_a_share_of_rows_is_copied_both_ways() -> None:
    everyone, own = torch.zeros(5, 2), torch.arange(6.0).view(3, 2)
    platform.copy_share(everyone, own, 0, torch.tensor(2), torch.tensor(2), False)
    assert torch.equal(everyone, torch.cat([torch.zeros(2, 2), own[:2], torch.zeros(1, 2)]))
    back = torch.full((3, 2), torch.nan)
    platform.copy_share(back, everyone, 0, torch.tensor(2), torch.tensor(2), True)
    assert torch.equal(back[:2], own[:2])
    assert back[2].isnan().all(), "padding is not written"


def test_experts_of_other_ranks_add_nothing() -> None:
    """Two ranks add up to one that has every expert, which is the sum that a token asks for."""
    torch.manual_seed(0)
    x_th, weights_tk, w13_eih, w2_ehi = torch.randn(7, 8), torch.rand(7, 3), torch.randn(6, 10, 8), torch.randn(6, 8, 5)
    experts_tk = torch.stack([torch.randperm(6)[:3] for _ in range(7)])
    gate_tki, up_tki = torch.einsum("th,tkih->tki", x_th, w13_eih[experts_tk]).chunk(2, dim=-1)
    values_tkh = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate_tki) * up_tki, w2_ehi[experts_tk])
    expected_th = (values_tkh * weights_tk[..., None]).sum(1)
    total_th = torch.zeros(7, 8)
    for first in (0, 3):
        part: Any = SimpleNamespace(w13_weight=w13_eih[first:][:3], w2_weight=w2_ehi[first:][:3])
        own_tk = torch.where((experts_tk >= first) & (experts_tk < first + 3), experts_tk - first, -1)
        given = SimpleNamespace(hidden_states=x_th, topk_output=(weights_tk, own_tk, None))
        total_th += platform.run_experts(None, part, given).hidden_states
    assert torch.allclose(total_th, expected_th, atol=1e-5)


def test_a_stage_begins_with_a_layer_that_selects() -> None:
    from dsv32_plugin.core.config import ConfigError, DsaConfig
    from dsv32_plugin.sglang_adapter import guard
    from dsv32_plugin.tools.tiny import TinySpec

    config = DsaConfig.from_hf(TinySpec(index_topk_pattern="FSFS").config())
    options = SimpleNamespace(tp_size=1, ep_size=1, dp_size=1, enable_dp_attention=False, pp_size=2)
    guard.check_sizes(config, options)
    options.pp_size = 4
    with pytest.raises(ConfigError, match="layer 1 for stage 1, got 'shared'; choose another --pp-size"):
        guard.check_sizes(config, options)


@pytest.mark.parametrize(("ranks", "shares", "fits"), [(8, 1, True), (16, 1, False), (16, 8, True)])
def test_attention_is_cut_over_ranks_of_its_own(ranks: int, shares: int, fits: bool) -> None:
    """Eight heads."""
    from dsv32_plugin.core.config import ConfigError, DsaConfig
    from dsv32_plugin.sglang_adapter import guard
    from dsv32_plugin.tools.tiny import TinySpec

    config = DsaConfig.from_hf(TinySpec().config())
    options = SimpleNamespace(tp_size=ranks, ep_size=1, dp_size=shares, enable_dp_attention=shares > 1, pp_size=1)
    if fits:
        guard.check_sizes(config, options)
        return
    with pytest.raises(ConfigError, match="num_attention_heads"):
        guard.check_sizes(config, options)
