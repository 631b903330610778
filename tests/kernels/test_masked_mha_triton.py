"""masked_mha in Triton and of sm90 against float64, on a GPU, and at tiny sizes under Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import cases
from dsv32_plugin.kernels.ops.masked_mha import triton as mha_triton
from dsv32_plugin.kernels.runtime import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
INT_MIN, INT_MAX = -(2**31), 2**31 - 1

gpu = pytest.mark.gpu
either = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs a GPU or the interpreter")


def make(tokens, keys, heads, dim, value_dim, dtype, seed=0):
    """q, k, v as slices of wider tensors: only the last dimension is contiguous."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)

    def random(rows, width):
        return torch.randn(rows, heads, width + 8, generator=g, device=DEVICE).to(dtype)[..., :width]

    return random(tokens, dim), random(keys, dim), random(keys, value_dim)


def ints(values):
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def visible_keys(start, end, keys):
    position = torch.arange(keys, device=DEVICE)
    return (position >= start[:, None]) & (position < end[:, None])


def check(result, q, k, v, visible, scale, dtype):
    """Elementwise: weights and result rounded to `dtype`, scores accumulated in float32 or a little less."""
    out, lse = result
    scores = scale * torch.einsum("thd,shd->ths", q.double(), k.double())
    size = scale * torch.einsum("thd,shd->ths", q.double().abs(), k.double().abs()).amax(-1)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    want_lse = scores.logsumexp(-1)
    weights = (scores - want_lse[..., None]).exp().masked_fill(~visible[:, None], 0)
    want = torch.einsum("ths,shv->thv", weights, v.double())
    spread = torch.einsum("ths,shv->thv", weights, v.double().abs())
    score_error = 2.0**-18 * (size + 1)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-16
    bound = (rounding + 2 * score_error[..., None]) * spread + 1e-30
    empty = ~visible.any(1)
    assert (out[empty] == 0).all()
    assert (lse[empty] == float("-inf")).all()
    assert ((out.double() - want).abs() <= bound).all()
    assert ((lse.double() - want_lse).abs() <= score_error)[~empty].all()


@either
@pytest.mark.parametrize("select", [False, True], ids=["all", "selected"])
def test_tiny(select):
    q, k, v = make(19, 145, 2, 24, 20, torch.float32)
    start = ints([0] * 9 + [20] * 10)
    end = ints([*range(1, 10), *range(21, 30), 145])
    visible, mask = visible_keys(start, end, 145), None
    if select:
        visible &= torch.rand(visible.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE) < 0.4
        visible[3] = False
        mask = cases.mask_of(visible)
    result = mha_triton.masked_mha(q, k, v, start, end, 0.2, mask_tw=mask)
    check(result, q, k, v, visible, 0.2, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
def test_interpreter():
    """The tiny tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "tiny", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "2 passed" in done.stdout


@pytest.fixture(params=dispatch.existing("masked_mha"))
def masked_mha(request):
    """Every implementation for GPUs that runs here; what a chip's own does not take, the next one does."""
    if request.param == "reference" or not HAS_GPU:
        pytest.skip("needs a GPU")
    if dispatch._hindrance("masked_mha", request.param, torch.device(DEVICE)) is not None:
        pytest.skip(f"{request.param} is for another chip")
    return dispatch.named("masked_mha", request.param)


WIDTHS = [(192, 128), (256, 256)]


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("select", [False, True], ids=["all", "selected"])
@pytest.mark.parametrize(("dim", "value_dim"), WIDTHS, ids=str)
def test_several_sequences(masked_mha, dtype, heads, select, dim, value_dim):
    """Chunks of three sequences, one of them with a prefix; a sequence boundary inside a block of queries."""
    lengths, cached = [300, 77, 130], [0, 500, 3]
    starts, ends, base = [], [], 0
    for new, old in zip(lengths, cached, strict=True):
        starts += [base] * new
        ends += range(base + old + 1, base + old + new + 1)
        base += old + new
    q, k, v = make(sum(lengths), base, heads, dim, value_dim, dtype)
    start, end = ints(starts), ints(ends)
    visible, mask = visible_keys(start, end, base), None
    if select:
        visible &= torch.rand(visible.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE) < 0.2
        visible[5] = False
        mask = cases.mask_of(visible)
    result = masked_mha(q, k, v, start, end, 0.07, mask_tw=mask)
    check(result, q, k, v, visible, 0.07, dtype)


@gpu
@pytest.mark.parametrize("kind", ["nothing", "one key", "everything", "none of a block", "none of some queries"])
@pytest.mark.parametrize(("dim", "value_dim"), WIDTHS, ids=str)
def test_masks(masked_mha, kind, dim, value_dim):
    tokens, keys = 300, 1111
    q, k, v = make(tokens, keys, 3, dim, value_dim, torch.bfloat16)
    start, end = ints([0] * tokens), ints(range(keys - tokens + 1, keys + 1))
    row = torch.arange(tokens, device=DEVICE)
    visible = visible_keys(start, end, keys)
    if kind == "nothing":
        visible[:] = False
    elif kind == "one key":
        visible[:] = False
        visible[row, 3 * row % 800] = True
    elif kind == "none of a block":
        visible[:, 128:640] = False
    elif kind == "none of some queries":
        visible[128:256] = False
        visible[7] = False
    result = masked_mha(q, k, v, start, end, 0.07, mask_tw=cases.mask_of(visible))
    check(result, q, k, v, visible, 0.07, torch.bfloat16)


@gpu
def test_nothing_visible_and_more_keys_than_end(masked_mha):
    q, k, v = make(70, 100, 3, 192, 128, torch.bfloat16)
    start = ints([50] * 70)
    end = ints([40] * 30 + [50] * 20 + [1000] * 20)
    visible = visible_keys(start, end, 100)
    check(masked_mha(q, k, v, start, end, 0.07), q, k, v, visible, 0.07, torch.bfloat16)


@gpu
@pytest.mark.parametrize("select", [False, True], ids=["all", "selected"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_reaches_only_the_tokens_that_see_it(masked_mha, select, value):
    q, k, v = make(300, 300, 2, 192, 128, torch.bfloat16)
    start, end = ints([0] * 300), ints(range(1, 301))
    mask = cases.mask_of(visible_keys(start, end, 300)) if select else None
    clean, clean_lse = masked_mha(q, k, v, start, end, 0.07, mask_tw=mask)
    k, v = k.clone(), v.clone()
    v[140, 1] = value
    k[150, 0] = float("nan")
    out, lse = masked_mha(q, k, v, start, end, 0.07, mask_tw=mask)
    # The blocks that saw it are computed by another kernel.
    assert torch.equal(out[:128], clean[:128])
    torch.testing.assert_close(out[:140, 1], clean[:140, 1], rtol=2**-7, atol=2**-7)
    assert not out[140:, 1].isfinite().any()
    torch.testing.assert_close(out[:150, 0], clean[:150, 0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(lse[:140], clean_lse[:140])
    assert out[150:, 0].isnan().all()


@gpu
def test_keys_and_values_lie_head_after_head(masked_mha):
    """As products over heads leave them; queries are a slice of a wider tensor."""
    q, k, v = make(200, 333, 4, 192, 128, torch.bfloat16)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    out = torch.full((200, 6, 128), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    start, end = ints([0] * 200), ints(range(134, 334))
    result = masked_mha(q, k, v, start, end, 0.07, out=out[:, 1:5])
    check(result, q, k, v, visible_keys(start, end, 333), 0.07, torch.bfloat16)
    assert out[:, [0, 5]].isnan().all()
