"""sparse_mla, dense_mla and masked_mha."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import oracles
from dsv32_plugin.kernels import dense_mla, gather_latents, masked_mha, sparse_mla

U8 = torch.uint8
REAL, SMALL = {}, {"rank": 32, "rope_dim": 8, "page_size": 16}
LENGTH = 576 + 200


def judge(results, exact, operand=torch.float32):
    for actual, expected in zip(results, exact, strict=True):
        cases.assert_close_to_float64(actual, expected, length=LENGTH, operand=operand)


KINDS = [
    pytest.param(torch.float32, torch.float32, REAL, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, REAL, id="bfloat16"),
    pytest.param(torch.bfloat16, U8, REAL, id="fp8"),
    pytest.param(torch.float32, U8, {"page_padding": 16}, id="fp8_padded_pages"),
    pytest.param(torch.float32, torch.float32, {**SMALL, "page_padding": 24}, id="small_padded_pages"),
    pytest.param(torch.float16, torch.float16, SMALL, id="float16"),
]


@pytest.mark.parametrize(("dtype", "cache_dtype", "sizes"), KINDS)
@pytest.mark.parametrize(("tokens", "heads", "topk"), [(1, 1, 1), (5, 3, 33), (3, 16, 100)])
def test_sparse_equals_the_formula(dtype, cache_dtype, sizes, tokens, heads, topk):
    inputs = cases.sparse_mla_inputs(
        tokens, heads, topk, dtype=dtype, cache_dtype=cache_dtype, strided=True, absent=tokens > 1, **sizes
    )
    out, lse = sparse_mla(**inputs)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    judge((out, lse), oracles.sparse_mla(**inputs))


@pytest.mark.parametrize(("dtype", "cache_dtype", "sizes"), KINDS)
@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [
        pytest.param([70, 0, 3, 33], None, id="decode"),
        pytest.param([40, 17], [2, 2], id="two_query_tokens"),
        pytest.param([9, 0, 4], [9, 0, 4], id="prefill"),
    ],
)
def test_dense_equals_the_formula(dtype, cache_dtype, sizes, lengths, chunks):
    inputs = cases.dense_mla_inputs(lengths, chunks, 3, dtype=dtype, cache_dtype=cache_dtype, strided=True, **sizes)
    judge(dense_mla(**inputs), oracles.dense_mla(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topk", [None, 1, 7, 64])
@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [pytest.param([20, 0, 7, 1], None, id="prefill"), pytest.param([30, 25], [3, 5], id="chunked")],
)
def test_masked_equals_the_formula(dtype, topk, lengths, chunks):
    inputs = cases.masked_mha_inputs(lengths, chunks, topk=topk, dtype=dtype, strided=True, head_dim=24, value_dim=16)
    judge(masked_mha(**inputs), oracles.masked_mha(**inputs))


def test_dense_is_sparse_with_every_slot():
    inputs = cases.dense_mla_inputs([40, 17], [3, 2], 4)
    slots = torch.full((5, 40), -1, dtype=torch.int32)
    for t, (seq, visible) in enumerate(zip(inputs["seq_t"].tolist(), inputs["visible_t"].tolist(), strict=True)):
        slots[t, :visible] = cases.slots_of(inputs["block_table_bp"], seq, visible, 64).int()
    query = (inputs["q_latent_thc"], inputs["q_rope_thr"], inputs["latent_cache"])
    torch.testing.assert_close(dense_mla(**inputs), sparse_mla(*query, slots, inputs["scale"]))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 4),
    heads=st.integers(1, 5),
    slots=st.lists(
        st.one_of(st.integers(-70, 70), st.sampled_from([cases.INT32_MIN, cases.INT32_MAX])),
        max_size=12,
        unique=True,
    ),
    seed=st.integers(0, 1000),
)
def test_sparse_with_any_slots(tokens, heads, slots, seed):
    inputs = cases.sparse_mla_inputs(tokens, heads, 1, pages=4, seed=seed, **SMALL)
    cases.fill_latents(inputs["latent_cache"], torch.arange(64), cases.rng(seed))
    inputs["slots_tk"] = torch.tensor([slots] * tokens, dtype=torch.int32).view(tokens, len(slots))
    judge(sparse_mla(**inputs), oracles.sparse_mla(**inputs))


def test_masked_is_sparse_over_one_key_head():
    """The paper's two modes of the same layer: expanded heads under a mask, and absorbed queries over rows."""
    inputs = cases.sparse_mla_inputs(4, 3, 20, absent=True)
    rows = gather_latents(
        inputs["latent_cache"], torch.arange(8).int().view(1, 8), torch.tensor([0, 512]).int(), 512, dtype=torch.float32
    )
    keys = rows.unsqueeze(1).expand(-1, 3, -1)
    query = torch.cat((inputs["q_latent_thc"], inputs["q_rope_thr"]), -1)
    start, end = torch.zeros(4).int(), torch.full((4,), 512).int()
    selected = torch.stack([torch.isin(torch.arange(512), row[row >= 0]) for row in inputs["slots_tk"]])
    mask = cases.mask_of(selected)
    masked = masked_mha(query, keys, keys[..., :512], start, end, inputs["scale"], mask_tw=mask)
    torch.testing.assert_close(sparse_mla(**inputs), masked)


@pytest.mark.parametrize("slot", [-1, -64, cases.INT32_MIN, cases.INT32_MAX, 512])
def test_an_absent_slot_takes_no_part_and_is_never_row_zero(slot):
    """An invalid slot turned into 0 attends to the first row of the cache, which is NaN here."""
    inputs = cases.sparse_mla_inputs(2, 2, 8, absent=False)
    inputs["latent_cache"][0, 0] = torch.nan
    whole = inputs["slots_tk"].clone()
    whole[whole == 0] = int(whole.max())
    inputs["slots_tk"] = torch.cat((torch.full((2, 3), slot).int(), whole), 1)
    torch.testing.assert_close(sparse_mla(**inputs), sparse_mla(**{**inputs, "slots_tk": whole}))


def empty_row(out, lse):
    return (out == 0).all() and lse.isneginf().all()


def test_a_token_that_sees_nothing_gives_zero():
    sparse = cases.sparse_mla_inputs(2, 2, 5)
    sparse["slots_tk"][:] = -1
    assert empty_row(*sparse_mla(**sparse))
    assert empty_row(*sparse_mla(**{**sparse, "slots_tk": sparse["slots_tk"][:, :0]}))
    dense = cases.dense_mla_inputs([5, 3], None, 2)
    dense["visible_t"][:] = torch.tensor([0, -4])
    assert empty_row(*dense_mla(**dense))
    assert empty_row(*dense_mla(**{**dense, "max_visible": 0}))
    masked = cases.masked_mha_inputs([5, 3], topk=2)
    masked["mask_tw"].zero_()
    assert empty_row(*masked_mha(**masked))
    masked["end_t"] = masked["start_t"] - 1
    assert empty_row(*masked_mha(**{**masked, "mask_tw": None}))


def test_a_page_outside_the_cache_is_absent():
    inputs = cases.dense_mla_inputs([70], None, 2)
    for page in (-1, cases.INT32_MIN, cases.INT32_MAX, inputs["latent_cache"].shape[0]):
        inputs["block_table_bp"][0, 0] = page
        judge(dense_mla(**inputs), oracles.dense_mla(**inputs))


def test_nan_reaches_only_the_tokens_that_see_its_row():
    masked = cases.masked_mha_inputs([6], heads=2)
    masked["v_shv"][3, 1, 0] = torch.nan
    out, lse = masked_mha(**masked)
    assert out[:3].isfinite().all()
    assert lse.isfinite().all()
    assert out[3:].isnan().any(-1).any(-1).all()
    dense = cases.dense_mla_inputs([6], [6], 2)
    slot = int(cases.slots_of(dense["block_table_bp"], 0, 6, 64)[3])
    dense["latent_cache"][slot // 64, slot % 64] = torch.nan
    out, lse = dense_mla(**dense)
    assert out[:3].isfinite().all()
    assert out[3:].isnan().all()
    assert lse[3:].isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_flat_and_peaked_scores(scale):
    inputs = {**cases.sparse_mla_inputs(3, 2, 30, absent=False), "scale": scale}
    judge(sparse_mla(**inputs), oracles.sparse_mla(**inputs))


def test_a_permuted_batch_gives_permuted_results():
    order = torch.tensor([3, 0, 4, 1, 2])
    sparse = cases.sparse_mla_inputs(5, 2, 20)
    permuted = {**sparse, **{name: sparse[name][order] for name in ("q_latent_thc", "q_rope_thr", "slots_tk")}}
    torch.testing.assert_close(sparse_mla(**permuted), tuple(x[order] for x in sparse_mla(**sparse)))
    dense = cases.dense_mla_inputs([20, 3], [3, 2], 2)
    per_token = ("q_latent_thc", "q_rope_thr", "seq_t", "visible_t")
    permuted = {**dense, **{name: dense[name][order] for name in per_token}}
    torch.testing.assert_close(dense_mla(**permuted), tuple(x[order] for x in dense_mla(**dense)))


def test_the_order_of_the_slots_does_not_matter():
    inputs = cases.sparse_mla_inputs(3, 2, 20)
    flipped = {**inputs, "slots_tk": inputs["slots_tk"].flip(1).contiguous()}
    torch.testing.assert_close(sparse_mla(**flipped), sparse_mla(**inputs))


@pytest.mark.parametrize("operation", ["sparse", "dense", "masked"])
def test_writes_into_out_and_in_chunks(operation, monkeypatch):
    run, inputs = {
        "sparse": (sparse_mla, cases.sparse_mla_inputs(5, 2, 20, dtype=torch.bfloat16)),
        "dense": (dense_mla, cases.dense_mla_inputs([20, 3], [3, 2], 2, dtype=torch.bfloat16)),
        "masked": (masked_mha, cases.masked_mha_inputs([3, 2], heads=2, topk=2, dtype=torch.bfloat16)),
    }[operation]
    expected = run(**inputs)
    out, lse = torch.full_like(expected[0], torch.nan), torch.full_like(expected[1], torch.nan)
    monkeypatch.setattr("dsv32_plugin.kernels.formulas.CHUNK_BYTES", 1)
    result = run(**inputs, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    torch.testing.assert_close(result, expected)


def test_no_tokens():
    assert sparse_mla(**cases.sparse_mla_inputs(0, 2, 4))[0].shape == (0, 2, 512)
    assert dense_mla(**cases.dense_mla_inputs([0, 0], None, 2))[1].shape == (0, 2)
    assert masked_mha(**cases.masked_mha_inputs([0]))[0].shape == (0, 4, 128)


def test_reads_past_two_gibibytes():
    inputs = cases.sparse_mla_inputs(2, 2, 20, cache_dtype=U8, pages=2, page_padding=2**31)
    assert int(inputs["slots_tk"].max()) >= 64
    judge(sparse_mla(**inputs), oracles.sparse_mla(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slots_tk": torch.zeros(3, 4).long()}, TypeError, "slots_tk: dtype must be int32, got int64"),
        ({"slots_tk": torch.zeros(2, 4).int()}, ValueError, r"slots_tk: shape must be \[3, \*\], got \[2, 4\]"),
        ({"q_rope_thr": torch.zeros(3, 2, 64).half()}, TypeError, "q_rope_thr: dtype must be float32, got float16"),
        ({"q_rope_thr": torch.zeros(3, 2, 32)}, ValueError, r"latent_cache: last dim must be 512 \+ 32 = 544, got 576"),
        ({"q_latent_thc": torch.zeros(3, 512, 2).mT}, ValueError, "q_latent_thc: last dim must be contiguous"),
        ({"lse": torch.zeros(2, 3)}, ValueError, r"lse: shape must be \[3, 2\], got \[2, 3\]"),
        ({"out": torch.zeros(3, 2, 512).half()}, TypeError, "out: dtype must be float32, got float16"),
        ({"latent_cache": torch.zeros(2, 64, 576).long()}, TypeError, "latent_cache: dtype must be bfloat16 or"),
    ],
)
def test_sparse_refuses(change, error, message):
    with pytest.raises(error, match=message):
        sparse_mla(**{**cases.sparse_mla_inputs(3, 2, 4), **change})


def test_dense_and_masked_refuse():
    dense = cases.dense_mla_inputs([3], None, 2)
    with pytest.raises(ValueError, match=r"visible_t: shape must be \[1\], got \[2\]"):
        dense_mla(**{**dense, "visible_t": torch.zeros(2).int()})
    masked = cases.masked_mha_inputs([3], heads=2)
    with pytest.raises(TypeError, match="k_shd: dtype must be float32, got bfloat16"):
        masked_mha(**{**masked, "k_shd": masked["k_shd"].bfloat16()})
    with pytest.raises(ValueError, match=r"v_shv: shape must be \[3, 2, \*\], got \[2, 2, 128\]"):
        masked_mha(**{**masked, "v_shv": masked["v_shv"][:2]})
    with pytest.raises(ValueError, match="mask_tw: a row for 3 keys has at least 4 words, got 3"):
        masked_mha(**masked, mask_tw=torch.zeros(3, 3).int())
    with pytest.raises(ValueError, match=r"mask_tw: shape must be \[3, \*\], got \[2, 4\]"):
        masked_mha(**masked, mask_tw=torch.zeros(2, 4).int())
    with pytest.raises(TypeError, match="mask_tw: dtype must be int32, got int64"):
        masked_mha(**masked, mask_tw=torch.zeros(3, 4).long())
