"""How a step is described: against each token looked at by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv32_plugin import kernels
from dsv32_plugin.core import planner, plans
from dsv32_plugin.core.layers import Ranks
from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.plans import Dense, Expanded, Masked, Parts, Sparse, Staged
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import Step, mixed_batch, uniform_decodes
from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.formulas import from_mask
from dsv32_plugin.kernels.limits import mask_words

PAGE, DIM, HEADS, TOPK = 16, 32, 8, 12


def describe(lengths: list[int], queries: list[int], num_decodes: int, padding: int = 0, **options: int) -> Step:
    """Sequences of these lengths, the last `queries` tokens of each being scheduled, behind them tokens of padding."""
    num_tokens = sum(queries) + padding
    query_start_b1 = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    seq_lens_b = torch.tensor(lengths, dtype=torch.int32)
    return mixed_batch(
        slots_t=torch.full((num_tokens,), -1),
        block_table_bp=table(len(lengths)),
        seq_lens_b=seq_lens_b,
        query_start_b1=query_start_b1,
        seq_lens_cpu_b=seq_lens_b,
        query_start_cpu_b1=query_start_b1,
        max_visible=max(lengths),
        num_decodes=num_decodes,
        longest=64,
        **options,
    )


def table(num_seqs: int) -> torch.Tensor:
    return torch.arange(num_seqs * 4, dtype=torch.int32).flip(0).view(num_seqs, 4)


def inputs(num_tokens: int, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    index_cache = torch.randn(num_seqs * 4, PAGE, DIM, generator=generator)
    q_tid = torch.randn(num_tokens, HEADS, DIM, generator=generator)
    return q_tid, torch.randn(num_tokens, HEADS, generator=generator), index_cache


def selected(batch: Step, ranks: Ranks | None = None) -> torch.Tensor:
    num_tokens = batch.slots_t.shape[0]
    q_tid, weights_ti, index_cache = inputs(num_tokens, batch.block_table_bp.shape[0])
    slots_tk = torch.full((num_tokens, TOPK), -9, dtype=torch.int32)
    Sparse(batch, Policy()).select(q_tid, weights_ti, index_cache, slots_tk, ranks)
    return slots_tk


def alone(batch: Step) -> torch.Tensor:
    """Each token scored by itself."""
    q_tid, weights_ti, index_cache = inputs(batch.slots_t.shape[0], batch.block_table_bp.shape[0])
    rows = [
        kernels.index_topk_paged(
            q_tid[t][None, None],
            weights_ti[t][None, None],
            index_cache,
            batch.block_table_bp[int(batch.seq_t[t])][None],
            batch.visible_t[t].view(1, 1),
            TOPK,
            max_visible=64,
        )[0]
        for t in range(batch.slots_t.shape[0])
    ]
    return torch.cat(rows)


BATCHES = [
    pytest.param([9, 40, 64], [1, 1, 1], 3, id="decodes"),
    pytest.param([9, 40, 64], [3, 3, 3], 3, id="decodes-with-drafts"),
    pytest.param([9, 40, 64], [3, 1, 2], 3, id="some-without-drafts"),
    pytest.param([40, 60, 33, 5], [1, 1, 20, 5], 2, id="decodes-and-prefills"),
    pytest.param([40, 60, 33, 5], [2, 1, 20, 5], 2, id="drafts-and-prefills"),
    pytest.param([33, 5, 64, 1], [33, 5, 10, 1], 0, id="prefills"),
]
DECODES_LAST = [
    pytest.param([33, 5, 40, 60], [20, 5, 1, 1], 2, id="prefills-and-decodes"),
    pytest.param([33, 5, 40, 60, 50], [20, 5, 2, 2, 2], 3, id="prefills-and-drafts"),
    pytest.param([33, 5, 40, 60], [20, 5, 1, 2], 2, id="prefills-and-some-drafts"),
    pytest.param([9, 40, 64], [1, 1, 1], 3, id="decodes-alone"),
    pytest.param([33, 5, 64, 1], [33, 5, 10, 1], 0, id="no-decodes"),
]


@pytest.mark.parametrize(("lengths", "queries", "num_decodes"), BATCHES)
def test_every_token_sees_its_own_past(lengths: list[int], queries: list[int], num_decodes: int) -> None:
    batch = describe(lengths, queries, num_decodes, padding=3)
    seen = [length - count + 1 + i for length, count in zip(lengths, queries, strict=True) for i in range(count)]
    assert batch.visible_t.tolist() == [*seen, 0, 0, 0]
    assert batch.seq_t[:-3].tolist() == [seq for seq, count in enumerate(queries) for _ in range(count)]


@pytest.mark.parametrize("max_gathered_keys", [1, 70, 10**6])
@pytest.mark.parametrize(("lengths", "queries", "num_decodes"), BATCHES)
def test_the_selection_is_that_of_each_token_alone(
    lengths: list[int], queries: list[int], num_decodes: int, max_gathered_keys: int
) -> None:
    batch = describe(lengths, queries, num_decodes, max_gathered_keys=max_gathered_keys)
    assert torch.equal(selected(batch), alone(batch))


@pytest.mark.parametrize("max_gathered_keys", [1, 70, 10**6])
@pytest.mark.parametrize(("lengths", "queries", "num_decodes"), DECODES_LAST)
def test_decodes_may_come_last(
    lengths: list[int], queries: list[int], num_decodes: int, max_gathered_keys: int
) -> None:
    batch = describe(lengths, queries, num_decodes, decodes_last=True, max_gathered_keys=max_gathered_keys)
    decoding = sum(queries[len(queries) - num_decodes :])
    assert (batch.decodes.visible_bn.numel() if batch.decodes else 0) == decoding
    assert sum(chunk.tokens.stop - chunk.tokens.start for chunk in batch.prefill_chunks) == sum(queries) - decoding
    assert torch.equal(selected(batch), alone(batch))


@pytest.mark.parametrize(("lengths", "queries", "num_decodes"), BATCHES)
def test_what_tokens_see_is_summed(lengths: list[int], queries: list[int], num_decodes: int) -> None:
    for chunk in describe(lengths, queries, num_decodes).prefill_chunks:
        visible = chunk.end_t - chunk.start_t
        for most in (1, 12, 33, 100):
            assert chunk.seen(most) == int(visible.clamp(max=most).sum())


def latents_fp8(num_seqs: int) -> torch.Tensor:
    """Every code finite and every scale a power of two."""
    generator = torch.Generator().manual_seed(1)
    cache = torch.zeros(num_seqs * 4, PAGE, layout.LATENT_BYTES_FP8, dtype=torch.uint8)
    values = torch.randn(num_seqs * 4, PAGE, layout.LATENT_RANK, generator=generator)
    cache[..., : layout.LATENT_RANK] = values.to(torch.float8_e4m3fn).view(torch.uint8)
    scales = cache[..., layout.LATENT_SCALES_OFFSET : layout.LATENT_ROPE_OFFSET].view(torch.float32)
    scales.copy_(2.0 ** torch.randint(-3, 3, scales.shape, generator=generator))
    cache[..., layout.LATENT_ROPE_OFFSET :].view(torch.bfloat16).normal_(generator=generator)
    return cache


@pytest.mark.parametrize("max_gathered_keys", [1, 70, 10**6])
@pytest.mark.parametrize(("lengths", "queries", "num_decodes"), BATCHES)
def test_a_copy_of_the_latents_changes_no_answer(
    lengths: list[int], queries: list[int], num_decodes: int, max_gathered_keys: int
) -> None:
    batch = describe(lengths, queries, num_decodes, max_gathered_keys=max_gathered_keys)
    num_tokens, num_seqs = sum(queries), len(lengths)
    q_tid, weights_ti, index_cache = inputs(num_tokens, num_seqs)
    generator = torch.Generator().manual_seed(2)
    q_latent_thc = torch.randn(num_tokens, 3, layout.LATENT_RANK, generator=generator)
    q_rope_thr = torch.randn(num_tokens, 3, layout.ROPE_DIM, generator=generator)
    latent_cache = latents_fp8(num_seqs)
    for seq, length in enumerate(lengths):  # what no token has written
        pages = latent_cache[batch.block_table_bp[seq].long()].flatten(0, 1)
        pages[length:] = 0xFF
        latent_cache[batch.block_table_bp[seq].long()] = pages.view(4, PAGE, -1)

    def attended(plan: Sparse) -> torch.Tensor:
        slots_tk = torch.full((num_tokens, TOPK), -9, dtype=torch.int32)
        plan.select(q_tid, weights_ti, index_cache, slots_tk)
        return plan.over_latents(q_latent_thc, q_rope_thr, latent_cache, slots_tk, 0.1)

    assert attended(Sparse(batch, Policy())).isfinite().all()
    assert torch.equal(attended(Staged(batch, Policy())), attended(Sparse(batch, Policy())))


def positions(batch: Step, plan: Sparse | Parts, ranks: Ranks | None = None) -> list[list[int]]:
    """What each token of the batch selects, whichever way a plan keeps it."""
    num_tokens = batch.slots_t.shape[0]
    q_tid, weights_ti, index_cache = inputs(num_tokens, batch.block_table_bp.shape[0])
    slots_tk = torch.full((num_tokens, TOPK), -9, dtype=torch.int32)
    plan.select(q_tid, weights_ti, index_cache, slots_tk, ranks)
    found: list[list[int]] = [[] for _ in range(num_tokens)]
    for rows, part in plan.parts if isinstance(plan, Parts) else [(slice(0, num_tokens), plan)]:
        chunks = part.step.prefill_chunks if isinstance(part, Masked) else ()
        for chunk in chunks:
            for t in range(chunk.tokens.start, chunk.tokens.stop):
                bits = from_mask(slots_tk[rows][t, : mask_words(chunk.total_keys)][None])[0]
                found[rows.start + t] = (bits.nonzero().squeeze(1) - chunk.start_t[t - chunk.tokens.start]).tolist()
        if not chunks:
            for t in range(rows.start, rows.stop):
                pages = batch.block_table_bp[int(batch.seq_t[t])].tolist()
                slots = [slot for slot in slots_tk[t].tolist() if slot >= 0]
                found[t] = [pages.index(slot // PAGE) * PAGE + slot % PAGE for slot in slots]
    return found


@pytest.mark.parametrize("max_gathered_keys", [1, 70, 10**6])
@pytest.mark.parametrize(("lengths", "queries", "num_decodes"), [*BATCHES, *DECODES_LAST])
def test_a_mask_selects_the_same(
    lengths: list[int],
    queries: list[int],
    num_decodes: int,
    max_gathered_keys: int,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    last = any(f"-{case.id}]" in request.node.name for case in DECODES_LAST)
    options = {"decodes_last": last, "max_gathered_keys": max_gathered_keys}
    batch = describe(lengths, queries, num_decodes, **options)
    monkeypatch.setattr(planner, "masked_pays", lambda heads, tokens, *sizes: tokens > 4)
    made = Planner(TOPK, 1, Policy()).plan(batch, torch.float32, torch.bfloat16)
    assert isinstance(made, Masked | Parts) == any(c.tokens.stop - c.tokens.start > 4 for c in batch.prefill_chunks)
    assert isinstance(made, Sparse | Parts)
    assert positions(batch, made) == positions(batch, Sparse(batch, Policy()))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_masks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LEAST_SHARED_TOKENS", 8)
    batch = describe([33, 5, 64], [33, 5, 10], 0)
    plan = Masked(batch, Policy())
    parts: list[torch.Tensor] = []
    for rank in range(size):

        def keep(part_tk: torch.Tensor) -> torch.Tensor:
            parts.append(part_tk.clone())
            return part_tk.repeat(size, 1)

        positions(batch, plan, Ranks(rank, size, keep))
    assert parts[0].shape[1] == mask_words(102), "a mask is shorter than a list"
    assert positions(batch, plan, Ranks(0, size, lambda part_tk: torch.cat(parts))) == positions(batch, plan)


@pytest.mark.parametrize(
    ("tokens", "length", "heads", "pays"),
    [
        pytest.param(4096, 24576, 8, True, id="a-rank-of-sixteen"),
        pytest.param(4096, 49152, 8, False, id="too-long-for-few-heads"),
        pytest.param(4096, 12288, 16, True, id="a-rank-of-eight"),
        pytest.param(4096, 24576, 16, False, id="too-long-for-a-rank-of-eight"),
        pytest.param(4096, 6144, 64, True, id="half-of-the-heads"),
        pytest.param(4096, 12288, 64, False, id="too-long-for-half-of-the-heads"),
        pytest.param(4096, 8192, 128, True, id="all-heads"),
        pytest.param(512, 4096, 128, False, id="too-few-tokens-for-what-is-expanded"),
        pytest.param(512, 12288, 8, False, id="too-few-tokens-to-fill-a-chip"),
        pytest.param(16384, 65537, 1, False, id="more-keys-than-a-row-has-bits"),
    ],
)
def test_a_mask_is_taken_where_it_pays(tokens: int, length: int, heads: int, pays: bool) -> None:
    batch = describe([length], [tokens], 0)

    def masks(*, batch_invariant: bool = False, dtype: torch.dtype = torch.bfloat16) -> bool:
        made = Planner(2048, heads, Policy(batch_invariant)).plan(batch, torch.uint8, dtype)
        assert made.selects
        return isinstance(made, Masked)

    assert masks() == pays
    assert not masks(batch_invariant=True)
    assert not masks(dtype=torch.float32), "was not measured"


@pytest.mark.parametrize(("wanted", "length", "masked"), [(True, 384, True), (True, 385, False), (False, 384, False)])
def test_the_user_may_want_a_mask_wherever_it_fits(wanted: bool, length: int, masked: bool) -> None:
    planner_ = Planner(TOPK, 1, Policy(masked_prefill=wanted))
    made = planner_.plan(describe([length], [30], 0), torch.float32, torch.float32)
    assert isinstance(made, Masked) == masked


@pytest.mark.parametrize(
    ("tokens", "length", "heads", "pays"),
    [
        pytest.param(256, 32768, 128, True, id="all-heads"),
        pytest.param(255, 32768, 128, False, id="too-few-tokens-to-fill-a-chip"),
        pytest.param(512, 32768, 16, True, id="a-rank-of-eight"),
        pytest.param(511, 32768, 16, False, id="too-few-heads-and-tokens-for-the-keys"),
        pytest.param(4096, 1 << 19, 128, False, id="too-many-keys-to-copy"),
    ],
)
def test_latents_are_copied_where_it_pays(tokens: int, length: int, heads: int, pays: bool) -> None:
    batch = describe([length], [tokens], 0)

    def stages(latents: torch.dtype, dtype: torch.dtype, *, batch_invariant: bool = False) -> bool:
        made = Planner(TOPK, heads, Policy(batch_invariant)).plan(batch, latents, dtype)
        assert made.selects
        return isinstance(made, Staged)

    assert stages(torch.uint8, torch.bfloat16) == pays
    assert not stages(torch.bfloat16, torch.bfloat16)
    assert not stages(torch.uint8, torch.float32)
    assert not stages(torch.uint8, torch.bfloat16, batch_invariant=True)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_the_policy_says_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch, batch_invariant: bool) -> None:
    """The kernels read the environment by themselves, whatever the policy of a model was."""
    said = []
    for name in ("sparse_mla", "dense_mla"):
        attend = getattr(kernels, name)

        def listen(*inputs: Any, attend: Any = attend, batch_invariant: bool, **options: Any) -> Any:
            said.append(batch_invariant)
            return attend(*inputs, batch_invariant=batch_invariant, **options)

        monkeypatch.setattr(kernels, name, listen)
    for lengths in ([40], [9]):
        batch = describe(lengths, lengths, 0)
        made = Planner(TOPK, 1, Policy(batch_invariant)).plan(batch, torch.float32, torch.float32)
        q_latent_thc = torch.zeros(lengths[0], 1, layout.LATENT_RANK)
        q_rope_thr = torch.zeros(lengths[0], 1, layout.ROPE_DIM)
        slots_tk = torch.zeros(lengths[0], 1, dtype=torch.int32)
        made.over_latents(q_latent_thc, q_rope_thr, latents_fp8(1), slots_tk, 0.1)
    assert said == [batch_invariant] * 2


def test_a_step_is_planned_once() -> None:
    planner, first, second = Planner(TOPK, 1, Policy()), describe([40], [40], 0), describe([9], [9], 0)
    made = planner.plan(first, torch.float32, torch.float32)
    assert planner.plan(first, torch.float32, torch.float32) is made
    assert not planner.plan(second, torch.float32, torch.float32).selects
    assert planner.plan(first, torch.float32, torch.float32) is not made


def test_expanding_pays_by_pairs_and_not_batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = describe([9, 12], [9, 12], 0)
    pairs = 9 * 9 + 12 * 12
    for heads, policy, kind in ((2, Policy(), Expanded), (1, Policy(), Dense), (2, Policy(True), Dense)):
        monkeypatch.setattr(planner, "EXPANDED_PAIRS", 2 * pairs)
        assert type(Planner(TOPK, heads, policy).plan(batch, torch.float32, torch.float32)) is kind


def test_a_uniform_batch_says_the_same_and_padding_sees_nothing() -> None:
    mixed = describe([9, 40, 64], [3, 3, 3], 3)
    visible_t = torch.tensor([*mixed.visible_t.tolist(), 0, 0, 0], dtype=torch.int32)
    uniform = uniform_decodes(
        slots_t=torch.full((12,), -1),
        block_table_bp=torch.cat([table(3), torch.zeros(1, 4, dtype=torch.int32)]),
        seq_t=torch.arange(12, dtype=torch.int32) // 3,
        visible_t=visible_t,
        max_visible=64,
        queries=3,
        longest=64,
    )
    q_tid, weights_ti, index_cache = inputs(12, 3)
    slots_tk = torch.full((12, TOPK), -9, dtype=torch.int32)
    Sparse(uniform, Policy()).select(q_tid, weights_ti, index_cache, slots_tk)
    expected_tk = torch.full((9, TOPK), -9, dtype=torch.int32)
    Sparse(mixed, Policy()).select(q_tid[:9], weights_ti[:9], index_cache, expected_tk)
    assert torch.equal(slots_tk[:9], expected_tk)
    assert (slots_tk[9:] == -1).all()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_that_share_a_prefill_select_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LEAST_SHARED_TOKENS", 8)
    batch = describe([40, 33, 5, 64], [1, 33, 5, 10], 1)
    parts: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(size)}
    for rank in range(size):  # each rank's share, without the others'

        def keep(part_tk: torch.Tensor, rank: int = rank) -> torch.Tensor:
            parts[rank].append(part_tk.clone())
            return part_tk.repeat(size, 1)

        selected(batch, Ranks(rank, size, keep))
    gathers = iter([torch.cat(same_call) for same_call in zip(*parts.values(), strict=True)])
    assert torch.equal(selected(batch, Ranks(0, size, lambda part_tk: next(gathers))), selected(batch))
