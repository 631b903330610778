import numpy as np
import pytest
import torch
from dsv32_plugin.kernels import gather_index_keys, gather_latents
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import oracles

U8 = torch.uint8
DTYPES = [torch.float32, torch.bfloat16, U8]
LENGTHS = [
    pytest.param([1], id="one"),
    pytest.param([70, 0, 3, 128], id="mixed"),
    pytest.param([0, 0], id="empty"),
]


def slots(inputs, cache, lengths):
    table, page_size = inputs["block_table_bp"], cache.shape[1]
    return [s for seq, length in enumerate(lengths) for s in cases.slots_of(table, seq, length, page_size).tolist()]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page_size", "page_padding"), [(64, 0), (16, 48)])
def test_index_keys(lengths, cache_dtype, page_size, page_padding):
    inputs = cases.gather_inputs(
        lengths, which="index", cache_dtype=cache_dtype, page_size=page_size, page_padding=page_padding, extra=3
    )
    keys, scale = gather_index_keys(**inputs)
    assert keys.dtype == (torch.float8_e4m3fn if cache_dtype == U8 else cache_dtype)
    assert (scale is None) == (cache_dtype != U8)
    rows = [oracles.index_row(inputs["index_cache"], s) for s in slots(inputs, inputs["index_cache"], lengths)]
    rows += [(np.zeros(128), 0.0)] * 3
    assert (keys.double().numpy() == np.array([key for key, _ in rows])).all()
    if scale is not None:
        assert scale.tolist() == [s for _, s in rows]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: f"to_{dtype}")
def test_latents(lengths, cache_dtype, dtype):
    inputs = cases.gather_inputs(lengths, which="latent", cache_dtype=cache_dtype, page_padding=16, extra=3)
    rows = gather_latents(**inputs, dtype=dtype)
    expected = [oracles.latent_row(inputs["latent_cache"], s) for s in slots(inputs, inputs["latent_cache"], lengths)]
    expected = torch.from_numpy(np.array([*expected, *[np.zeros(576)] * 3]))
    assert torch.equal(rows, expected.to(dtype))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    page_size=st.sampled_from([16, 48, 64]),
    fp8=st.booleans(),
    page_padding=st.sampled_from([0, 4, 400]),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, page_size, fp8, page_padding, seed):
    dtype = U8 if fp8 else torch.bfloat16
    paging = {"page_size": page_size, "page_padding": page_padding, "seed": seed}
    inputs = cases.gather_inputs(lengths, which="index", cache_dtype=dtype, **paging)
    keys, scale = gather_index_keys(**inputs)
    rows = [oracles.index_row(inputs["index_cache"], s) for s in slots(inputs, inputs["index_cache"], lengths)]
    assert (keys.double().numpy() == np.array([key for key, _ in rows]).reshape(-1, 128)).all()
    assert scale is None or scale.tolist() == [s for _, s in rows]


@pytest.mark.parametrize("page", [-1, cases.INT32_MIN, cases.INT32_MAX, 4])
def test_a_page_outside_the_cache_gives_zeros(page):
    inputs = cases.gather_inputs([70], which="index", cache_dtype=U8)
    inputs["block_table_bp"][0, 0] = page
    keys, scale = gather_index_keys(**inputs)
    assert (keys[:64].float() == 0).all()
    assert (scale[:64] == 0).all()
    assert (scale[64:] > 0).all()


def test_fewer_rows_than_the_sequences_hold():
    inputs = cases.gather_inputs([70, 9], which="latent", cache_dtype=torch.float32)
    whole = gather_latents(**inputs, dtype=torch.float32)
    assert torch.equal(gather_latents(**{**inputs, "total": 75}, dtype=torch.float32), whole[:75])


def test_no_sequences():
    inputs = {"block_table_bp": torch.zeros(0, 1).int(), "cu_seqlens_b1": torch.zeros(1).int(), "total": 0}
    assert gather_latents(latent_cache=torch.zeros(1, 64, 576), **inputs, dtype=torch.float32).shape == (0, 576)
    assert gather_index_keys(index_cache=torch.zeros(1, 64, 132, dtype=U8), **inputs)[0].shape == (0, 128)


def test_refuses():
    inputs = cases.gather_inputs([7], which="latent", cache_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^dtype: must be bfloat16 or float32 or float16, got int32$"):
        gather_latents(**inputs, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_b1: shape must be \[2\], got \[1\]"):
        gather_latents(**{**inputs, "cu_seqlens_b1": torch.zeros(1).int()}, dtype=torch.float32)
    with pytest.raises(ValueError, match="total: must be at least 0, got -1"):
        gather_latents(**{**inputs, "total": -1}, dtype=torch.float32)
