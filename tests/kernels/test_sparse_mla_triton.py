"""sparse_mla and dense_mla in Triton against float64, on a GPU, and at tiny sizes under Triton's interpreter."""

import functools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.ops.dense_mla import triton as dense_triton
from dsv32_plugin.kernels.ops.sparse_mla import triton as sparse_triton
from dsv32_plugin.kernels.runtime.dispatch import implementation_for, named

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
SCALE = 0.135
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
CACHES = ["fp8", "float"]
IMPLEMENTATIONS = {"triton": sparse_triton.sparse_mla}
DENSE = {"triton": dense_triton.dense_mla}
if HAS_GPU and implementation_for("sparse_mla", "cuda").name == "hopper":
    IMPLEMENTATIONS["hopper"] = named("sparse_mla", "hopper")
    DENSE["hopper"] = named("dense_mla", "hopper")

gpu = pytest.mark.gpu
every_implementation = pytest.mark.parametrize("sparse_mla", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
every_dense = pytest.mark.parametrize("dense_mla", DENSE.values(), ids=DENSE.keys())
either = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs a GPU or the interpreter")


def make_cache(kind, slots, page_size=64, dtype=torch.bfloat16, seed=0, spread=1.0):
    """A cache of random rows, in pages that are further apart than their size, and its rows in float64."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    pages = slots // page_size
    rows = torch.randn(slots, layout.LATENT_WIDTH, generator=g, device=DEVICE) * spread
    if kind == "float":
        values = rows.to(dtype)
        width = layout.LATENT_WIDTH
        exact = values.double()
    else:
        tiles = rows[:, : layout.LATENT_RANK].unflatten(1, (layout.LATENT_TILES, layout.LATENT_TILE))
        exponent = torch.ceil(torch.log2(tiles.abs().amax(-1).clamp(min=layout.AMAX_FLOOR) / layout.FP8_MAX))
        scales = torch.exp2(exponent)
        codes = (tiles / scales[..., None]).to(torch.float8_e4m3fn)
        rope = rows[:, layout.LATENT_RANK :].bfloat16()
        values = torch.cat(
            (
                codes.flatten(1).view(torch.uint8),
                scales.float().view(torch.uint8),
                rope.view(torch.uint8),
            ),
            1,
        )
        width = layout.LATENT_BYTES_FP8
        exact = torch.cat(((codes.double() * scales[..., None]).flatten(1), rope.double()), 1)
    room = torch.empty(pages, page_size * width + 16 * width, dtype=values.dtype, device=DEVICE)
    room.fill_(0x7F if kind == "fp8" else float("nan"))
    cache = room[:, : page_size * width].unflatten(1, (page_size, width))
    cache.copy_(values.view(pages, page_size, width))
    return cache, exact


def make_query(tokens, heads, dtype, seed=1, spread=1.0):
    """Queries as slices of wider tensors: only the last dimension is contiguous."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    latent = torch.randn(tokens, heads, layout.LATENT_RANK + 32, generator=g, device=DEVICE) * spread
    rope = torch.randn(tokens, heads + 1, layout.ROPE_DIM, generator=g, device=DEVICE) * spread
    return latent.to(dtype)[..., : layout.LATENT_RANK], rope.to(dtype)[:, 1:]


def expect(q_latent, q_rope, exact, slots, dtype, scale=SCALE):
    """(out, lse, elementwise bound of the error of out, bound of lse) in float64.

    The weights and the result are rounded to `dtype` (half of eps each; the weights' sum is not);
    a score is a sum of 576 exact products, accumulated in float32 or a little less on tensor cores.
    """
    query = torch.cat((q_latent, q_rope), -1).double()
    present = (slots >= 0) & (slots < len(exact))
    rows = exact[slots.where(present, 0).long()]
    rows = rows.where(present[..., None], 0)
    scores = scale * torch.einsum("thd,tkd->thk", query, rows)
    scores = scores.masked_fill(~present[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~present[:, None], 0)
    out = torch.einsum("thk,tkc->thc", weights, rows[..., : layout.LATENT_RANK])
    size = torch.einsum("thk,tkc->thc", weights, rows[..., : layout.LATENT_RANK].abs())
    score_size = scale * torch.einsum("thd,tkd->thk", query.abs(), rows.abs()).amax(-1)
    score_error = 2.0**-18 * (score_size + 1)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-16
    return out, lse, (rounding + 2 * score_error[..., None]) * size + 1e-30, score_error


def check(result, q_latent, q_rope, exact, slots, dtype, scale=SCALE):
    out, lse = result
    want_out, want_lse, bound, lse_bound = expect(q_latent, q_rope, exact, slots, dtype, scale)
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert (out[empty] == 0).all()
    excess = ((out.double() - want_out).abs() / bound).amax().item()
    assert excess <= 1, f"out is {excess:.2f} times its bound away"
    assert ((lse.double() - want_lse).abs() <= lse_bound)[~empty].all()


def slots_like_selection(tokens, keys, slots, present, seed=2):
    """Ascending distinct slots, then -1, as select_topk writes them; `present` of each row."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    chosen = torch.rand(tokens, slots, generator=g, device=DEVICE).argsort(1)[:, :keys].sort(1).values.int()
    order = torch.arange(chosen.shape[1], device=DEVICE)
    return torch.where(order < torch.tensor(present, device=DEVICE)[:, None], chosen, -1).contiguous()


@either
@pytest.mark.parametrize("kind", CACHES)
def test_tiny(kind):
    """Two programs a row, an absent slot of every kind, an empty row; float32, exact in the interpreter."""
    cache, exact = make_cache(kind, 160, page_size=16, dtype=torch.float32)
    q_latent, q_rope = make_query(3, 3, torch.float32)
    slots = slots_like_selection(3, 70, 160, [70, 9, 0])
    slots[0, :5] = torch.tensor([-1, INT_MIN, INT_MAX, 160, -7], dtype=torch.int32)
    lse = torch.empty(3, 5, device=DEVICE)[:, :3]
    result = sparse_triton.sparse_mla(q_latent, q_rope, cache, slots, SCALE, lse=lse)
    assert result[1] is lse
    check(result, q_latent, q_rope, exact, slots, torch.float32)


@either
@pytest.mark.parametrize("kind", CACHES)
def test_tiny_dense(kind):
    cache, exact = make_cache(kind, 160, page_size=16, dtype=torch.float32)
    q_latent, q_rope = make_query(3, 2, torch.float32)
    table = torch.tensor([[7, 2, INT_MAX], [5, 999, 3]], dtype=torch.int32, device=DEVICE)
    seq = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    visible = torch.tensor([19, 40, 0], dtype=torch.int32, device=DEVICE)
    result = dense_triton.dense_mla(q_latent, q_rope, cache, table, seq, visible, SCALE, max_visible=48)
    slots = dense_slots(table, seq, visible, 48, 16, 10)
    check(result, q_latent, q_rope, exact, slots, torch.float32)


def dense_slots(table, seq, visible, longest, page_size, pages):
    position = torch.arange(longest, device=DEVICE)
    column = position // page_size
    page = table.long()[seq.long()][:, column.clamp(max=table.shape[1] - 1)]
    known = (position < visible[:, None]) & (column < table.shape[1]) & (page >= 0) & (page < pages)
    return torch.where(known, page * page_size + position % page_size, -1)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
def test_interpreter():
    """The tiny tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "tiny", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "4 passed" in done.stdout


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", [1, 8, 16, 24, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_heads_and_tokens(sparse_mla, kind, heads, tokens):
    if tokens == 300 and heads not in (16, 128):
        pytest.skip("covered by the other sizes")
    cache, exact = make_cache(kind, 8192)
    q_latent, q_rope = make_query(tokens, heads, torch.bfloat16)
    keys = 2048 if tokens < 300 else 512
    slots = slots_like_selection(tokens, keys, 8192, ([keys, 1, keys - 65, 0, 700] * 60)[:tokens])
    result = sparse_mla(q_latent, q_rope, cache, slots, SCALE)
    check(result, q_latent, q_rope, exact, slots, torch.bfloat16)


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("keys", [1, 63, 65, 500, 2049])
def test_odd_numbers_of_keys_and_absent_slots_anywhere(sparse_mla, kind, keys):
    cache, exact = make_cache(kind, 4096 + 32, page_size=48)
    q_latent, q_rope = make_query(9, 16, torch.bfloat16)
    slots = slots_like_selection(9, keys, 4128, [keys] * 9)
    slots = slots.gather(1, torch.rand(slots.shape, device=DEVICE).argsort(1))
    bad = torch.tensor([-1, INT_MIN, INT_MAX, 4128, -2], dtype=torch.int32, device=DEVICE)
    spoil = torch.rand(slots.shape, device=DEVICE) < 0.3
    spoil[0] = False
    spoil[1] = True
    slots = torch.where(spoil, bad[torch.randint(5, slots.shape, device=DEVICE)], slots)
    check(sparse_mla(q_latent, q_rope, cache, slots, SCALE), q_latent, q_rope, exact, slots, torch.bfloat16)


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
def test_rows_that_are_not_selected_may_hold_nan(sparse_mla, kind):
    cache, exact = make_cache(kind, 4096)
    q_latent, q_rope = make_query(4, 16, torch.bfloat16)
    slots = slots_like_selection(4, 1000, 4096, [1000, 333, 64, 0])
    unused = torch.ones(4096, dtype=torch.bool, device=DEVICE)
    unused[slots[slots >= 0].long()] = False
    rows = unused.nonzero().squeeze(1)
    if kind == "fp8":
        cache[rows // 64, rows % 64] = 0xFF
    else:
        cache[rows // 64, rows % 64] = float("nan")
    check(sparse_mla(q_latent, q_rope, cache, slots, SCALE), q_latent, q_rope, exact, slots, torch.bfloat16)


@gpu
@every_implementation
@pytest.mark.parametrize("exponent", [-9, 0, 7])
def test_every_e4m3_code_is_exact(sparse_mla, exponent):
    """One key a row: the result is that key, to the last bit; subnormal codes included."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8, device=DEVICE)
    rows = torch.stack([codes.roll(i).repeat(3)[:512] for i in range(64)])
    scales = torch.full((64, 4), 2.0**exponent, device=DEVICE)
    scales[:, 1] /= 4
    rope = torch.zeros(64, 64, dtype=torch.bfloat16, device=DEVICE)
    cache = torch.cat((rows, scales.view(torch.uint8), rope.view(torch.uint8)), 1)[None].contiguous()
    q_latent, q_rope = make_query(64, 16, torch.bfloat16, spread=1e-3)
    slots = torch.arange(64, dtype=torch.int32, device=DEVICE)[:, None]
    out, lse = sparse_mla(q_latent, q_rope, cache, slots, 1.0)
    want = rows.view(torch.float8_e4m3fn).double() * scales.double().repeat_interleave(128, 1)
    assert torch.equal(out.double(), want[:, None].expand_as(out))
    want_lse = torch.einsum("thc,tc->th", q_latent.double(), want)
    size = torch.einsum("thc,tc->th", q_latent.double().abs(), want.abs())
    assert ((lse - want_lse).abs() <= 2.0**-18 * size).all()


@gpu
@every_implementation
def test_scores_far_apart(sparse_mla):
    cache, exact = make_cache("fp8", 4096, spread=8.0)
    q_latent, q_rope = make_query(8, 16, torch.bfloat16, spread=8.0)
    slots = slots_like_selection(8, 2048, 4096, [2048] * 8)
    check(sparse_mla(q_latent, q_rope, cache, slots, 1.0), q_latent, q_rope, exact, slots, torch.bfloat16, scale=1.0)


@gpu
@every_implementation
@pytest.mark.parametrize("heads", [16, 64])
def test_queries_and_scales_of_very_different_sizes(sparse_mla, heads):
    """Heads from 2^-30 to 2^3, latents whose tiles differ by 2^16: more than a float16 holds at once."""
    g = torch.Generator(device=DEVICE).manual_seed(5)
    cache, exact = make_cache("fp8", 1024)
    factor = torch.exp2(torch.randint(-12, 5, (1024, layout.LATENT_TILES), generator=g, device=DEVICE).float())
    scales = cache[..., layout.LATENT_SCALES_OFFSET : layout.LATENT_ROPE_OFFSET].view(torch.float32)
    scales *= factor.view(scales.shape)
    exact[:, : layout.LATENT_RANK] *= factor.double().repeat_interleave(layout.LATENT_TILE, 1)
    q_latent, q_rope = make_query(6, heads, torch.bfloat16)
    sizes = torch.exp2(torch.linspace(-30, 3, heads, device=DEVICE).round())[:, None].bfloat16()
    q_latent, q_rope = q_latent * sizes, q_rope * sizes
    q_latent[:, -1, 100:] = 0
    slots = slots_like_selection(6, 700, 1024, [700, 64, 65, 3, 500, 1])
    check(sparse_mla(q_latent, q_rope, cache, slots, SCALE), q_latent, q_rope, exact, slots, torch.bfloat16)


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
def test_addresses_past_two_gigabytes(sparse_mla, kind):
    pages = 70_000
    width, dtype = (656, torch.uint8) if kind == "fp8" else (576, torch.bfloat16)
    cache = torch.empty(pages, 64, width, dtype=dtype, device=DEVICE)
    small, exact = make_cache(kind, 128)
    cache[:1], cache[-1:] = small[:1], small[1:]
    slots = torch.cat((torch.arange(64), (pages - 1) * 64 + torch.arange(64))).int().to(DEVICE).repeat(2, 1)
    q_latent, q_rope = make_query(2, 16, torch.bfloat16)
    result = sparse_mla(q_latent, q_rope, cache, slots, SCALE)
    near = torch.arange(128, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    check(result, q_latent, q_rope, exact, near, torch.bfloat16)


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
def test_more_rows_than_a_grid_dimension(sparse_mla, kind):
    tokens = 70_001
    cache, exact = make_cache(kind, 256)
    q_latent, q_rope = make_query(tokens, 1, torch.bfloat16)
    slots = torch.randint(-20, 256, (tokens, 16), dtype=torch.int32, device=DEVICE)
    out, lse = sparse_mla(q_latent, q_rope, cache, slots, SCALE)
    for part in (slice(0, 500), slice(65_300, 65_800), slice(69_501, None)):
        check((out[part], lse[part]), q_latent[part], q_rope[part], exact, slots[part], torch.bfloat16)


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", [16, 128])
def test_captured_graph_follows_new_lengths(sparse_mla, kind, heads):
    cache, exact = make_cache(kind, 4096)
    q_latent, q_rope = make_query(4, heads, torch.bfloat16)
    slots = torch.full((4, 2048), -1, dtype=torch.int32, device=DEVICE)
    out, lse = torch.empty_like(q_latent, memory_format=torch.contiguous_format), torch.empty(4, heads, device=DEVICE)
    sparse_mla(q_latent, q_rope, cache, slots, SCALE, out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_mla(q_latent, q_rope, cache, slots, SCALE, out=out, lse=lse)
    for present in ([2048, 5, 0, 1000], [1, 2048, 2048, 0], [0, 0, 0, 0], [64, 128, 129, 2047]):
        slots.copy_(slots_like_selection(4, 2048, 4096, present, seed=sum(present)))
        out.fill_(float("nan"))
        graph.replay()
        check((out, lse), q_latent, q_rope, exact, slots, torch.bfloat16)


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", [16, 128])
def test_runs_agree_bit_for_bit_and_rows_do_not_in_the_invariant_mode_depend_on_the_batch(sparse_mla, kind, heads):
    sparse_mla = functools.partial(sparse_mla, batch_invariant=True)
    cache, _ = make_cache(kind, 4096)
    q_latent, q_rope = make_query(600, heads, torch.bfloat16)
    slots = slots_like_selection(600, 2048, 4096, ([2048, 700, 1] * 200)[:600])
    out, lse = sparse_mla(q_latent, q_rope, cache, slots, SCALE)
    again, _ = sparse_mla(q_latent, q_rope, cache, slots, SCALE)
    assert torch.equal(out, again)
    for rows in (slice(0, 1), slice(7, 10), slice(100, 164)):
        part, part_lse = sparse_mla(q_latent[rows], q_rope[rows], cache, slots[rows], SCALE)
        assert torch.equal(part, out[rows])
        assert torch.equal(part_lse, lse[rows])


@gpu
@every_dense
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", [3, 16, 24, 128])
@pytest.mark.parametrize("page_size", [48, 64])
def test_dense(dense_mla, kind, heads, page_size):
    """Several tokens of a sequence, an unknown page in the middle and at the end, NaN in rows that no token sees."""
    pages = 128
    cache, exact = make_cache(kind, pages * page_size, page_size)
    table = torch.randperm(pages, dtype=torch.int32, device=DEVICE).view(4, 32)
    table[2, 20:] = INT_MAX
    table[1, 3] = -1
    longest = 32 * page_size
    lengths = torch.tensor([longest, 700, longest - 40, 0], dtype=torch.int32, device=DEVICE)
    last = table[1, 700 // page_size]
    cache[last, 700 % page_size :] = 0xFF if kind == "fp8" else float("nan")
    seq = torch.arange(4, dtype=torch.int32, device=DEVICE).repeat_interleave(3)
    behind = torch.tensor([2, 1, 0], dtype=torch.int32, device=DEVICE).repeat(4)
    visible = (lengths.repeat_interleave(3) - behind).clamp(0)
    q_latent, q_rope = make_query(12, heads, torch.bfloat16)
    for bound in (longest, longest + 500, 640):
        result = dense_mla(q_latent, q_rope, cache, table, seq, visible, SCALE, max_visible=bound)
        slots = dense_slots(table, seq, visible, bound, page_size, pages)
        check(result, q_latent, q_rope, exact, slots, torch.bfloat16)


@gpu
@every_dense
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", [16, 128])
def test_dense_in_a_captured_graph_follows_new_lengths(dense_mla, kind, heads):
    cache, exact = make_cache(kind, 8192)
    table = torch.randperm(128, dtype=torch.int32, device=DEVICE).view(4, 32)
    seq = torch.arange(4, dtype=torch.int32, device=DEVICE)
    visible = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    q_latent, q_rope = make_query(4, heads, torch.bfloat16)
    out, lse = torch.empty_like(q_latent, memory_format=torch.contiguous_format), torch.empty(4, heads, device=DEVICE)

    def run():
        dense_mla(q_latent, q_rope, cache, table, seq, visible, SCALE, max_visible=2048, out=out, lse=lse)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([2048, 5, 0, 1000], [1, 2048, 2048, 0], [0, 0, 0, 0], [64, 128, 129, 2047]):
        visible.copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        check((out, lse), q_latent, q_rope, exact, dense_slots(table, seq, visible, 2048, 64, 128), torch.bfloat16)


@gpu
@every_dense
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", [16, 128])
def test_dense_rows_do_not_in_the_invariant_mode_depend_on_the_batch(dense_mla, kind, heads):
    dense_mla = functools.partial(dense_mla, batch_invariant=True)
    cache, _ = make_cache(kind, 8192)
    table = torch.randperm(128, dtype=torch.int32, device=DEVICE).view(4, 32)
    seq = torch.arange(200, dtype=torch.int32, device=DEVICE) % 4
    visible = (torch.arange(200, dtype=torch.int32, device=DEVICE) * 37) % 2048 + 1
    q_latent, q_rope = make_query(200, heads, torch.bfloat16)
    out, lse = dense_mla(q_latent, q_rope, cache, table, seq, visible, SCALE, max_visible=2048)
    for rows in (slice(0, 1), slice(7, 10), slice(100, 164)):
        part, part_lse = dense_mla(
            q_latent[rows], q_rope[rows], cache, table, seq[rows], visible[rows], SCALE, max_visible=2048
        )
        assert torch.equal(part, out[rows])
        assert torch.equal(part_lse, lse[rows])


@gpu
@every_implementation
@pytest.mark.parametrize("kind", CACHES)
def test_float32_agrees_closely(sparse_mla, kind):
    cache, exact = make_cache(kind, 2048, dtype=torch.float32)
    q_latent, q_rope = make_query(3, 20, torch.float32)
    slots = slots_like_selection(3, 512, 2048, [512, 100, 0])
    check(sparse_mla(q_latent, q_rope, cache, slots, SCALE), q_latent, q_rope, exact, slots, torch.float32)
