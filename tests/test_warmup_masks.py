"""Whatever prefill is attended to under a mask, the kernels that select for it are compiled before a server is up."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsv32_plugin.core.planner import Planner
from dsv32_plugin.core.plans import Masked
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import Step
from dsv32_plugin.core.warmup import MadeUp
from dsv32_plugin.kernels.ops.select_topk.triton import choose

TOPK, MOST, PROCESSORS = 2048, 8192, 132


@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_every_selection_of_a_mask_is_met(heads: int) -> None:
    made_up = MadeUp(1 << 17, TOPK, torch.device("cpu"))
    met = {found for step in made_up.batches(MOST, 0, 1) if (found := selection(step, heads))}
    assert met
    for tokens in (1024, 2048, 4096, MOST):
        for length in (*range(TOPK + 1, 1 << 14, 500), *range(1 << 14, (1 << 16) + 1, 2000)):
            if tokens <= length:
                assert selection(made_up.prefill(tokens, length, 1), heads) in {None, *met}, f"{tokens} of {length}"


def selection(step: Step, heads: int) -> object:
    """How a mask's selection is compiled, None without a mask."""
    if not isinstance(Planner(TOPK, heads, Policy()).plan(step, torch.uint8, torch.bfloat16), Masked):
        return None
    return choose(step.slots_t.shape[0], step.prefill_chunks[0].total_keys, TOPK, PROCESSORS)
