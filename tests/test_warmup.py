"""The batches of the warm-up launch every variant of the kernels that a server's batches do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from dsv32_plugin.core.step import Step, mixed_batch
from dsv32_plugin.core.warmup import MadeUp
from dsv32_plugin.kernels.ops.index_topk import api, common
from dsv32_plugin.kernels.ops.select_topk import triton as select_topk

NUM_SMS = 132
TOPK, MOST = 64, 2048
MAX_LENS = (4352, 16384, 40000)
META = torch.device("meta")


def selections(batch: Step) -> set[select_topk.Config]:
    """How the prefills of a batch are selected."""
    found = set()
    for chunk in batch.prefill_chunks if batch.max_visible > TOPK else ():
        tokens = chunk.tokens.stop - chunk.tokens.start
        one_t = torch.empty(tokens, device=META)
        common.index_topk_ragged(
            lambda *_, **__: None,
            lambda logits_ts, *_: found.add(select_topk.choose(*logits_ts.shape, TOPK, NUM_SMS)),
            torch.empty(tokens, 1, 1, device=META),
            one_t,
            torch.empty(chunk.total_keys, 1, device=META),
            None,
            one_t,
            one_t,
            TOPK,
            workspace_bytes=api.WORKSPACE_BYTES,
        )
    return found


@pytest.fixture(scope="module")
def warm() -> dict[int, set[select_topk.Config]]:
    made_up = {max_len: MadeUp(max_len, TOPK, torch.device("cpu")) for max_len in MAX_LENS}
    return {
        max_len: set().union(*(selections(batch) for batch in of.batches(MOST, 64, 1)))
        for max_len, of in made_up.items()
    }


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(MAX_LENS), st.data())
def test_no_step_selects_in_a_way_of_its_own(
    warm: dict[int, set[select_topk.Config]], max_len: int, data: st.DataObject
) -> None:
    """With prefix hits a step may have many long sequences, and few tokens of each."""
    share = data.draw(st.sampled_from([1, 2, 8, 64, 512, MOST]), label="most tokens of a sequence")
    fresh = data.draw(st.lists(st.integers(1, share), min_size=1, max_size=min(100, MOST // share)), label="tokens")
    cached = data.draw(
        st.lists(st.integers(0, max_len), min_size=len(fresh), max_size=len(fresh)), label="cached tokens"
    )
    lengths = torch.tensor([min(n + c, max_len) for n, c in zip(fresh, cached, strict=True)], dtype=torch.int32)
    starts = torch.tensor([0, *torch.tensor(fresh).clamp(max=max_len).cumsum(0).tolist()], dtype=torch.int32)
    step = mixed_batch(
        slots_t=torch.zeros(int(starts[-1]), dtype=torch.int64),
        block_table_bp=torch.zeros(len(fresh), 1, dtype=torch.int32),
        seq_lens_b=lengths,
        query_start_b1=starts,
        seq_lens_cpu_b=lengths,
        query_start_cpu_b1=starts,
        max_visible=int(lengths.max()),
        num_decodes=0,
    )
    assert selections(step) <= warm[max_len]


@given(st.integers(0, 20000), st.integers(1, 5000))
def test_parts_of_a_step_are_alike(tokens: int, rows: int) -> None:
    """None is so short that it would be selected as a small step is."""
    parts = common.parts_of(tokens, rows)
    assert [token for part in parts for token in range(part.start, part.stop)] == list(range(tokens))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes, default=0) <= rows
    assert not sizes or max(sizes) - min(sizes) < 2 * common.ROWS
    assert all(part.start % common.ROWS == 0 for part in parts) or rows < common.ROWS
