import pytest
import torch
from dsv32_plugin.kernels import gather_index_keys, index_logits_paged, index_logits_ragged

import cases
import oracles

DTYPES = [torch.uint8, torch.float32, torch.bfloat16]
LENGTH = 128 + 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "tokens", "options"),
    [
        pytest.param([1], 1, {}, id="one_key"),
        pytest.param([70, 0, 3, 129], 1, {}, id="mixed_lengths"),
        pytest.param([65, 2, 0], 4, {"heads": 8}, id="four_query_tokens"),
        pytest.param([40, 17], 2, {"page_size": 16, "page_padding": 64, "heads": 3}, id="padded_pages_of_16"),
        pytest.param([33], 1, {"index_dim": 32, "heads": 5}, id="narrow_keys"),
        pytest.param([50, 3], 1, {"max_visible": 20}, id="fewer_columns_than_keys"),
        pytest.param([5, 3], 1, {"max_visible": 900}, id="more_columns_than_pages"),
    ],
)
def test_paged_equals_the_formula(dtype, lengths, tokens, options):
    inputs = cases.index_logits_paged_inputs(lengths, tokens, dtype=dtype, **options)
    cases.assert_close_to_float64(index_logits_paged(**inputs), oracles.index_logits_paged(**inputs), length=LENGTH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "chunks", "options"),
    [
        pytest.param([1], None, {}, id="one_key"),
        pytest.param([20, 0, 7, 1], None, {"heads": 8}, id="mixed_lengths"),
        pytest.param([40, 25], [3, 5], {"heads": 33}, id="chunked"),
        pytest.param([9, 4], None, {"index_dim": 16, "heads": 1}, id="narrow_keys"),
    ],
)
def test_ragged_equals_the_formula(dtype, lengths, chunks, options):
    inputs = cases.index_logits_ragged_inputs(lengths, chunks, dtype=dtype, strided=dtype != torch.uint8, **options)
    cases.assert_close_to_float64(index_logits_ragged(**inputs), oracles.index_logits_ragged(**inputs), length=LENGTH)


def test_ranges_that_are_empty_or_reversed_see_nothing():
    inputs = cases.index_logits_ragged_inputs([6], dtype=torch.float32)
    inputs["start_t"] = torch.tensor([0, 3, 6, 5, 0, 6], dtype=torch.int32)
    inputs["end_t"] = torch.tensor([0, 3, 6, 2, 6, 0], dtype=torch.int32)
    seen = index_logits_ragged(**inputs).isfinite().sum(1)
    assert seen.tolist() == [0, 0, 0, 0, 6, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_and_ragged_agree(dtype):
    inputs = cases.index_logits_paged_inputs([70, 0, 3], dtype=dtype, heads=8)
    lengths = inputs["visible_bn"][:, 0]
    keys, scale = gather_index_keys(inputs["index_cache"], inputs["block_table_bp"], cases.cumulative([70, 0, 3]), 73)
    end = lengths.cumsum(0).int()
    ragged = index_logits_ragged(inputs["q_bnid"][:, 0], inputs["weights_bni"][:, 0], keys, scale, end - lengths, end)
    paged = index_logits_paged(**inputs)
    for b, (begin, length) in enumerate(zip((end - lengths).tolist(), lengths.tolist(), strict=True)):
        torch.testing.assert_close(ragged[b, begin : begin + length], paged[b, 0, :length])


def test_bytes_stand_for_fp8_values():
    inputs = cases.index_logits_ragged_inputs([9], heads=4)
    expected = index_logits_ragged(**inputs)
    bytes_of = {name: inputs[name].view(torch.uint8) for name in ("q_tid", "k_sd")}
    assert torch.equal(index_logits_ragged(**{**inputs, **bytes_of}), expected)
    paged = cases.index_logits_paged_inputs([9], heads=4)
    expected = index_logits_paged(**paged)
    assert torch.equal(index_logits_paged(**{**paged, "q_bnid": paged["q_bnid"].view(torch.uint8)}), expected)


def test_relu_comes_before_the_sum_over_heads():
    q = torch.tensor([[[1.0], [-1.0]]])
    weights, key = torch.ones(1, 2), torch.tensor([[2.0]])
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    assert index_logits_ragged(q, weights, key, None, zero, one).item() == 2.0


@pytest.mark.parametrize("page", [-1, cases.INT32_MIN, cases.INT32_MAX, 5])
def test_a_page_outside_the_cache_is_absent(page):
    inputs = cases.index_logits_paged_inputs([100], dtype=torch.float32, heads=2)
    inputs["block_table_bp"][0, 0] = page
    logits = index_logits_paged(**inputs)[0, 0]
    assert logits[:64].isneginf().all()
    assert logits[64:].isfinite().all()


def test_nan_in_rows_that_are_not_visible_stays_out():
    inputs = cases.index_logits_paged_inputs([100, 30], 2, dtype=torch.bfloat16, heads=2)
    visible = torch.arange(inputs["max_visible"]) < inputs["visible_bn"].unsqueeze(2)
    logits = index_logits_paged(**inputs)
    assert logits[visible].isfinite().all()
    assert logits[~visible].isneginf().all()


def test_a_permuted_batch_gives_permuted_logits():
    inputs = cases.index_logits_paged_inputs([70, 5, 33, 128], 2, heads=8)
    order = torch.tensor([2, 0, 3, 1])
    permuted = {
        **inputs,
        **{name: inputs[name][order] for name in ("q_bnid", "weights_bni", "block_table_bp", "visible_bn")},
    }
    torch.testing.assert_close(index_logits_paged(**permuted), index_logits_paged(**inputs)[order])


def test_writes_into_out_with_padded_rows():
    inputs = cases.index_logits_ragged_inputs([9], heads=4)
    wide = torch.full((9, 16), torch.nan)
    out = wide[:, :9]
    assert index_logits_ragged(**inputs, out=out) is out
    assert torch.equal(out, index_logits_ragged(**inputs))
    assert wide[:, 9:].isnan().all()
    paged = cases.index_logits_paged_inputs([9, 5], heads=4)
    out = torch.full((2, 1, 9), torch.nan)
    assert index_logits_paged(**paged, out=out) is out
    assert torch.equal(out, index_logits_paged(**paged))


def test_nothing_to_score():
    assert index_logits_paged(**cases.index_logits_paged_inputs([])).shape == (0, 1, 0)
    assert index_logits_ragged(**cases.index_logits_ragged_inputs([])).shape == (0, 0)
    assert index_logits_paged(**cases.index_logits_paged_inputs([0, 0], max_visible=7)).isneginf().all()


def test_chunks_equal_the_whole(monkeypatch):
    paged = cases.index_logits_paged_inputs([70, 5, 33], 2, heads=8)
    ragged = cases.index_logits_ragged_inputs([30], heads=8)
    whole = index_logits_paged(**paged), index_logits_ragged(**ragged)
    monkeypatch.setattr("dsv32_plugin.kernels.formulas.CHUNK_BYTES", 1)
    torch.testing.assert_close(index_logits_paged(**paged), whole[0])
    torch.testing.assert_close(index_logits_ragged(**ragged), whole[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"q_tid": torch.zeros(3, 4, 128)},
            TypeError,
            "q_tid: dtype must be float8_e4m3fn or uint8, got float32; call",
        ),
        ({"k_scale_s": None}, TypeError, "k_sd: dtype must be bfloat16 or float32 or float16, got float8_e4m3fn; give"),
        ({"weights_ti": torch.zeros(3, 5)}, ValueError, r"weights_ti: shape must be \[3, 4\], got \[3, 5\]"),
        ({"end_t": torch.zeros(3, dtype=torch.int64)}, TypeError, "end_t: dtype must be int32, got int64"),
        ({"k_scale_s": torch.zeros(6)[::2]}, ValueError, "k_scale_s: last dim must be contiguous, got stride 2; call"),
        (
            {"start_t": torch.zeros(3, dtype=torch.int32, device="meta")},
            ValueError,
            "start_t: must be on cpu, got meta",
        ),
        ({"out": torch.zeros(3, 4)}, ValueError, r"out: shape must be \[3, 3\], got \[3, 4\]"),
        ({"k_sd": [1, 2]}, TypeError, "k_sd: must be a tensor, got list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ragged_refuses(change, error, message):
    inputs = cases.index_logits_ragged_inputs([3], heads=4)
    with pytest.raises(error, match=message):
        index_logits_ragged(**{**inputs, **change})


def test_paged_refuses_a_cache_of_another_width():
    inputs = cases.index_logits_paged_inputs([3], heads=4)
    with pytest.raises(ValueError, match=r"index_cache: last dim must be 132 bytes \(fp8 index layout\), got 128"):
        index_logits_paged(**{**inputs, "index_cache": torch.zeros(1, 64, 128, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="index_cache: page size must be a multiple of 16, got 24; start"):
        index_logits_paged(**{**inputs, "index_cache": torch.zeros(1, 24, 132, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="index_cache: must have at least one page, got none"):
        index_logits_paged(**{**inputs, "index_cache": torch.zeros(0, 64, 132, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="max_visible: must be at least 0, got -1"):
        index_logits_paged(**{**inputs, "max_visible": -1})
