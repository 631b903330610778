"""What stands in for SGLang's kernels of speculative decoding without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch

from dsv32_plugin.sglang_adapter.cpu import speculation

pytestmark = pytest.mark.engine

VOCAB = 10


@pytest.fixture
def req_to_token() -> torch.Tensor:
    """Position p of request r lies in slot 100 * r + p."""
    return torch.arange(4, dtype=torch.int32)[:, None] * 100 + torch.arange(50, dtype=torch.int32)


def test_slots_of_drafts(req_to_token: torch.Tensor) -> None:
    out = torch.empty(6, dtype=torch.int64)
    requests, lengths = torch.tensor([3, 1]), torch.tensor([7, 20])
    speculation.AssignDraftCacheLocs[(2,)](requests, req_to_token, lengths, out, 50, 1, 3)
    assert out.tolist() == [307, 308, 309, 120, 121, 122]


def test_slots_of_a_range(req_to_token: torch.Tensor) -> None:
    requests, start, end = torch.tensor([3, 0, 1]), torch.tensor([7, 5, 20]), torch.tensor([9, 5, 23])
    slots = speculation.assign_extend_cache_locs_func(requests, req_to_token, start, end, 3, 2, "cpu")
    assert slots.tolist() == [307, 308, 120, 121, 122]
    assert slots.dtype == torch.int64
    speculation.assign_req_to_token_pool_func(requests, req_to_token, start, end, slots + 5, 3)
    assert req_to_token[3, 6:10].tolist() == [306, 312, 313, 309]
    assert req_to_token[1, 19:24].tolist() == [119, 125, 126, 127, 123]


def test_a_chain_of_drafts() -> None:
    mask, positions, rows, following, sibling, tokens = speculation.build_tree_kernel_efficient(
        torch.tensor([5, 6]), None, torch.empty(0), torch.tensor([[7, 8], [1, 2]]), torch.tensor([10, 3]), 13, 1, 2, 3
    )
    assert mask is None
    assert positions.tolist() == [10, 11, 12, 3, 4, 5]
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert following.tolist() == [[1, 2, -1]] * 2
    assert sibling.tolist() == [[-1] * 3] * 2
    assert tokens.tolist() == [5, 7, 8, 6, 1, 2]


def sample(tokens_bn: list[list[int]], logits_tv: torch.Tensor, **sampling: Any) -> list[Any]:
    info = dict.fromkeys(("acc_additive_penalties", "acc_scaling_penalties", "logit_bias"))
    count = len(tokens_bn[0])
    chosen, held, rows = speculation.eagle_sample(
        SimpleNamespace(draft_token_num=count, draft_token=torch.tensor(tokens_bn).flatten()),
        SimpleNamespace(sampling_info=SimpleNamespace(**{**info, "is_all_greedy": True, **sampling})),
        SimpleNamespace(next_token_logits=logits_tv),
    )
    assert {chosen.dtype, held.dtype, rows.dtype} == {torch.int32}
    return [chosen.tolist(), held.tolist(), rows.tolist()]


def logits_of(tokens: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float() * 4


@pytest.mark.parametrize(
    ("drafts", "chosen", "held"),
    [
        ([7, 8], [7, 8, 9], 3),
        ([7, 8], [7, 1, 9], 2),
        # What follows a wrong draft counts for nothing, right as it may be.
        ([7, 8], [1, 8, 9], 1),
    ],
    ids=["both", "one", "none"],
)
def test_drafts_are_accepted_up_to_the_first_wrong_one(drafts: list[int], chosen: list[int], held: int) -> None:
    found = sample([[5, *drafts], [5, 2, 3]], logits_of([*chosen, 2, 3, 4]))
    assert found[0] == [*chosen, 2, 3, 4]
    assert found[1] == [held, 3]
    assert found[2] == [[0, 1, 2][:held] + [-1] * (3 - held), [3, 4, 5]]
    bonus = torch.empty(2, dtype=torch.int32)
    accepted = torch.tensor(found[0])[torch.tensor(found[2])]
    speculation.FillBonusTokens[(2,)](accepted, torch.tensor(found[1]), bonus, 3)
    assert bonus.tolist() == [chosen[held - 1], 4]


def test_penalties_count_for_every_token_of_a_sequence() -> None:
    bias = torch.zeros(2, VOCAB)
    bias[1, 3] = 10
    assert sample([[5, 7], [5, 3]], logits_of([7, 8, 1, 2]), logit_bias=bias)[:2] == [[7, 8, 3, 3], [2, 2]]


def test_sampled_tokens_follow_the_models_distribution() -> None:
    """Token after token, whether the draft was right or not: 4000 sequences, within 4 standard deviations."""
    torch.manual_seed(0)
    count, likely = 4000, 0.7
    logits = torch.full((2 * count, VOCAB), -torch.inf)
    logits[:, 3], logits[:, 4] = torch.tensor([likely, 1 - likely]).log()
    sampling = {
        "is_all_greedy": False,
        "temperatures": torch.ones(count, 1),
        "top_ks": torch.full((count,), VOCAB),
        "top_ps": torch.ones(count),
        "min_ps": torch.zeros(count),
        "need_min_p_sampling": False,
    }
    chosen, held, _ = sample([[5, 3]] * count, logits, **sampling)
    first = torch.tensor(chosen).view(-1, 2)[:, 0]
    assert torch.equal(torch.tensor(held), (first == 3).int() + 1)
    margin = 4 * (likely * (1 - likely) / count) ** 0.5
    assert ((first == 3).float().mean() - likely).abs() < margin
