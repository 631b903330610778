"""Inputs for the tests of every operation, and the assertions that judge a result.

A maker returns the keyword arguments of its operation: `sparse_mla(**cases.sparse_mla_inputs(5, 16, 32, device=...))`.
The tensors are drawn on the CPU, so a seed means the same values on every device. Rows of a cache that belong to no
token are NaN, pages are shuffled, and what an operation must not read is filled with the worst values. pytest finds
this module because pyproject's `pythonpath` lists tests/kernels: `import cases`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv32_plugin.kernels import cache_layout as layout

Inputs = dict[str, Any]
Device = str | torch.device

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INF, NAN = float("inf"), float("nan")


# Building blocks


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, g: torch.Generator, dtype: torch.dtype = torch.float32, strided: bool = False) -> torch.Tensor:
    """Normal numbers; `strided` makes them a slice of wider rows, the rest NaN."""
    x = torch.randn(*shape, generator=g).to(dtype)
    if not strided:
        return x
    wide = torch.full((*shape[:-1], shape[-1] + 24), NAN, dtype=dtype)
    wide[..., 8 : 8 + shape[-1]] = x
    return wide[..., 8 : 8 + shape[-1]]


def to(inputs: Mapping[str, Any], device: Device) -> Inputs:
    """The inputs on a device, with their strides (and what lies between the rows)."""
    return {name: _move(value, device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _move(x: torch.Tensor, device: Device) -> torch.Tensor:
    if x.device == torch.device(device):
        return x
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((extent,), (1,)).to(device).as_strided(x.shape, x.stride(), 0)


def empty_pages(pages: int, page_size: int, width: int, dtype: torch.dtype, page_padding: int = 0) -> torch.Tensor:
    """A cache whose rows are all NaN (every byte 255 in fp8), `page_padding` elements between one page and the next.

    The padding is NaN too, but for gaps of a million elements and more, which on the CPU then cost no memory.
    """
    stride = page_size * width + page_padding
    buffer = torch.empty(pages * stride, dtype=dtype)
    cache = buffer.as_strided((pages, page_size, width), (stride, width, 1))
    (buffer if page_padding < 1 << 20 else cache).fill_(255 if dtype == torch.uint8 else NAN)
    return cache


def empty_latent_cache(
    pages: int,
    *,
    cache_dtype: torch.dtype,
    page_size: int = 64,
    rank: int = 512,
    rope_dim: int = 64,
    page_padding: int = 0,
) -> torch.Tensor:
    """`cache_dtype` uint8 is the fp8 layout."""
    width = layout.LATENT_BYTES_FP8 if cache_dtype == torch.uint8 else rank + rope_dim
    return empty_pages(pages, page_size, width, cache_dtype, page_padding)


def empty_index_cache(
    pages: int, *, cache_dtype: torch.dtype, page_size: int = 64, index_dim: int = 128, page_padding: int = 0
) -> torch.Tensor:
    """`cache_dtype` uint8 is the fp8 layout."""
    width = index_dim + layout.SCALE_BYTES if cache_dtype == torch.uint8 else index_dim
    return empty_pages(pages, page_size, width, cache_dtype, page_padding)


def random_fp8(*shape: int, g: torch.Generator) -> torch.Tensor:
    """e4m3fn values that use the whole range."""
    return (torch.randn(*shape, generator=g) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def random_scales(*shape: int, g: torch.Generator) -> torch.Tensor:
    """Powers of two near 1/128, so that fp8 rows have entries near 1."""
    return torch.exp2(torch.randint(-8, -5, shape, generator=g).float())


def fill_latents(cache: torch.Tensor, slots: torch.Tensor, g: torch.Generator, rope_dim: int = 64) -> None:
    """Write random rows at the slots."""
    count, (_, page_size, width) = len(slots), cache.shape
    if cache.dtype == torch.uint8:
        rope_key = torch.randn(count, rope_dim, generator=g).bfloat16()
        parts = random_fp8(count, 512, g=g), random_scales(count, 4, g=g), rope_key
        rows = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    else:
        rows = torch.randn(count, width, generator=g).to(cache.dtype)
    cache[slots // page_size, slots % page_size] = rows


def fill_index_keys(cache: torch.Tensor, slots: torch.Tensor, g: torch.Generator) -> None:
    """Write random keys at the slots."""
    count, (pages, page_size, width) = len(slots), cache.shape
    page, offset = slots // page_size, slots % page_size
    if cache.dtype == torch.uint8:
        dim = width - 4
        flat = cache.view(pages, page_size * width)
        value_byte = (offset * dim).unsqueeze(1) + torch.arange(dim)
        flat[page.unsqueeze(1), value_byte] = random_fp8(count, dim, g=g).view(torch.uint8)
        scale_byte = (page_size * dim + 4 * offset).unsqueeze(1) + torch.arange(4)
        flat[page.unsqueeze(1), scale_byte] = random_scales(count, 1, g=g).view(torch.uint8)
    else:
        cache[page, offset] = torch.randn(count, width, generator=g).to(cache.dtype)


def block_table(lengths: Sequence[int], pages: int, page_size: int, g: torch.Generator, spare: int = 3) -> torch.Tensor:
    """[B, P] int32: distinct shuffled pages for each sequence; entries past its last page are what must not be used."""
    needed = [-(-length // page_size) for length in lengths]
    free = torch.randperm(pages, generator=g).tolist()
    garbage = [-1, INT32_MIN, INT32_MAX, pages, 0]
    table = torch.tensor(garbage, dtype=torch.int32).repeat(len(lengths), max(needed, default=0) // 5 + 2)
    table = table[:, : max(needed, default=0) + spare].clone()
    for row, count in zip(table, needed, strict=True):
        row[:count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return table


def slots_of(table: torch.Tensor, seq: int, length: int, page_size: int) -> torch.Tensor:
    """Slots (int64) of the first `length` positions of a sequence."""
    position = torch.arange(length)
    return table[seq, position // page_size].long() * page_size + position % page_size


def pages_for(lengths: Sequence[int], page_size: int) -> int:
    return sum(-(-length // page_size) for length in lengths) + 2


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int32)


def rope_angles(max_position: int, rope_dim: int) -> torch.Tensor:
    """A rope table of plain frequencies, cos | sin."""
    frequency = 10000.0 ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    angle = torch.arange(max_position, dtype=torch.float64).unsqueeze(1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


# Makers, one an operation


def norm_rope_cache_inputs(
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    latent_dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.float32,
    q_rank: int = 1536,
    rank: int = 512,
    rope_dim: int = 64,
    index_dim: int = 128,
    page_size: int = 64,
    page_padding: int = 0,
    interleaved: bool = False,
    rotate: bool = False,
    with_index: bool = True,
    skip: bool = True,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """Slices of one fused projection, shuffled slots; `skip` gives every fifth token slot -1. A uint8 cache is fp8."""
    g = rng(seed)
    pages = tokens // page_size + 3
    widths = [q_rank, rank, rope_dim, index_dim]
    fused = (torch.randn(tokens, sum(widths) + 8, generator=g) * 2).to(dtype)
    q_a, kv_a, k_pe, index_k, _ = fused.split([*widths, 8], dim=1)
    slots = torch.randperm(pages * page_size, generator=g)[:tokens]
    if skip:
        slots[::5] = -1
    inputs: Inputs = {
        "q_a_tl": q_a,
        "kv_a_tc": kv_a,
        "k_pe_tr": k_pe,
        "index_k_td": index_k if with_index else None,
        "positions_t": torch.randint(0, 4096, (tokens,), generator=g),
        "slots_t": slots,
        "rope_table_pr": rope_angles(4096, rope_dim),
        "q_a_weight_l": (1 + torch.randn(q_rank, generator=g) / 4).to(dtype),
        "kv_a_weight_c": (1 + torch.randn(rank, generator=g) / 4).to(dtype),
        "eps": 1e-6,
        "latent_cache": empty_latent_cache(
            pages,
            cache_dtype=latent_dtype,
            page_size=page_size,
            rank=rank,
            rope_dim=rope_dim,
            page_padding=page_padding,
        ),
        "interleaved": interleaved,
        "rotate": rotate,
    }
    if with_index:
        inputs["index_k_weight_d"] = 1 + torch.randn(index_dim, generator=g) / 4
        inputs["index_k_bias_d"] = torch.randn(index_dim, generator=g) / 4
        inputs["index_cache"] = empty_index_cache(
            pages, cache_dtype=index_dtype, page_size=page_size, index_dim=index_dim, page_padding=page_padding
        )
    return to(inputs, device)


def index_query_inputs(
    tokens: int,
    heads: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    index_dim: int = 128,
    rope_dim: int = 64,
    interleaved: bool = False,
    rotate: bool = False,
    quantize: bool = False,
    strided: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    g = rng(seed)
    inputs = {
        "q_tid": randn(tokens, heads, index_dim, g=g, dtype=dtype, strided=strided),
        "weights_ti": randn(tokens, heads, g=g, dtype=dtype, strided=strided),
        "positions_t": torch.randint(0, 4096, (tokens,), generator=g),
        "rope_table_pr": rope_angles(4096, rope_dim),
        "interleaved": interleaved,
        "rotate": rotate,
        "quantize": quantize,
    }
    return to(inputs, device)


def rope_query_inputs(
    tokens: int,
    heads: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    rope_dim: int = 64,
    strided: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    g = rng(seed)
    inputs = {
        "q_pe_thr": randn(tokens, heads, rope_dim, g=g, dtype=dtype, strided=strided),
        "positions_t": torch.randint(0, 4096, (tokens,), generator=g),
        "rope_table_pr": rope_angles(4096, rope_dim),
    }
    return to(inputs, device)


def index_logits_paged_inputs(
    lengths: Sequence[int],
    tokens: int = 1,
    heads: int = 64,
    *,
    dtype: torch.dtype = torch.uint8,
    index_dim: int = 128,
    page_size: int = 64,
    page_padding: int = 0,
    max_visible: int | None = None,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """`tokens` query tokens a sequence, the last sees its whole length. `dtype` uint8 is fp8, for queries and cache."""
    g = rng(seed)
    pages = pages_for(lengths, page_size)
    table = block_table(lengths, pages, page_size, g)
    cache = empty_index_cache(
        pages, cache_dtype=dtype, page_size=page_size, index_dim=index_dim, page_padding=page_padding
    )
    for seq, length in enumerate(lengths):
        fill_index_keys(cache, slots_of(table, seq, length, page_size), g)
    shape = (len(lengths), tokens, heads, index_dim)
    behind = torch.arange(tokens - 1, -1, -1)
    inputs = {
        "q_bnid": random_fp8(*shape, g=g) if dtype == torch.uint8 else randn(*shape, g=g, dtype=dtype),
        "weights_bni": randn(len(lengths), tokens, heads, g=g) / 8,
        "index_cache": cache,
        "block_table_bp": table,
        "visible_bn": (torch.tensor(lengths).unsqueeze(1) - behind).clamp(min=0).int(),
        "max_visible": max(lengths, default=0) if max_visible is None else max_visible,
    }
    return to(inputs, device)


def index_logits_ragged_inputs(
    lengths: Sequence[int],
    chunks: Sequence[int] | None = None,
    heads: int = 64,
    *,
    dtype: torch.dtype = torch.uint8,
    index_dim: int = 128,
    strided: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """Causal prefill: the last `chunks[b]` tokens of each sequence ask (default: all). `dtype` uint8 is fp8."""
    g = rng(seed)
    start, end = causal_ranges(lengths, chunks)
    keys, tokens = sum(lengths), len(start)
    fp8 = dtype == torch.uint8
    inputs = {
        "q_tid": random_fp8(tokens, heads, index_dim, g=g)
        if fp8
        else randn(tokens, heads, index_dim, g=g, dtype=dtype, strided=strided),
        "weights_ti": randn(tokens, heads, g=g, strided=strided) / 8,
        "k_sd": random_fp8(keys, index_dim, g=g) if fp8 else randn(keys, index_dim, g=g, dtype=dtype, strided=strided),
        "k_scale_s": random_scales(keys, g=g) if fp8 else None,
        "start_t": start,
        "end_t": end,
    }
    return to(inputs, device)


def causal_ranges(lengths: Sequence[int], chunks: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """start, end (int32) of the keys that each of the last `chunks[b]` tokens of each sequence sees."""
    start: list[int] = []
    end: list[int] = []
    begin = 0
    for length, chunk in zip(lengths, chunks or lengths, strict=True):
        start += [begin] * chunk
        end += range(begin + length - chunk + 1, begin + length + 1)
        begin += length
    return torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)


def index_topk_ragged_inputs(
    lengths: Sequence[int], topk: int, chunks: Sequence[int] | None = None, **options: Any
) -> Inputs:
    return {**index_logits_ragged_inputs(lengths, chunks, **options), "topk": topk}


def gather_inputs(
    lengths: Sequence[int],
    *,
    which: str,
    cache_dtype: torch.dtype,
    page_size: int = 64,
    page_padding: int = 0,
    extra: int = 0,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """`which` is "index" or "latent" and names the cache argument; `extra` rows are asked for past the last."""
    g = rng(seed)
    pages = pages_for(lengths, page_size)
    table = block_table(lengths, pages, page_size, g)
    empty, fill = (empty_index_cache, fill_index_keys) if which == "index" else (empty_latent_cache, fill_latents)
    cache = empty(pages, cache_dtype=cache_dtype, page_size=page_size, page_padding=page_padding)
    for seq, length in enumerate(lengths):
        fill(cache, slots_of(table, seq, length, page_size), g)
    inputs = {
        f"{which}_cache": cache,
        "block_table_bp": table,
        "cu_seqlens_b1": cumulative(lengths),
        "total": sum(lengths) + extra,
    }
    return to(inputs, device)


def _relu_like(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return x.relu()


def _signed_zeros(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return torch.where(x > 0, 0.0, -0.0)


def _some(value: float, share: float) -> Callable[[torch.Tensor, torch.Generator], torch.Tensor]:
    return lambda x, g: x.masked_fill(torch.rand(x.shape, generator=g) < share, value)


SCORES: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "random": lambda x, _: x,
    "all_zero": lambda x, _: torch.zeros_like(x),
    "zero_plateau": _relu_like,
    "signed_zeros": _signed_zeros,
    "one_value": lambda x, _: torch.full_like(x, 1.2345),
    "two_values": lambda x, _: torch.where(x > 0, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))),
    "narrow_band": lambda x, _: 7.0 + x.clamp(-4, 4) * 1e-6,
    "one_ulp_apart": lambda x, _: (torch.full_like(x, 3.0).view(torch.int32) + (x * 300).int()).view(torch.float32),
    "quantised": lambda x, _: (x * 4).round() / 4,
    "negative": lambda x, _: -x.abs() - 1,
    "subnormal": lambda x, _: x * 1e-40,
    "huge": lambda x, _: (x * 1e38).clamp(-3.4e38, 3.4e38),
    "ascending": lambda x, _: x.sort(dim=1).values,
    "descending": lambda x, _: x.sort(dim=1, descending=True).values,
    "some_minus_inf": _some(-INF, 0.5),
    "all_minus_inf": lambda x, _: torch.full_like(x, -INF),
    "some_plus_inf": _some(INF, 0.01),
    "some_nan": _some(NAN, 0.3),
    "all_nan": lambda x, _: torch.full_like(x, NAN),
    "wide_range": lambda x, _: torch.sign(x) * torch.exp2(x * 30),
}
"""Name -> what it makes of normal scores [T, S]. Each broke a selection somewhere, or could."""


def select_topk_inputs(
    kind: str,
    tokens: int,
    width: int,
    topk: int,
    *,
    ranges: str = "full",
    strided: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """`kind` is a key of SCORES, `ranges` of RANGES. What lies outside a row's range is NaN or +inf."""
    g = rng(seed)
    logits = SCORES[kind](torch.randn(tokens, width, generator=g), g)
    start, end = RANGES[ranges](tokens, width, topk, g)
    position = torch.arange(width)
    begin = torch.zeros_like(end) if start is None else start
    outside = (position < begin.unsqueeze(1)) | (position >= end.unsqueeze(1))
    logits = logits.masked_fill(outside & (position % 2 == 0), INF).masked_fill(outside & (position % 2 == 1), NAN)
    if strided:
        wide = torch.full((tokens, width + 5), INF)
        wide[:, :width] = logits
        logits = wide[:, :width]
    return to({"logits_ts": logits, "start_t": start, "end_t": end, "topk": topk}, device)


Range = tuple[torch.Tensor | None, torch.Tensor]


def _full(tokens: int, width: int, topk: int, g: torch.Generator) -> Range:
    return None, torch.full((tokens,), width, dtype=torch.int32)


def _causal(tokens: int, width: int, topk: int, g: torch.Generator) -> Range:
    return None, torch.arange(width - tokens + 1, width + 1).clamp(min=0).int()


def _random_range(tokens: int, width: int, topk: int, g: torch.Generator) -> Range:
    a, b = (torch.randint(0, width + 1, (tokens,), generator=g).int() for _ in range(2))
    return torch.minimum(a, b), torch.maximum(a, b)


def _empty_range(tokens: int, width: int, topk: int, g: torch.Generator) -> Range:
    start = torch.randint(0, width + 1, (tokens,), generator=g).int()
    return start, (start - torch.arange(tokens).int() % 3).clamp(min=0)


def _fewer_than_k(tokens: int, width: int, topk: int, g: torch.Generator) -> Range:
    start = torch.randint(0, width // 4 + 1, (tokens,), generator=g).int()
    return start, (start + torch.randint(0, topk, (tokens,), generator=g).int()).clamp(max=width)


def _around_k(tokens: int, width: int, topk: int, g: torch.Generator) -> Range:
    return None, (topk + torch.arange(tokens) % 3 - 1).clamp(0, width).int()


def _long_short_long(tokens: int, width: int, topk: int, g: torch.Generator) -> Range:
    lengths = torch.tensor([width, 1, width, 0, width, topk // 2, width - 1], dtype=torch.int32)
    return None, lengths.repeat(tokens // 7 + 1)[:tokens].clamp(0, width)


RANGES: dict[str, Callable[[int, int, int, torch.Generator], Range]] = {
    "full": _full,
    "causal": _causal,
    "random": _random_range,
    "empty": _empty_range,
    "fewer_than_k": _fewer_than_k,
    "around_k": _around_k,
    "long_short_long": _long_short_long,
}
"""Name -> (start or None, end) of T rows of width S."""


def absorbed_query(
    tokens: int, heads: int, rank: int, rope_dim: int, *, g: torch.Generator, dtype: torch.dtype, strided: bool
) -> Inputs:
    return {
        "q_latent_thc": randn(tokens, heads, rank, g=g, dtype=dtype, strided=strided),
        "q_rope_thr": randn(tokens, heads, rope_dim, g=g, dtype=dtype, strided=strided),
    }


def sparse_mla_inputs(
    tokens: int,
    heads: int,
    topk: int,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    rank: int = 512,
    rope_dim: int = 64,
    pages: int = 8,
    page_size: int = 64,
    page_padding: int = 0,
    absent: bool = True,
    strided: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """Random distinct slots, in random order.

    With `absent` the rows hold ever fewer of them, the last row none, and the rest is -1, INT_MIN, INT_MAX or one past
    the end. A third of the cache is NaN and never selected.
    """
    g = rng(seed)
    cache = empty_latent_cache(
        pages, cache_dtype=cache_dtype, page_size=page_size, rank=rank, rope_dim=rope_dim, page_padding=page_padding
    )
    total = pages * page_size
    used = torch.randperm(total, generator=g)[: total * 2 // 3]
    fill_latents(cache, used, g, rope_dim)
    garbage = torch.tensor([-1, INT32_MIN, INT32_MAX, total, -total], dtype=torch.int32)
    slots = garbage.repeat(topk // 5 + 1)[:topk].repeat(tokens, 1)
    for t in range(tokens):
        count = min(topk, len(used))
        if absent:
            count = count * (tokens - 1 - t) // max(1, tokens - 1)
        place = torch.randperm(topk, generator=g)[:count]
        slots[t, place] = used[torch.randperm(len(used), generator=g)[:count]].int()
    query = absorbed_query(tokens, heads, rank, rope_dim, g=g, dtype=dtype, strided=strided)
    return to({**query, "latent_cache": cache, "slots_tk": slots, "scale": (rank // 4 + rope_dim) ** -0.5}, device)


def dense_mla_inputs(
    lengths: Sequence[int],
    chunks: Sequence[int] | None = None,
    heads: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    rank: int = 512,
    rope_dim: int = 64,
    page_size: int = 64,
    page_padding: int = 0,
    strided: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """The last `chunks[b]` tokens of each sequence ask (default: one each, as in decode) and see what precedes."""
    g = rng(seed)
    chunks = [min(1, length) for length in lengths] if chunks is None else chunks
    pages = pages_for(lengths, page_size)
    table = block_table(lengths, pages, page_size, g)
    cache = empty_latent_cache(
        pages, cache_dtype=cache_dtype, page_size=page_size, rank=rank, rope_dim=rope_dim, page_padding=page_padding
    )
    for seq, length in enumerate(lengths):
        fill_latents(cache, slots_of(table, seq, length, page_size), g, rope_dim)
    seq_t = [seq for seq, chunk in enumerate(chunks) for _ in range(chunk)]
    visible = [n for length, chunk in zip(lengths, chunks, strict=True) for n in range(length - chunk + 1, length + 1)]
    query = absorbed_query(len(seq_t), heads, rank, rope_dim, g=g, dtype=dtype, strided=strided)
    inputs = {
        **query,
        "latent_cache": cache,
        "block_table_bp": table,
        "seq_t": torch.tensor(seq_t, dtype=torch.int32),
        "visible_t": torch.tensor(visible, dtype=torch.int32),
        "scale": (rank // 4 + rope_dim) ** -0.5,
        "max_visible": max(lengths, default=0),
    }
    return to(inputs, device)


def mask_of(selected_ts: torch.Tensor, padding: int = 3) -> torch.Tensor:
    """[T, S] bool as a mask, in rows `padding` words further apart than they are long."""
    tokens, keys = selected_ts.shape
    words = -(-keys // 128) * 4
    wide = np.zeros((tokens, words + padding), dtype=np.uint32)
    for t, s in selected_ts.cpu().nonzero().tolist():
        wide[t, 4 * (s // 128) + s % 8 // 2] |= np.uint32(1 << (2 * (s % 128 // 8) + s % 2))
    return torch.from_numpy(wide.view(np.int32)).to(selected_ts.device)[:, :words]


def masked_mha_inputs(
    lengths: Sequence[int],
    chunks: Sequence[int] | None = None,
    heads: int = 4,
    *,
    topk: int | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 192,
    value_dim: int = 128,
    strided: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> Inputs:
    """Causal prefill; with `topk` each token attends to at most so many keys, by the bits of a mask."""
    g = rng(seed)
    start, end = causal_ranges(lengths, chunks)
    keys, tokens = sum(lengths), len(start)
    inputs: Inputs = {
        "q_thd": randn(tokens, heads, head_dim, g=g, dtype=dtype, strided=strided),
        "k_shd": randn(keys, heads, head_dim, g=g, dtype=dtype, strided=strided),
        "v_shv": randn(keys, heads, value_dim, g=g, dtype=dtype, strided=strided),
        "start_t": start,
        "end_t": end,
        "scale": head_dim**-0.5,
    }
    if topk is not None:
        selected = torch.zeros(tokens, keys, dtype=torch.bool)
        for row, first, last in zip(selected, start.tolist(), end.tolist(), strict=True):
            row[first + torch.randperm(last - first, generator=g)[:topk]] = True
        inputs["mask_tw"] = mask_of(selected)
    return to(inputs, device)


# Judges


def assert_topk_exact(
    selected_tk: torch.Tensor,
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    **_: Any,
) -> None:
    """The positions are the exact selection: first by values (none better is left out), then by the tie rule.

    Takes the inputs of `select_topk` as they are: `assert_topk_exact(result, **inputs)`.
    """
    selected = selected_tk.cpu().numpy().astype(np.int64)
    logits = logits_ts.cpu().numpy()
    ends = end_t.cpu().numpy()
    starts = np.zeros_like(ends) if start_t is None else start_t.cpu().numpy()
    assert selected.shape == (len(logits), topk)
    for t, (row, start, end) in enumerate(zip(selected, starts, ends, strict=True)):
        scores = logits[t, start : max(start, end)]
        scores = np.where(np.isnan(scores), -np.inf, scores) + 0.0
        count = min(topk, len(scores))
        chosen, rest = row[:count], row[count:]
        where = f"row {t}, range {start}..{end}, topk {topk}"
        assert (rest == -1).all(), f"{where}: {count} candidates, but the tail holds {rest[rest != -1][:8]}"
        assert ((chosen >= 0) & (chosen < len(scores))).all(), f"{where}: positions out of range in {chosen[:8]}"
        assert (np.diff(chosen) > 0).all(), f"{where}: positions do not ascend"
        best = np.sort(scores)[::-1][:count]
        got = np.sort(scores[chosen])[::-1]
        wrong = np.flatnonzero(best != got)
        assert not wrong.size, f"{where}: value number {wrong[:1]} should be {best[wrong[:1]]}, is {got[wrong[:1]]}"
        order = np.lexsort((np.arange(len(scores)), -scores))
        assert (np.sort(order[:count]) == chosen).all(), f"{where}: a tie went to a higher position"


class Exact(NamedTuple):
    """What a formula gives in float64, with what bounds the rounding of an implementation (`oracles` returns it)."""

    value: torch.Tensor
    terms: torch.Tensor
    """The sum of the absolute values of the terms that make up the value."""
    inner: torch.Tensor
    """How far the value moves for a relative error of 1 in a reduction inside its terms (the scores of a softmax)."""


def assert_close_to_float64(
    actual: torch.Tensor,
    exact: Exact,
    *,
    length: int,
    operand: torch.dtype = torch.float32,
    accumulator_eps: float = 2.0**-23,
    plain: torch.Tensor | None = None,
) -> None:
    """|actual - exact| is within what rounding can do, element by element; infinities match exactly.

        bound = |plain - exact| + eps(actual) |exact| + 2 eps(operand) terms
                + 8 sqrt(length) accumulator_eps (terms + inner)

    A sum of n rounded terms errs by more than 8 sqrt(n) eps * sum |terms| with a probability below 1e-13 (Higham and
    Mary, A new approach to probabilistic rounding error analysis, 2019).

    Args:
        actual: the result under test.
        exact: the same formula in float64.
        length: terms of the longest chain of sums, inner reductions included.
        operand: the dtype to which the implementation rounds an intermediate operand of a product.
        accumulator_eps: relative spacing of the accumulator.
        plain: the same formula in torch in the dtype of the inputs; its error is granted too.
    """
    got, value, terms, inner = (x.detach().cpu().double() for x in (actual, *exact))
    assert got.shape == value.shape, f"shape {tuple(got.shape)}, expected {tuple(value.shape)}"
    finite = value.isfinite()
    assert not got.isnan().any(), f"{int(got.isnan().sum())} NaN"
    assert torch.equal(got.masked_fill(finite, 0), value.masked_fill(finite, 0)), "infinities differ"
    accumulation = 8 * length**0.5 * accumulator_eps
    bound = torch.finfo(actual.dtype).eps * value.abs() + torch.finfo(torch.float32).tiny
    bound = bound + 2 * torch.finfo(operand).eps * terms + accumulation * (terms + inner)
    if plain is not None:
        bound = bound + (plain.detach().cpu().double() - value).abs()
    excess = ((got - value).abs() / bound).masked_fill(~finite, 0)
    assert not (excess > 1).any(), f"error is {float(excess.max()):.3g} times the bound, at {_place(excess)}"


def _place(excess: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
