"""masked_mha in Triton against float64, on a GPU, and at tiny sizes under Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from dsv32_plugin.kernels.ops.masked_mha import triton as mha_triton

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


def visible_keys(start, end, keys, selected=None):
    position = torch.arange(keys, device=DEVICE)
    visible = (position >= start[:, None]) & (position < end[:, None])
    if selected is not None:
        relative = position - start[:, None]
        chosen = torch.stack([torch.isin(r, s[s >= 0]) for r, s in zip(relative, selected, strict=True)])
        visible &= chosen
    return visible


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
    q, k, v = make(19, 45, 2, 24, 20, torch.float32)
    start = ints([0] * 9 + [20] * 10)
    end = ints([*range(1, 10), *range(21, 30), 20])
    selected = None
    if select:
        g = torch.Generator(device=DEVICE).manual_seed(1)
        selected = torch.rand(19, 12, generator=g, device=DEVICE).argsort(1).int()
        selected[:, 9:] = ints([-1, INT_MIN, INT_MAX])
        selected[3] = -1
    result = mha_triton.masked_mha(q, k, v, start, end, 0.2, selected_tk=selected)
    check(result, q, k, v, visible_keys(start, end, 45, selected), 0.2, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
def test_interpreter():
    """The tiny tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "tiny", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "2 passed" in done.stdout


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("select", [False, True], ids=["all", "selected"])
def test_several_sequences(dtype, heads, select):
    """Chunks of three sequences, one of them with a prefix; a sequence boundary inside a block of queries."""
    lengths, cached = [300, 77, 130], [0, 500, 3]
    starts, ends, base = [], [], 0
    for new, old in zip(lengths, cached, strict=True):
        starts += [base] * new
        ends += range(base + old + 1, base + old + new + 1)
        base += old + new
    tokens = sum(lengths)
    q, k, v = make(tokens, base, heads, 192, 128, dtype)
    start, end = ints(starts), ints(ends)
    selected = None
    if select:
        g = torch.Generator(device=DEVICE).manual_seed(1)
        noise = torch.rand(tokens, 600, generator=g, device=DEVICE)
        noise[torch.arange(600, device=DEVICE) >= (end - start)[:, None]] = 2
        order = noise.sort(1)
        selected = torch.where(order.values < 2, order.indices, -1)[:, :64].sort(1, descending=True).values.int()
        selected[5] = -1
    result = mha_triton.masked_mha(q, k, v, start, end, 0.07, selected_tk=selected)
    check(result, q, k, v, visible_keys(start, end, base, selected), 0.07, dtype)


@gpu
def test_nothing_visible_and_more_keys_than_end():
    q, k, v = make(70, 100, 3, 192, 128, torch.bfloat16)
    start = ints([50] * 70)
    end = ints([40] * 30 + [50] * 20 + [1000] * 20)
    visible = visible_keys(start, end, 100)
    check(mha_triton.masked_mha(q, k, v, start, end, 0.07), q, k, v, visible, 0.07, torch.bfloat16)


@gpu
def test_a_nan_reaches_only_the_tokens_that_see_it():
    q, k, v = make(64, 64, 2, 192, 128, torch.bfloat16)
    start, end = ints([0] * 64), ints(range(1, 65))
    clean = mha_triton.masked_mha(q, k, v, start, end, 0.07)[0]
    k, v = k.clone(), v.clone()
    v[40, 1] = float("nan")
    k[50, 0] = float("nan")
    out = mha_triton.masked_mha(q, k, v, start, end, 0.07)[0]
    assert torch.equal(out[:40], clean[:40])
    assert out[40:, 1].isnan().all()
    assert torch.equal(out[40:50, 0], clean[40:50, 0])
    assert out[50:, 0].isnan().all()


@gpu
def test_selection_in_several_launches(monkeypatch):
    q, k, v = make(200, 333, 2, 192, 128, torch.bfloat16)
    start, end = ints([0] * 200), ints(range(134, 334))
    selected = torch.randint(-3, 333, (200, 40), dtype=torch.int32, device=DEVICE)
    whole = mha_triton.masked_mha(q, k, v, start, end, 0.07, selected_tk=selected)
    monkeypatch.setattr(mha_triton, "MASK_BYTES", 64 * 44)
    parts = mha_triton.masked_mha(q, k, v, start, end, 0.07, selected_tk=selected)
    assert torch.equal(whole[0], parts[0])
    check(whole, q, k, v, visible_keys(start, end, 333, selected), 0.07, torch.bfloat16)
