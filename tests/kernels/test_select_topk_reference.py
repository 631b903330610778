import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import oracles
from dsv32_plugin.kernels import (
    index_logits_paged,
    index_logits_ragged,
    index_mask_ragged,
    index_topk_paged,
    index_topk_ragged,
    select_mask,
    select_topk,
)


@pytest.mark.parametrize("ranges", cases.RANGES)
@pytest.mark.parametrize("kind", cases.SCORES)
def test_is_exact(kind, ranges):
    for width, topk in [(1, 1), (50, 64), (300, 40), (513, 512)]:
        inputs = cases.select_topk_inputs(kind, 15, width, topk, ranges=ranges, strided=True)
        cases.assert_topk_exact(select_topk(**inputs), **inputs)


@pytest.mark.parametrize("ranges", cases.RANGES)
@pytest.mark.parametrize("kind", cases.SCORES)
def test_a_mask_is_the_same_selection(kind, ranges):
    for width, topk in [(1, 1), (50, 64), (128, 40), (300, 40)]:
        inputs = cases.select_topk_inputs(kind, 9, width, topk, ranges=ranges, strided=True)
        assert_same(select_mask(**inputs), select_topk(**inputs), inputs["start_t"], width)


def assert_same(mask_tw, selected_tk, start_t, width):
    assert mask_tw.shape == (len(selected_tk), -(-width // 128) * 4)
    starts = [0] * len(selected_tk) if start_t is None else start_t.tolist()
    for words, row, start in zip(mask_tw.tolist(), selected_tk.tolist(), starts, strict=True):
        chosen = [key for key in range(32 * len(words)) if oracles.has_bit(words, key)]
        assert chosen == [start + position for position in row if position >= 0]


@pytest.mark.parametrize("kind", ["all_zero", "zero_plateau", "narrow_band", "two_values", "one_ulp_apart"])
def test_more_than_4096_equal_values_in_one_bin(kind):
    """A candidate buffer of 4096 entries lost keys (SGLang 36807), kept the first arrivals (35257); vLLM 51782."""
    inputs = cases.select_topk_inputs(kind, 3, 20_000, 2048)
    cases.assert_topk_exact(select_topk(**inputs), **inputs)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, cases.INF, -cases.INF, cases.NAN, 1e-45, 3.4e38, 1.0000001])


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.one_of(VALUES, st.floats(width=32)), min_size=1, max_size=40),
    start=st.integers(0, 40),
    length=st.integers(0, 40),
    topk=st.integers(1, 48),
)
def test_any_row(scores, start, length, topk):
    start = min(start, len(scores))
    inputs = {
        "logits_ts": torch.tensor([scores], dtype=torch.float32),
        "start_t": torch.tensor([start], dtype=torch.int32),
        "end_t": torch.tensor([min(start + length, len(scores))], dtype=torch.int32),
        "topk": topk,
    }
    cases.assert_topk_exact(select_topk(**inputs), **inputs)


@pytest.mark.parametrize(
    ("scores", "topk", "expected"),
    [
        pytest.param([1, 1, 1, 1], 2, [0, 1], id="lower_position_wins"),
        pytest.param([0.0, -0.0, 0.0], 2, [0, 1], id="zeros_are_equal"),
        pytest.param([-0.0, 0.0, -0.0], 1, [0], id="negative_zero_is_not_less"),
        pytest.param([cases.NAN, -1e38, -cases.INF], 2, [0, 1], id="nan_ties_with_minus_inf"),
        pytest.param([-cases.INF, cases.NAN, 0], 3, [0, 1, 2], id="minus_inf_and_nan_are_candidates"),
        pytest.param([5, 9, 7], 2, [1, 2], id="ascending_position_not_value"),
        pytest.param([5, 9], 4, [0, 1, -1, -1], id="padded"),
        pytest.param([cases.INF, cases.INF, 3.4e38], 2, [0, 1], id="plus_inf"),
    ],
)
def test_rules(scores, topk, expected):
    logits = torch.tensor([scores], dtype=torch.float32)
    end = torch.tensor([len(scores)], dtype=torch.int32)
    assert select_topk(logits, None, end, topk).tolist() == [expected]


def test_positions_count_from_the_start():
    logits = torch.tensor([[9.0, 1, 2, 3, 9]])
    selected = select_topk(logits, torch.tensor([1]).int(), torch.tensor([4]).int(), 2)
    assert selected.tolist() == [[1, 2]]


def test_end_is_clipped_to_the_width():
    selected = select_topk(torch.zeros(2, 3), None, torch.tensor([cases.INT32_MAX, -5]).int(), 4)
    assert selected.tolist() == [[0, 1, 2, -1], [-1] * 4]


@pytest.mark.parametrize("kind", ["zero_plateau", "some_nan", "random"])
def test_the_same_bits_in_every_batch_and_split(kind, monkeypatch):
    inputs = cases.select_topk_inputs(kind, 14, 400, 64, ranges="long_short_long")
    whole = select_topk(**inputs)
    order = torch.randperm(14, generator=cases.rng(1))
    permuted = {**inputs, "logits_ts": inputs["logits_ts"][order], "end_t": inputs["end_t"][order]}
    assert torch.equal(select_topk(**permuted), whole[order])
    rows = [select_topk(inputs["logits_ts"][t : t + 1], None, inputs["end_t"][t : t + 1], 64) for t in range(14)]
    assert torch.equal(torch.cat(rows), whole)
    monkeypatch.setattr("dsv32_plugin.kernels.formulas.CHUNK_BYTES", 30_000)
    assert torch.equal(select_topk(**inputs), whole)


def test_does_not_write_its_input():
    inputs = cases.select_topk_inputs("signed_zeros", 4, 30, 8)
    before = inputs["logits_ts"].clone()
    select_topk(**inputs)
    assert torch.equal(inputs["logits_ts"].view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("explicit", [False, True], ids=["rows_a_sequence", "seq_t"])
def test_slots_through_the_block_table(page_size, explicit):
    inputs = cases.select_topk_inputs("random", 6, 200, 32, ranges="causal")
    table = cases.block_table([200, 200, 200], 50, page_size, cases.rng(3), spare=0)
    seq = torch.tensor([2, 0, 1, 1, 0, 2]).int() if explicit else None
    slots = select_topk(**inputs, block_table_bp=table, page_size=page_size, seq_t=seq)
    position = select_topk(**inputs).numpy()
    rows = np.array([2, 0, 1, 1, 0, 2] if explicit else [0, 0, 1, 1, 2, 2])[:, None]
    assert (slots.numpy() == table.numpy()[rows, position // page_size] * page_size + position % page_size).all()


@pytest.mark.parametrize("page", [-1, cases.INT32_MIN, cases.INT32_MAX, 2**25])
def test_a_page_without_int32_slots_gives_minus_one(page):
    table = torch.tensor([[7, page]], dtype=torch.int32)
    slots = select_topk(torch.zeros(1, 200), None, torch.tensor([140]).int(), 200, block_table_bp=table, page_size=64)
    assert slots[0, :64].tolist() == list(range(448, 512))
    assert (slots[0, 64:] == -1).all()


def test_writes_into_out():
    inputs = cases.select_topk_inputs("random", 5, 60, 16)
    wide = torch.full((5, 20), 77, dtype=torch.int32)
    assert select_topk(**inputs, out=wide[:, :16]).data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :16], select_topk(**inputs))
    assert (wide[:, 16:] == 77).all()


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("width", [0, 5])
def test_nothing_to_select(tokens, width):
    end = torch.zeros(tokens, dtype=torch.int32)
    assert select_topk(torch.zeros(tokens, width), None, end, 4).tolist() == [[-1] * 4] * tokens


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("slots", [False, True], ids=["positions", "slots"])
def test_index_topk_is_logits_then_selection(dtype, workspace_bytes, slots):
    inputs = cases.index_topk_ragged_inputs([40, 0, 23], 16, dtype=dtype, heads=8)
    topk = inputs.pop("topk")
    paging = {}
    if slots:
        seq = torch.tensor([0] * 40 + [2] * 23, dtype=torch.int32)
        paging = {"block_table_bp": cases.block_table([40, 0, 23], 9, 16, cases.rng(0)), "page_size": 16, "seq_t": seq}
    got = index_topk_ragged(**inputs, topk=topk, workspace_bytes=workspace_bytes, **paging)
    logits = index_logits_ragged(**inputs)
    assert torch.equal(got, select_topk(logits, inputs["start_t"], inputs["end_t"], topk, **paging))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 2000, 1 << 20])
def test_index_mask_is_logits_then_selection(dtype, workspace_bytes):
    inputs = cases.index_topk_ragged_inputs([40, 0, 23], 16, dtype=dtype, heads=8)
    wide = torch.full((63, 9), -7, dtype=torch.int32)
    mask = index_mask_ragged(**inputs, workspace_bytes=workspace_bytes, out=wide[:, :4])
    assert_same(mask, index_topk_ragged(**inputs), inputs["start_t"], 63)
    assert (wide[:, 4:] == -7).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("longer", [0, 900], ids=["exact", "for-longer-ones"])
def test_paged_index_topk_is_logits_then_selection(dtype, workspace_bytes, longer):
    inputs = cases.index_logits_paged_inputs([70, 0, 5, 33], 2, dtype=dtype, heads=8)
    got = index_topk_paged(
        **{**inputs, "max_visible": inputs["max_visible"] + longer}, topk=16, workspace_bytes=workspace_bytes
    )
    visible = inputs["visible_bn"].flatten()
    table = {"block_table_bp": inputs["block_table_bp"], "page_size": 64}
    expected = select_topk(index_logits_paged(**inputs).flatten(0, 1), None, visible, 16, **table)
    assert torch.equal(got.flatten(0, 1), expected)


def test_index_topk_of_nothing():
    assert index_topk_paged(**cases.index_logits_paged_inputs([]), topk=16).shape == (0, 1, 16)
    assert index_topk_ragged(**cases.index_topk_ragged_inputs([], 16)).shape == (0, 16)
    assert index_mask_ragged(**cases.index_topk_ragged_inputs([], 16)).shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk": 0}, ValueError, "topk: must be 1 to 4096, got 0"),
        ({"topk": 4097}, ValueError, "topk: must be 1 to 4096, got 4097"),
        ({"logits_ts": torch.zeros(3, 9).bfloat16()}, TypeError, "logits_ts: dtype must be float32, got bfloat16"),
        ({"logits_ts": torch.zeros(9, 3).T}, ValueError, "logits_ts: last dim must be contiguous, got stride 3"),
        ({"end_t": torch.zeros(2).int()}, ValueError, r"end_t: shape must be \[3\], got \[2\]"),
        ({"page_size": 64}, ValueError, "block_table_bp, page_size: give all or none, got no block_table_bp"),
        (
            {"block_table_bp": torch.zeros(2, 1).int(), "page_size": 64},
            ValueError,
            "seq_t: 3 rows do not divide among 2 sequences; give seq_t",
        ),
        ({"out": torch.zeros(3, 4)}, TypeError, "out: dtype must be int32, got float32"),
    ],
)
def test_refuses(change, error, message):
    inputs = {"logits_ts": torch.zeros(3, 9), "start_t": None, "end_t": torch.zeros(3).int(), "topk": 4}
    with pytest.raises(error, match=message):
        select_topk(**{**inputs, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk": 0}, ValueError, "topk: must be 1 to 4096, got 0"),
        ({"logits_ts": torch.zeros(3, 9).bfloat16()}, TypeError, "logits_ts: dtype must be float32, got bfloat16"),
        ({"start_t": torch.zeros(2).int()}, ValueError, r"start_t: shape must be \[3\], got \[2\]"),
        ({"out": torch.zeros(3, 3).int()}, ValueError, "out: a row for 9 keys has at least 4 words, got 3"),
        ({"out": torch.zeros(2, 4).int()}, ValueError, r"out: shape must be \[3, \*\], got \[2, 4\]"),
        ({"out": torch.zeros(3, 4)}, TypeError, "out: dtype must be int32, got float32"),
        ({"out": torch.zeros(4, 3).int().T}, ValueError, "out: last dim must be contiguous, got stride 3"),
    ],
)
def test_a_mask_refuses(change, error, message):
    inputs = {"logits_ts": torch.zeros(3, 9), "start_t": None, "end_t": torch.zeros(3).int(), "topk": 4}
    with pytest.raises(error, match=message):
        select_mask(**{**inputs, **change})
