import numpy as np
import pytest
import torch
from dsv32_plugin.kernels import norm_rope_cache
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32RMSNorm,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

import cases
import oracles

U8 = torch.uint8
SMALL = {"q_rank": 48, "rank": 32, "rope_dim": 8, "index_dim": 16, "page_size": 16}


def rows_of(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return cache[slots // cache.shape[1], slots % cache.shape[1]]


@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("sizes", [{}, {**SMALL, "page_padding": 48}], ids=["real_sizes", "small_padded_pages"])
def test_equals_the_formulas(sizes, interleaved, rotate):
    inputs = cases.norm_rope_cache_inputs(13, interleaved=interleaved, rotate=rotate, **sizes)
    q_a, rows, keys = oracles.norm_rope_cache(**inputs)
    written = inputs["slots_t"] >= 0
    slots = inputs["slots_t"][written]
    close = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(norm_rope_cache(**inputs).double(), torch.from_numpy(q_a), **close)
    torch.testing.assert_close(
        rows_of(inputs["latent_cache"], slots).double(), torch.from_numpy(rows)[written], **close
    )
    torch.testing.assert_close(rows_of(inputs["index_cache"], slots).double(), torch.from_numpy(keys)[written], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_rope_are_those_of_hugging_face_bit_for_bit(dtype):
    inputs = cases.norm_rope_cache_inputs(29, dtype=dtype, latent_dtype=dtype, index_dtype=dtype, skip=False)
    q_norm, kv_norm = DeepseekV32RMSNorm(1536, 1e-6), DeepseekV32RMSNorm(512, 1e-6)
    q_norm.weight.data, kv_norm.weight.data = inputs["q_a_weight_l"], inputs["kv_a_weight_c"]
    index_norm = torch.nn.LayerNorm(128, eps=1e-6)
    index_norm.weight.data, index_norm.bias.data = inputs["index_k_weight_d"], inputs["index_k_bias_d"]
    cos, sin = inputs["rope_table_pr"][inputs["positions_t"]].repeat_interleave(2, 0).view(29, 2, 2, 32).unbind(2)
    cos, sin = (x.reshape(1, 29, 64) for x in (cos, sin))
    rope_key = inputs["k_pe_tr"].float().view(1, 1, 29, 64)
    _, rope_key = apply_rotary_pos_emb_interleave(rope_key, rope_key, cos, sin)
    key = index_norm(inputs["index_k_td"].float()).to(dtype).float().view(1, 1, 29, 128)
    _, turned = apply_rotary_pos_emb(key[..., :64], key[..., :64], cos, sin)

    q_a = norm_rope_cache(**inputs)
    latent = rows_of(inputs["latent_cache"], inputs["slots_t"])
    index = rows_of(inputs["index_cache"], inputs["slots_t"])
    assert torch.equal(q_a, q_norm(inputs["q_a_tl"]))
    assert torch.equal(latent[:, :512], kv_norm(inputs["kv_a_tc"]))
    # Hugging Face returns the pairs de-interleaved: (0, 2, 4, ... | 1, 3, 5, ...).
    assert torch.equal(torch.cat((latent[:, 512::2], latent[:, 513::2]), 1), rope_key[0, 0].to(dtype))
    assert torch.equal(index, torch.cat((turned, key[..., 64:]), -1)[0, 0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_padding", [0, 64])
def test_fp8_caches_hold_the_quantised_float_rows(dtype, page_padding):
    options = {"dtype": dtype, "rotate": True, "skip": False, "page_padding": page_padding}
    exact = cases.norm_rope_cache_inputs(40, **options)
    fp8 = cases.norm_rope_cache_inputs(40, latent_dtype=U8, index_dtype=U8, **options)
    norm_rope_cache(**exact)
    norm_rope_cache(**fp8)
    slots = exact["slots_t"]
    latent, index = rows_of(exact["latent_cache"], slots), rows_of(exact["index_cache"], slots)
    for t, slot in enumerate(slots.tolist()):
        row = fp8["latent_cache"][slot // 64, slot % 64]
        tiles = latent[t, :512].view(4, 128).double().numpy()
        scales = np.array([oracles.scale_of(np.abs(tile).max()) for tile in tiles])
        assert (row[:512].numpy() == oracles.e4m3_codes(tiles / scales[:, None]).reshape(-1)).all()
        assert (row[512:528].view(torch.float32).numpy() == scales).all()
        assert torch.equal(row[528:].view(torch.bfloat16), latent[t, 512:].bfloat16())
        values, scale = oracles.index_row(fp8["index_cache"], slot)
        key = index[t].double().numpy()
        assert scale == oracles.scale_of(np.abs(key).max())
        assert (values == oracles.E4M3[oracles.e4m3_codes(key / scale)]).all()


def test_the_bytes_of_an_index_page():
    """All values of a page, then all scales: 64 * 128 bytes, then 64 float32."""
    inputs = cases.norm_rope_cache_inputs(1, index_dtype=U8, skip=False)
    inputs["slots_t"] = torch.tensor([64 + 5])
    norm_rope_cache(**inputs)
    page = inputs["index_cache"][1].reshape(-1)
    written = (page != 255).nonzero().squeeze(1)
    first, last = 5 * 128, 64 * 128 + 5 * 4
    expected = {*range(first, first + 128), *range(last, last + 4)}
    assert set(written.tolist()) <= expected
    assert (inputs["index_cache"][[0, 2]] == 255).all()


@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8"])
@pytest.mark.parametrize("slot", [-1, -(2**63), 2**63 - 1, 3 * 64])
def test_an_invalid_slot_is_not_written(slot, fp8):
    dtype = U8 if fp8 else torch.float32
    inputs = cases.norm_rope_cache_inputs(1, latent_dtype=dtype, index_dtype=dtype, page_padding=32)
    inputs["slots_t"] = torch.tensor([slot])
    assert norm_rope_cache(**inputs).isfinite().all()
    for name in ("latent_cache", "index_cache"):
        extent = inputs[name].untyped_storage().nbytes() // inputs[name].itemsize
        everything = inputs[name].as_strided((extent,), (1,), 0)
        assert ((everything == 255) if fp8 else everything.isnan()).all()


def test_a_layer_without_an_indexer_writes_latents_only():
    inputs = cases.norm_rope_cache_inputs(5, with_index=False)
    full = cases.norm_rope_cache_inputs(5)
    assert torch.equal(norm_rope_cache(**inputs), norm_rope_cache(**full))
    torch.testing.assert_close(inputs["latent_cache"], full["latent_cache"], equal_nan=True, rtol=0, atol=0)


def test_positions_of_either_width_and_out():
    inputs = cases.norm_rope_cache_inputs(5, skip=False, **SMALL)
    again = cases.norm_rope_cache_inputs(5, skip=False, **SMALL)
    again["positions_t"] = again["positions_t"].int()
    out = torch.full((5, 60), torch.nan)[:, :48]
    assert norm_rope_cache(**again, out=out) is out
    assert torch.equal(out, norm_rope_cache(**inputs))
    torch.testing.assert_close(again["latent_cache"], inputs["latent_cache"], equal_nan=True, rtol=0, atol=0)


def test_writes_past_two_gibibytes():
    padding = 2**31
    inputs = cases.norm_rope_cache_inputs(1, latent_dtype=U8, index_dtype=U8, skip=False)
    for name, width in (("latent_cache", 656), ("index_cache", 132)):
        inputs[name] = cases.empty_pages(2, 64, width, U8, page_padding=padding)
    inputs["slots_t"] = torch.tensor([64 + 3])
    norm_rope_cache(**inputs)
    assert oracles.latent_row(inputs["latent_cache"], 67)[0] != 0
    assert np.isfinite(oracles.index_row(inputs["index_cache"], 67)[0]).all()
    assert (inputs["latent_cache"][0] == 255).all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    inputs = cases.norm_rope_cache_inputs(tokens, latent_dtype=U8, index_dtype=U8, rotate=True)
    assert norm_rope_cache(**inputs).shape == (tokens, 1536)


def test_rows_of_zeros_and_of_huge_values_stay_finite():
    inputs = cases.norm_rope_cache_inputs(2, latent_dtype=U8, index_dtype=U8, skip=False, rotate=True)
    inputs["kv_a_tc"], inputs["index_k_td"] = torch.zeros(2, 512), torch.zeros(2, 128)
    inputs["kv_a_tc"][1], inputs["index_k_td"][1] = 1e18, 1e18
    norm_rope_cache(**inputs)
    for slot in inputs["slots_t"].tolist():
        assert np.isfinite(oracles.latent_row(inputs["latent_cache"], slot)).all()
        assert np.isfinite(oracles.index_row(inputs["index_cache"], slot)[0]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index_cache": None}, ValueError, "index_cache: give all or none, got no index_cache"),
        ({"slots_t": torch.zeros(3, dtype=torch.int32)}, TypeError, "slots_t: dtype must be int64, got int32"),
        (
            {"latent_cache": torch.zeros(1, 64, 576, dtype=U8)},
            ValueError,
            r"latent_cache: last dim must be 656 bytes \(fp8 latent layout\), got 576; start the engine with",
        ),
        (
            {"latent_cache": torch.zeros(1, 64, 640)},
            ValueError,
            r"latent_cache: last dim must be 512 \+ 64 = 576, got 640",
        ),
        ({"rope_table_pr": torch.zeros(9, 32)}, ValueError, r"rope_table_pr: shape must be \[\*, 64\], got \[9, 32\]"),
        (
            {"latent_cache": torch.zeros(4, 64, 576)[:, ::2]},
            ValueError,
            "latent_cache: a page must be contiguous, got strides",
        ),
        ({"q_a_tl": torch.zeros(1536, 3).T}, ValueError, "q_a_tl: last dim must be contiguous, got stride 3"),
        ({"index_k_td": torch.zeros(3, 32)}, ValueError, "index_k_td: last dim must hold the 64 rope dims, got 32"),
        (
            {"index_k_td": torch.zeros(3, 96), "rotate": True},
            ValueError,
            "index_k_td: last dim must be a power of two to be rotated, got 96; use rotate=False",
        ),
        (
            {"latent_cache": torch.zeros(3 * 64 * 656 + 1, dtype=U8)[1:].view(3, 64, 656)},
            ValueError,
            "latent_cache: pages must begin at multiples of 4 bytes, got page stride 41984, storage offset 1",
        ),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        norm_rope_cache(**{**cases.norm_rope_cache_inputs(3), **change})


def test_the_fp8_layout_holds_only_the_real_widths():
    inputs = cases.norm_rope_cache_inputs(3, rank=256, latent_dtype=U8)
    with pytest.raises(ValueError, match="latent_cache: the fp8 layout holds 512 latents and 64 rope elements, got a"):
        norm_rope_cache(**inputs)
