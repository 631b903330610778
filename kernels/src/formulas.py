"""The formulas that several references share, in plain torch. The GPU kernels share nothing with them."""

from collections.abc import Iterator
from functools import cache

import torch

from .cache_layout import (
    AMAX_FLOOR,
    LATENT_RANK,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    LATENT_TILE,
    SCALE_BYTES,
    index_scales_offset,
)

CHUNK_BYTES = 64 << 20
"""What a reference may hold in one intermediate result."""


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Split `rows` so that the intermediate results of one chunk stay near CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def deliver(result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The result, written to `out` where the caller gave one."""
    return result if out is None else out.copy_(result)


def to_mask(selected_ts: torch.Tensor) -> torch.Tensor:
    """[T, S] bool, S a multiple of 128 -> [T, S / 32] int32, in the order that `mask_words` tells."""
    # [T, block, a, q, i] -> words [T, block, q] of bits (a, i)
    bits = selected_ts.unflatten(1, (-1, 16, 4, 2)).permute(0, 1, 3, 2, 4).flatten(3).long()
    words = (bits << torch.arange(32, device=bits.device)).sum(3).flatten(1)
    return words.where(words < 1 << 31, words - (1 << 32)).int()


def from_mask(mask_tw: torch.Tensor) -> torch.Tensor:
    """What `to_mask` had: [T, 32 W] bool."""
    bits = mask_tw.unsqueeze(2) >> torch.arange(32, device=mask_tw.device) & 1
    return bits.bool().unflatten(1, (-1, 4)).unflatten(3, (16, 2)).permute(0, 1, 3, 2, 4).flatten(1)


def rope(x: torch.Tensor, cos_sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate the first R of the last dimension by the angles in `cos_sin` [..., R] = cos | sin; float32."""
    rope_dim = cos_sin.shape[-1]
    cos, sin = cos_sin.chunk(2, dim=-1)
    turned = x[..., :rope_dim].float()
    kept = x[..., rope_dim:].float()
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((pairs, kept), dim=-1)


@cache
def hadamard(dim: int, device: torch.device) -> torch.Tensor:
    """The Hadamard matrix of Sylvester's construction, entries +1 and -1; `dim` is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The orthogonal rotation x H / sqrt(D) over the last dimension."""
    dim = x.shape[-1]
    return x @ hadamard(dim, x.device) * dim**-0.5


def power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """The smallest 2^n with max(amax, 1e-4) <= 448 * 2^n, by the bits of amax.

    448 = 1.75 * 2^8, so the exponent is that of amax less 8, and one more where the mantissa exceeds 1.75.
    """
    bits = amax.clamp(min=AMAX_FLOOR).view(torch.int32)
    carry = (bits & 0x7FFFFF) > 0x600000
    exponent = (bits >> 23) - 8 + carry.int()
    return (exponent << 23).view(torch.float32)


def quantize(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fn values in the shape of x, and one float32 scale for every `tile` values of the last dimension."""
    tiles = x.float().unflatten(-1, (-1, tile))
    scale = power_of_two_scale(tiles.abs().amax(-1))
    values = (tiles / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.flatten(-2), scale


def as_float(values: torch.Tensor) -> torch.Tensor:
    """float32 of float values, of e4m3fn values, or of their bytes."""
    return (values.view(torch.float8_e4m3fn) if values.dtype == torch.uint8 else values).float()


def index_pages(index_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of an fp8 index cache: value bytes [pages, page_size, D] and float32 scales [pages, page_size]."""
    pages, page_size, width = index_cache.shape
    index_dim = width - SCALE_BYTES
    begin = index_scales_offset(page_size, index_dim)
    flat = index_cache.view(pages, page_size * width)
    values = flat[:, :begin].unflatten(1, (page_size, index_dim))
    scales = flat[:, begin:].view(torch.float32)
    return values, scales


def slots_of(block_table_bp: torch.Tensor, seq: torch.Tensor, position: torch.Tensor, page_size: int) -> torch.Tensor:
    """Slots (int64) of positions of sequences; -1 where the table has no page, or a negative one, for it."""
    page = position // page_size
    known = (position >= 0) & (page < block_table_bp.shape[1])
    block = block_table_bp[seq, page.where(known, 0)].long()
    return torch.where(known & (block >= 0), block * page_size + position % page_size, -1)


def page_and_offset(cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(present, page, offset) of slots; one that is absent points to slot 0 and must be masked."""
    page_size = cache.shape[1]
    slots = slots.long()
    present = (slots >= 0) & (slots < cache.shape[0] * page_size)
    safe = slots.where(present, 0)
    return present, safe // page_size, safe % page_size


def latent_rows(latent_cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows float32 [..., C+R], present [...]): the dequantised rows at `slots`, zeros where absent."""
    present, page, offset = page_and_offset(latent_cache, slots)
    rows = latent_cache[page, offset]
    if latent_cache.dtype == torch.uint8:
        values = as_float(rows[..., :LATENT_RANK]).unflatten(-1, (-1, LATENT_TILE))
        scales = rows[..., LATENT_SCALES_OFFSET:LATENT_ROPE_OFFSET].view(torch.float32)
        rope_key = rows[..., LATENT_ROPE_OFFSET:].view(torch.bfloat16)
        rows = torch.cat(((values * scales.unsqueeze(-1)).flatten(-2), rope_key.float()), dim=-1)
    return rows.float().where(present.unsqueeze(-1), 0), present


def index_rows(
    index_cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(keys [..., D] in the cache's dtype or e4m3fn, scales [...] or None, present [...]); zeros where absent."""
    present, page, offset = page_and_offset(index_cache, slots)
    if index_cache.dtype != torch.uint8:
        return index_cache[page, offset].where(present.unsqueeze(-1), 0), None, present
    values, scales = index_pages(index_cache)
    keys = values[page, offset].where(present.unsqueeze(-1), 0).view(torch.float8_e4m3fn)
    return keys, scales[page, offset].where(present, 0), present


def softmax_lse(scores: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, natural log-sum-exp) over the visible scores of the last dimension; an empty row gives 0 and -inf."""
    masked = scores.masked_fill(~visible, float("-inf"))
    weights = masked.softmax(-1).masked_fill(~visible, 0)
    return weights, masked.logsumexp(-1)


def split_finite(values_shv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values with 0 for NaN and inf, [S] whether a row held any), for `weighted_sum`."""
    finite = values_shv.isfinite()
    return values_shv.where(finite, 0), ~finite.flatten(1).all(1)


def weighted_sum(
    weights_ths: torch.Tensor, visible_ts: torch.Tensor, finite_shv: torch.Tensor, spoiled_s: torch.Tensor
) -> torch.Tensor:
    """sum_s weights[t, h, s] * values[s, h, v]; a row with NaN or inf spoils the tokens that see it."""
    result = torch.einsum("ths,shv->thv", weights_ths, finite_shv)
    spoiled_t = (visible_ts & spoiled_s).any(1)
    return result.masked_fill(spoiled_t[:, None, None], float("nan"))
