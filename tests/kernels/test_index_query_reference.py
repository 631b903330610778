import numpy as np
import pytest
import torch
from dsv32_plugin.kernels import index_logits_ragged, index_query, select_topk
from dsv32_plugin.kernels.formulas import hadamard, power_of_two_scale, quantize, rotate
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import oracles


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("sizes", [{}, {"heads": 5, "index_dim": 16, "rope_dim": 8}], ids=["real_sizes", "small"])
def test_equals_the_formulas(sizes, interleaved, rotated):
    inputs = cases.index_query_inputs(7, strided=True, interleaved=interleaved, rotate=rotated, **sizes)
    query, weights = index_query(**inputs)
    expected_query, expected_weights = oracles.index_query(**inputs)
    torch.testing.assert_close(query.double(), torch.from_numpy(expected_query), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(weights.double(), torch.from_numpy(expected_weights), rtol=1e-6, atol=0)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_the_quantised_float_query_and_its_scale_is_in_the_weights(dtype):
    inputs = cases.index_query_inputs(6, dtype=dtype, rotate=True)
    exact = {**inputs, "q_tid": inputs["q_tid"].float()}
    query, weights = index_query(**exact)
    values, scaled_weights = index_query(**{**inputs, "quantize": True})
    assert values.dtype == torch.float8_e4m3fn
    for q_d, value_d, w, scaled in zip(
        query.double().numpy().reshape(-1, 128),
        values.view(torch.uint8).numpy().reshape(-1, 128),
        weights.view(-1).tolist(),
        scaled_weights.view(-1).tolist(),
        strict=True,
    ):
        scale = oracles.scale_of(np.abs(q_d).max())
        assert (value_d == oracles.e4m3_codes(q_d / scale)).all()
        assert scaled == w * scale


def test_keeps_the_dtype_and_writes_into_buffers():
    inputs = cases.index_query_inputs(6, heads=4, dtype=torch.bfloat16)
    query, weights = index_query(**inputs)
    assert query.dtype == torch.bfloat16
    out, weights_out = torch.empty_like(query), torch.empty_like(weights)
    assert index_query(**inputs, out=out, weights_out=weights_out)[0] is out
    assert torch.equal(out, query)
    assert torch.equal(weights_out, weights)
    inputs["quantize"] = True
    as_bytes = torch.empty(6, 4, 128, dtype=torch.uint8)
    index_query(**inputs, out=as_bytes)
    assert torch.equal(as_bytes, index_query(**inputs)[0].view(torch.uint8))


def test_half_split_and_interleaved_differ_by_the_order_of_the_pairs():
    inputs = cases.index_query_inputs(5, heads=3)
    x = inputs["q_tid"]
    shuffled = torch.cat((torch.stack((x[..., :32], x[..., 32:64]), -1).flatten(-2), x[..., 64:]), -1)
    half_split, _ = index_query(**inputs)
    interleaved, _ = index_query(**{**inputs, "q_tid": shuffled, "interleaved": True})
    assert torch.equal(torch.cat((interleaved[..., 0:64:2], interleaved[..., 1:64:2]), -1), half_split[..., :64])
    assert not torch.allclose(index_query(**{**inputs, "interleaved": True})[0], half_split, atol=0.1)


@pytest.mark.parametrize("dim", [1, 2, 16, 128])
def test_rotation_is_orthogonal_and_its_own_inverse(dim):
    matrix = hadamard(dim, torch.device("cpu"))
    assert torch.equal(matrix @ matrix, dim * torch.eye(dim))
    x, y = torch.randn(2, 9, dim, generator=cases.rng(0), dtype=torch.float32)
    torch.testing.assert_close(rotate(rotate(x)), x)
    torch.testing.assert_close((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rotate(x).numpy(), oracles.rotate(x.double().numpy()), rtol=1e-5, atol=2e-6)


def test_scales_are_exact_at_every_carry():
    """amax = 448 * 2^n must not carry, the next float32 must: a log2 in float32 gets this wrong."""
    carry = 448.0 * torch.exp2(torch.arange(-20.0, 100.0))
    up = torch.nextafter(carry, torch.tensor(cases.INF))
    down = torch.nextafter(carry, torch.tensor(0.0))
    expected = torch.exp2(torch.arange(-20.0, 100.0))
    assert torch.equal(power_of_two_scale(carry), expected)
    assert torch.equal(power_of_two_scale(down), expected)
    assert torch.equal(power_of_two_scale(up), 2 * expected)


def test_scales_are_the_smallest_powers_of_two():
    amax = torch.exp2(torch.rand(2000, generator=cases.rng(0)) * 40 - 20)
    amax[:3] = torch.tensor([0.0, 1e-45, 1e-4])
    assert power_of_two_scale(amax).tolist() == [oracles.scale_of(value) for value in amax.tolist()]
    assert power_of_two_scale(torch.zeros(1)).item() == 2.0**-22


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8))
def test_quantisation_of_any_row(row):
    x = torch.tensor([row])
    values, scale = quantize(x, len(row))
    expected = oracles.scale_of(float(x.abs().max()))
    assert scale.item() == expected
    assert (values.view(torch.uint8).numpy() == oracles.e4m3_codes(x.double().numpy() / expected)).all()


def test_values_round_to_nearest_even():
    middle = (oracles.E4M3[:126] + oracles.E4M3[1:127]) / 2
    beside = np.concatenate([middle, np.nextafter(np.float32(middle), 0), np.nextafter(np.float32(middle), 500)])
    x = torch.from_numpy(np.concatenate([beside, -beside, oracles.E4M3[:127]])).float()
    x = torch.cat((x, torch.full((1,), 448.0)))
    values, scale = quantize(x, len(x))
    assert scale.item() == 1.0
    assert (values.view(torch.uint8).numpy() == oracles.e4m3_codes(x.double().numpy())).all()


def recall(rotated: bool, seed: int) -> float:
    """Share of the true top 64 of 2048 keys that fp8 finds, a few channels being loud in queries and keys."""
    g = cases.rng(seed)
    loud = torch.ones(128)
    loud[torch.randperm(128, generator=g)[:4]] = 6.0
    q, k = torch.randn(8, 16, 128, generator=g) * loud, torch.randn(2048, 128, generator=g) * loud
    weights = torch.rand(8, 16, generator=g)
    start, end = torch.zeros(8).int(), torch.full((8,), 2048).int()
    truth = select_topk(index_logits_ragged(q, weights, k, None, start, end), None, end, 64)
    q, k = (rotate(q), rotate(k)) if rotated else (q, k)
    (q, q_scale), (k, k_scale) = quantize(q, 128), quantize(k, 128)
    logits = index_logits_ragged(q, weights * q_scale[..., 0], k, k_scale[:, 0], start, end)
    found = select_topk(logits, None, end, 64)
    return sum(len(set(a) & set(b)) for a, b in zip(truth.tolist(), found.tolist(), strict=True)) / truth.numel()


@pytest.mark.parametrize("seed", range(3))
def test_rotation_halves_what_fp8_misses_of_the_true_top_k(seed):
    plain, rotated = recall(False, seed), recall(True, seed)
    assert 1 - rotated < (1 - plain) / 2, f"recall {plain:.3f} without, {rotated:.3f} with the rotation"


def test_no_tokens():
    query, weights = index_query(**cases.index_query_inputs(0, quantize=True, rotate=True))
    assert query.shape == (0, 64, 128)
    assert weights.shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions_t": torch.zeros(4)}, TypeError, "positions_t: dtype must be int64 or int32, got float32"),
        (
            {"rope_table_pr": torch.zeros(9, 7)},
            ValueError,
            r"rope_table_pr: last dim must be even \(cos \| sin\)",
        ),
        ({"rope_table_pr": torch.zeros(9, 256)}, ValueError, "q_tid: last dim must hold the 256 rope dims, got 128"),
        ({"out": torch.zeros(4, 64, 128).half()}, TypeError, "out: dtype must be float32, got float16"),
        ({"q_tid": torch.zeros(4, 128)}, ValueError, r"q_tid: shape must be \[\*, \*, \*\], got \[4, 128\]"),
        ({"rope_table_pr": torch.zeros(64, 9).T}, ValueError, "rope_table_pr: must be contiguous, got strides"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        index_query(**{**cases.index_query_inputs(4), **change})
