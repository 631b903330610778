"""norm_rope_cache, index_query and gather_cache in Triton against float64 and the reference.

On a GPU, and at tiny sizes under Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.ops.gather_cache import reference as gather_reference
from dsv32_plugin.kernels.ops.gather_cache import triton as gather_triton
from dsv32_plugin.kernels.ops.index_query import reference as query_reference
from dsv32_plugin.kernels.ops.index_query import triton as query_triton
from dsv32_plugin.kernels.ops.norm_rope_cache import reference as norm_reference
from dsv32_plugin.kernels.ops.norm_rope_cache import triton as norm_triton
from dsv32_plugin.kernels.ops.rope_query import triton as rope_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
either = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs a GPU or the interpreter")


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")(test))


EPS = 1e-6
# Half a unit in the last place, relative; the interpreter of Triton 3.6 truncates when it casts to bfloat16.
ROUNDING = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FP8_ROUNDING, FP8_SMALLEST = 2.0**-4, 2.0**-10
# A few float32 roundings and the approximate reciprocal root, relative to the sum of magnitudes.
FLOAT32_NOISE = 2.0**-20


def generator(seed):
    return torch.Generator(device=DEVICE).manual_seed(seed)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), device=DEVICE).to(dtype)


def rope_table(positions, rope_dim):
    frequency = 10000.0 ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64, device=DEVICE) / rope_dim)
    angle = torch.arange(positions, dtype=torch.float64, device=DEVICE)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1).float()


def padded_cache(pages, page_size, width, dtype, seed=9):
    """A cache of noise whose pages are further apart than their size, and the storage it lies in."""
    stride = page_size * width + 64
    if dtype == torch.uint8:
        room = torch.randint(0, 256, (pages, stride), generator=generator(seed), device=DEVICE, dtype=torch.uint8)
    else:
        room = random(pages, stride, seed=seed, dtype=dtype)
    return room[:, : page_size * width].view(pages, page_size, width), room


def sylvester(dim):
    """H[i, j] = (-1)^popcount(i & j)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(dim.bit_length() - 1):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix.to(DEVICE)


def rope64(x, cos_sin, interleaved):
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[..., :half].double(), cos_sin[..., half:].double()
    result = x.clone()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., second] * cos + x[..., first] * sin
    return result


def rope_bound(x, cos_sin, interleaved):
    """The same sums over magnitudes: what an error of each input can become."""
    half = cos_sin.shape[-1] // 2
    return rope64(
        x.abs(), torch.cat((cos_sin[..., :half].abs(), -cos_sin[..., half:].abs()), -1), interleaved
    ).abs() + (rope64(x.abs(), cos_sin.abs(), interleaved).abs())


def index_key64(key, weight, bias, cos_sin, interleaved, rotate, dtype):
    """(exact, bound on the error of one that follows the definition before it is stored)."""
    key, weight, bias = key.double(), weight.double(), bias.double()
    centred = key - key.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS) * weight + bias
    error = normed.abs() * ROUNDING[dtype] + (normed.abs() + 4 * weight.abs() + bias.abs()) * FLOAT32_NOISE
    exact, error = rope64(normed, cos_sin, interleaved), rope_bound(error, cos_sin, interleaved)
    return rotated64(exact, error) if rotate else (exact, error)


def rotated64(exact, error):
    dim = exact.shape[-1]
    error = (error.sum(-1, keepdim=True) + exact.abs().sum(-1, keepdim=True) * FLOAT32_NOISE) * dim**-0.5
    return exact @ sylvester(dim) * dim**-0.5, error.expand(exact.shape)


def rms_norm64(x, weight, dtype):
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight.double()
    return exact, exact.abs() * (2.01 * ROUNDING[dtype] + FLOAT32_NOISE)


def check_close(got, exact, error, dtype):
    limit = error + (exact.abs() + error) * ROUNDING[dtype] + 2.0**-126
    assert got.double().isfinite().all()
    worst = ((got.double() - exact).abs() / limit).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


def check_quantised(codes, scale, exact, error):
    """`scale` [..., tiles, 1] is the right power of two, or the one next to it where rounding decides; values round."""
    amax = exact.abs().amax(-1, keepdim=True)
    slack = error.amax(-1, keepdim=True)
    low, high = (amax - slack).clamp(min=layout.AMAX_FLOOR), (amax + slack).clamp(min=layout.AMAX_FLOOR)
    floor = torch.exp2(torch.ceil(torch.log2(low / layout.FP8_MAX) - 1e-12))
    ceiling = torch.exp2(torch.ceil(torch.log2(high / layout.FP8_MAX) - 1e-12))
    assert ((scale >= floor) & (scale <= ceiling)).all()
    got = codes.view(torch.float8_e4m3fn).double() * scale
    assert got.isfinite().all()
    limit = error + (exact.abs() + error) * FP8_ROUNDING + FP8_SMALLEST * scale
    worst = ((got - exact).abs() / limit).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


def check_same_codes(got, expected):
    """Two computations in float32 may round one code in many to the neighbour, never further."""
    got, expected = got.view(torch.uint8).int().flatten(), expected.view(torch.uint8).int().flatten()
    assert ((got - expected).abs() % 0x80 <= 1).all()
    assert (got != expected).float().mean() < 0.01


class Layer:
    """One call of norm_rope_cache on fresh caches of noise, with inputs sliced out of one fused projection."""

    def __init__(
        self,
        tokens,
        *,
        q_width=1536,
        rank=512,
        rope=64,
        index=128,
        dtype=torch.bfloat16,
        latent="fp8",
        index_layout="fp8",
        interleaved=False,
        rotate=True,
        page_size=64,
        pages=9,
        scale=1.0,
        slots=None,
    ):
        self.dtype, self.interleaved, self.rotate = dtype, interleaved, rotate
        self.rank, self.rope, self.index = rank, rope, index
        fused = random(tokens, q_width + rank + rope, seed=1, dtype=torch.float32) * scale
        self.q, self.kv, self.k_pe = fused.to(dtype).split((q_width, rank, rope), 1)
        wide = random(tokens, index + 64, seed=2) * scale
        self.key = None if index_layout is None else wide.to(dtype)[:, :index]
        self.positions = torch.randint(0, 4096, (tokens,), generator=generator(3), device=DEVICE)
        self.table = rope_table(4096, rope)
        self.q_weight = 1 + random(q_width, seed=4, dtype=dtype) / 8
        self.kv_weight = 1 + random(rank, seed=5, dtype=dtype) / 8
        self.index_weight, self.index_bias = 1 + random(index, seed=6) / 8, random(index, seed=7) / 8
        if slots is None:
            slots = torch.randperm(pages * page_size, generator=generator(8), device=DEVICE)[:tokens]
            slots[1::4] = -1
        self.slots = slots
        width = layout.LATENT_BYTES_FP8 if latent == "fp8" else rank + rope
        self.latent, self.latent_room = padded_cache(pages, page_size, width, torch.uint8 if latent == "fp8" else dtype)
        self.index_cache = self.index_room = None
        if index_layout is not None:
            width = index + layout.SCALE_BYTES if index_layout == "fp8" else index
            kind = torch.uint8 if index_layout == "fp8" else dtype
            self.index_cache, self.index_room = padded_cache(pages, page_size, width, kind)

    def run(self, function, out=None):
        present = self.key is not None
        return function(
            self.q, self.kv, self.k_pe, self.key, self.positions, self.slots, self.table,
            q_a_weight_l=self.q_weight, kv_a_weight_c=self.kv_weight, eps=EPS, latent_cache=self.latent,
            index_k_weight_d=self.index_weight if present else None,
            index_k_bias_d=self.index_bias if present else None,
            index_eps=EPS, index_cache=self.index_cache, interleaved=self.interleaved, rotate=self.rotate, out=out,
        )  # fmt: skip

    def check(self):
        """The norms, both caches, and every byte beside the rows that were written."""
        owned = [self._owned(room, layout_name) for room, layout_name in self._rooms()]
        before = [room.clone() for room, _ in self._rooms()]
        check_close(self.run(norm_triton.norm_rope_cache), *rms_norm64(self.q, self.q_weight, self.dtype), self.dtype)
        self._check_latents()
        if self.key is not None:
            self._check_index_keys()
        after = [room.clone() for room, _ in self._rooms()]
        for old, new, mine in zip(before, after, owned, strict=True):
            assert torch.equal(new[~mine].view(torch.uint8), old[~mine].view(torch.uint8))
        self.run(norm_reference.norm_rope_cache)
        for (room, name), new, mine in zip(self._rooms(), after, owned, strict=True):
            if name.endswith("fp8"):
                assert (room[mine] != new[mine]).float().mean() < (0.3 if INTERPRETED else 0.01)

    def _rooms(self):
        rooms = [(self.latent_room, f"latent-{'fp8' if self.latent.dtype == torch.uint8 else 'float'}")]
        if self.index_room is not None:
            rooms.append((self.index_room, f"index-{'fp8' if self.index_cache.dtype == torch.uint8 else 'float'}"))
        return rooms

    def _owned(self, room, name):
        """Which elements of a cache's storage the written slots own."""
        owned = torch.zeros(room.shape, dtype=torch.bool, device=DEVICE)
        _, page, offset = self._written()
        width = {"latent": self.latent.shape[2], "index": self.index}[name.split("-")[0]]
        columns = offset[:, None] * width + torch.arange(width, device=DEVICE)
        owned[page[:, None], columns] = True
        if name == "index-fp8":
            page_size = self.latent.shape[1]
            begin = layout.index_scales_offset(page_size, self.index)
            columns = begin + offset[:, None] * layout.SCALE_BYTES + torch.arange(layout.SCALE_BYTES, device=DEVICE)
            owned[page[:, None], columns] = True
        return owned

    def _written(self):
        present = (self.slots >= 0) & (self.slots < self.latent.shape[0] * self.latent.shape[1])
        page_size = self.latent.shape[1]
        slots = self.slots[present]
        return present, slots // page_size, slots % page_size

    def _check_latents(self):
        present, page, offset = self._written()
        rows = self.latent[page, offset]
        exact, error = rms_norm64(self.kv[present], self.kv_weight, self.dtype)
        cos_sin = self.table[self.positions[present]]
        rope_key = rope64(self.k_pe[present].double(), cos_sin, True)
        rope_error = rope_bound(self.k_pe[present].double(), cos_sin, True) * FLOAT32_NOISE
        if rows.dtype == torch.uint8:
            scales = rows[:, layout.LATENT_SCALES_OFFSET : layout.LATENT_ROPE_OFFSET].contiguous().view(torch.float32)
            tiles = (len(rows), layout.LATENT_TILES, layout.LATENT_TILE)
            codes = rows[:, : layout.LATENT_RANK].contiguous().view(tiles)
            check_quantised(codes, scales.double()[..., None], exact.view(tiles), error.view(tiles))
            stored = rows[:, layout.LATENT_ROPE_OFFSET :].contiguous().view(torch.bfloat16)
            check_close(stored, rope_key, rope_error, torch.bfloat16)
        else:
            check_close(rows[:, : self.rank], exact, error, self.dtype)
            check_close(rows[:, self.rank :], rope_key, rope_error, self.dtype)

    def _check_index_keys(self):
        present, page, offset = self._written()
        exact, error = index_key64(
            self.key[present], self.index_weight, self.index_bias, self.table[self.positions[present]],
            self.interleaved, self.rotate, self.dtype,
        )  # fmt: skip
        if self.index_cache.dtype == torch.uint8:
            page_size = self.latent.shape[1]
            codes = self.index_room[:, : page_size * self.index].view(-1, page_size, self.index)[page, offset]
            begin = layout.index_scales_offset(page_size, self.index)
            end = begin + page_size * layout.SCALE_BYTES
            scales = self.index_room[:, begin:end].contiguous().view(torch.float32)[page, offset]
            check_quantised(codes, scales.double()[:, None], exact, error)
        else:
            check_close(self.index_cache[page, offset], exact, error, self.dtype)


@either
@pytest.mark.parametrize("index_layout", ["fp8", "float", None])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_tiny_float_layer(index_layout, interleaved):
    if index_layout is None and interleaved:
        pytest.skip("there is no index key to rotate")
    Layer(
        5, q_width=48, rank=32, rope=16, index=32, dtype=torch.float32, latent="float", index_layout=index_layout,
        interleaved=interleaved, rotate=index_layout == "fp8", page_size=16, pages=3,
    ).check()  # fmt: skip


@either
def test_tiny_fp8_layer():
    Layer(3, q_width=16, dtype=torch.float32, page_size=16, pages=2).check()


@either
def test_tiny_query():
    check_query(2, 3, index=32, rope=16, dtype=torch.float32)


@either
@pytest.mark.parametrize("kind", ["fp8", "float"])
def test_tiny_gather(kind):
    check_gather(kind, lengths=[3, 0, 17], page_size=16, pages=5, extra=2, dtype=torch.float32)


@either
def test_tiny_rope_query():
    check_rope_query(2, 3)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
def test_interpreter():
    """The tiny tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "tiny", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@gpu
@pytest.mark.parametrize("latent", ["fp8", "float"])
@pytest.mark.parametrize("index_layout", ["fp8", "float", None])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_layer(latent, index_layout, tokens):
    Layer(tokens, latent=latent, index_layout=index_layout, rotate=index_layout == "fp8").check()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype):
    Layer(33, dtype=dtype, interleaved=True).check()


@gpu
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4], ids=["zeros", "small", "large"])
def test_magnitudes(scale):
    Layer(64, scale=scale, dtype=torch.float32).check()


@gpu
def test_glm_shape():
    Layer(40, q_width=2048, interleaved=True).check()


@gpu
def test_no_tokens():
    layer = Layer(0)
    before = layer.latent_room.clone()
    assert layer.run(norm_triton.norm_rope_cache).shape == (0, 1536)
    assert torch.equal(layer.latent_room, before)


@gpu
def test_slots_that_are_absent_are_not_written():
    slots = torch.tensor([-1, 9 * 64, 2**62, -(2**62), 5], device=DEVICE)
    layer = Layer(5, slots=slots)
    before = layer.latent_room.clone()
    layer.run(norm_triton.norm_rope_cache)
    changed = (layer.latent_room != before).nonzero()
    assert (changed[:, 0] == 0).all()
    assert changed[:, 1].min() >= 5 * layout.LATENT_BYTES_FP8
    assert changed[:, 1].max() < 6 * layout.LATENT_BYTES_FP8


@gpu
def test_more_tokens_than_a_grid_dimension():
    Layer(66_000, pages=1100, q_width=64).check()


@gpu
def test_offsets_past_two_to_the_31():
    pages, page_size = 5, 64
    layer = Layer(6, pages=pages, slots=torch.tensor([4 * 64, 4 * 64 + 63, -1, 3 * 64, 1, 2], device=DEVICE))
    for name, width in (("latent", layout.LATENT_BYTES_FP8), ("index_cache", layout.INDEX_BYTES)):
        room = torch.empty(4 * (2**29 + 64) + page_size * width, dtype=torch.uint8, device=DEVICE)
        strides = (2**29 + 64, width, 1)
        setattr(layer, name, room.as_strided((pages, page_size, width), strides))
    layer.run(norm_triton.norm_rope_cache)
    layer._check_latents()


@gpu
def test_rows_of_other_alignment():
    layer = Layer(9)
    odd = random(9, 1536 + 512 + 64 + 3, seed=11, dtype=torch.bfloat16)[:, 3:]
    layer.q, layer.kv, layer.k_pe = odd.split((1536, 512, 64), 1)
    layer.check()


@gpu
def test_written_tensors_must_be_aligned():
    layer = Layer(2)
    room = torch.empty(2, 1536 + 3, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="out: must begin at a multiple of 16"):
        layer.run(norm_triton.norm_rope_cache, out=room[:, 3:])


@gpu
def test_one_graph_serves_changed_slots():
    layer = Layer(16)
    out = torch.empty(16, 1536, dtype=torch.bfloat16, device=DEVICE)
    layer.run(norm_triton.norm_rope_cache, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(norm_triton.norm_rope_cache, out=out)
    layer.slots.copy_(torch.arange(16, device=DEVICE) * 7)
    layer.slots[3] = -1
    layer.kv.copy_(random(16, 512, seed=20))
    out.fill_(float("nan"))
    graph.replay()
    check_close(out, *rms_norm64(layer.q, layer.q_weight, torch.bfloat16), torch.bfloat16)
    layer._check_latents()
    layer._check_index_keys()


def check_query(
    tokens, heads, *, index=128, rope=64, dtype=torch.bfloat16, interleaved=False, quantize=True, rotate=True
):
    q = random(tokens, heads + 2, index, seed=31, dtype=dtype)[:, 1:-1]
    weights = random(tokens, heads + 5, seed=32, dtype=dtype)[:, 3:-2]
    positions = torch.randint(0, 4096, (tokens,), generator=generator(33), device=DEVICE)
    table = rope_table(4096, rope)
    arguments = {"interleaved": interleaved, "rotate": rotate, "quantize": quantize}
    got, got_weights = query_triton.index_query(q, weights, positions, table, **arguments)
    expected, expected_weights = query_reference.index_query(q, weights, positions, table, **arguments)
    cos_sin = table[positions][:, None]
    exact, error = (
        rope64(q.double(), cos_sin, interleaved),
        rope_bound(q.double(), cos_sin, interleaved) * FLOAT32_NOISE,
    )
    if rotate:
        exact, error = rotated64(exact, error)
    factor = index**-0.5 * heads**-0.5
    assert got.dtype == expected.dtype
    if quantize:
        scale = (got_weights.double() / (weights.double() * factor)).unsqueeze(-1)
        power = torch.exp2(torch.log2(scale).round())
        assert torch.allclose(scale, power, rtol=1e-6)
        check_quantised(got, power, exact, error)
        check_same_codes(got, expected)
    else:
        check_close(got, exact, error, dtype)
    torch.testing.assert_close(got_weights, expected_weights, rtol=1e-6, atol=0)


@gpu
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("heads", [1, 32, 64])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_query(tokens, heads, interleaved):
    check_query(tokens, heads, interleaved=interleaved)
    check_query(tokens, heads, interleaved=interleaved, quantize=False, rotate=False)


@gpu
def test_query_into_strided_outputs():
    q, weights = random(5, 64, 128, seed=1, dtype=torch.bfloat16), random(5, 64, seed=2)
    positions, table = torch.arange(5, device=DEVICE), rope_table(16, 64)
    room = torch.zeros(5, 66, 128, dtype=torch.uint8, device=DEVICE)
    weights_room = torch.full((5, 67), 7.0, device=DEVICE)
    query_triton.index_query(
        q, weights, positions, table, rotate=True, quantize=True, out=room[:, 1:65], weights_out=weights_room[:, 2:66]
    )
    expected, expected_weights = query_reference.index_query(q, weights, positions, table, rotate=True, quantize=True)
    check_same_codes(room[:, 1:65].contiguous(), expected)
    torch.testing.assert_close(weights_room[:, 2:66], expected_weights, rtol=1e-6, atol=0)
    assert not room[:, 0].any()
    assert not room[:, 65].any()
    assert (weights_room[:, :2] == 7).all()
    assert (weights_room[:, 66] == 7).all()


@gpu
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("heads", [1, 16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_query(tokens, heads, dtype):
    check_rope_query(tokens, heads, dtype)


def check_rope_query(tokens, heads, dtype=torch.float32):
    """A slice of wider heads, as the query projection leaves it."""
    q = random(tokens, heads, 192, seed=41, dtype=dtype)[..., 128:]
    positions = torch.randint(0, 4096, (tokens,), generator=generator(42), device=DEVICE)
    table = rope_table(4096, 64)
    got = rope_triton.rope_query(q, positions, table)
    cos_sin = table[positions][:, None]
    error = rope_bound(q.double(), cos_sin, True) * FLOAT32_NOISE
    check_close(got, rope64(q.double(), cos_sin, True), error, dtype)
    assert torch.equal(rope_triton.rope_query(q, positions, table, out=q), got), "in place"


@gpu
def test_no_queries():
    q, weights = random(0, 64, 128, seed=1, dtype=torch.bfloat16), random(0, 64, seed=2)
    positions = torch.arange(0, device=DEVICE)
    got, got_weights = query_triton.index_query(q, weights, positions, rope_table(4, 64), quantize=True)
    assert got.shape == (0, 64, 128)
    assert got_weights.shape == (0, 64)


def check_gather(kind, *, lengths, page_size, pages, extra=0, dtype=torch.bfloat16):
    """Both gathers against the reference, bit for bit; some pages are absent."""
    float_type = torch.uint8 if kind == "fp8" else dtype
    width = layout.LATENT_BYTES_FP8 if kind == "fp8" else layout.LATENT_WIDTH
    latents, _ = padded_cache(pages, page_size, width, float_type, seed=41)
    index_width = layout.INDEX_BYTES if kind == "fp8" else layout.INDEX_DIM
    keys, keys_room = padded_cache(pages, page_size, index_width, float_type, seed=42)
    if kind == "fp8":
        set_finite(latents, keys_room, page_size)
    columns = -(-max(lengths) // page_size)
    table = torch.randint(0, pages, (len(lengths), columns + 1), generator=generator(43), device=DEVICE)[:, :columns]
    table = table.int()
    table[0, -1] = -1
    table[-1, 0] = pages
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    total = sum(lengths) + extra
    got, got_scale = gather_triton.gather_index_keys(keys, table, cu_seqlens, total)
    expected, scale = gather_reference.gather_index_keys(keys, table, cu_seqlens, total)
    assert got.dtype == expected.dtype
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert (got_scale is None) == (scale is None)
    assert scale is None or torch.equal(got_scale, scale)
    rows = gather_triton.gather_latents(latents, table, cu_seqlens, total, dtype=dtype)
    assert torch.equal(rows, gather_reference.gather_latents(latents, table, cu_seqlens, total, dtype=dtype))


def set_finite(latents, keys_room, page_size):
    """Random bytes, with scales and rope keys that are finite and no NaN code."""
    values = latents[..., : layout.LATENT_RANK]
    values[(values & 0x7F) == 0x7F] = 0
    scales = torch.full((*latents.shape[:2], layout.LATENT_TILES), 0.25, device=DEVICE)
    latents[..., layout.LATENT_SCALES_OFFSET : layout.LATENT_ROPE_OFFSET] = scales.view(torch.uint8)
    rope_key = random(*latents.shape[:2], layout.ROPE_DIM, seed=44, dtype=torch.bfloat16)
    latents[..., layout.LATENT_ROPE_OFFSET :] = rope_key.view(torch.uint8)
    begin = layout.index_scales_offset(page_size)
    key_scales = random(len(keys_room), page_size, seed=45)
    keys_room[:, begin : begin + page_size * layout.SCALE_BYTES] = key_scales.view(torch.uint8)


@gpu
@pytest.mark.parametrize("kind", ["fp8", "float"])
@pytest.mark.parametrize(
    "lengths", [[1], [64], [130, 0, 0, 5000, 1], [0, 3, 0], [17] * 1000], ids=["one", "page", "mixed", "empty", "many"]
)
def test_gather(kind, lengths):
    check_gather(kind, lengths=lengths, page_size=64, pages=300, extra=70)


@gpu
def test_gather_nothing():
    cache, _ = padded_cache(2, 64, layout.INDEX_BYTES, torch.uint8)
    table, lengths = (
        torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    keys, scales = gather_triton.gather_index_keys(cache, table, lengths, 0)
    assert keys.shape == (0, 128)
    assert scales.shape == (0,)
