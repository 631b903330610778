"""Every operation once more, in float64 and numpy, token by token: what references and kernels are judged by.

Written from the formulas alone: it shares no code with `dsv32_plugin`, and spells out the bytes of the caches.
An oracle takes the inputs of the operation as `cases` makes them: `oracles.sparse_mla(**inputs)`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cases import Exact

Array = npt.NDArray[Any]


def array(x: torch.Tensor) -> Array:
    """float64 (int64 for integers) numpy copy."""
    x = x.detach().cpu()
    return x.double().numpy() if x.is_floating_point() else x.long().numpy()


def exact(value: Array, terms: Array, inner: Array | float = 0.0) -> Exact:
    parts = (value, terms, np.broadcast_to(inner, value.shape).copy())
    return Exact(*(torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in parts))


# fp8


def _e4m3_value(code: int) -> float:
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


E4M3 = np.array([_e4m3_value(code) for code in range(256)])
"""The value of each code."""


def e4m3_codes(x: Array) -> Array:
    """The code of the nearest value, the even mantissa on a tie; |x| <= 448."""
    positive = E4M3[:127]
    size = np.abs(x)
    above = np.searchsorted(positive, size).clip(1, 126)
    below = above - 1
    to_above, to_below = positive[above] - size, size - positive[below]
    code = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    return (code + 128 * np.signbit(x)).astype(np.uint8)


def scale_of(amax: float) -> float:
    """The smallest power of two with max(amax, 1e-4) <= 448 * scale; the floor is the float32 next to 1e-4."""
    scale = 2.0**-40
    while max(amax, float(np.float32(1e-4))) > 448 * scale:
        scale *= 2
    return scale


# caches


def latent_row(cache: torch.Tensor, slot: int) -> Array:
    """The float64 row at a slot."""
    page_size = cache.shape[1]
    row = cache[slot // page_size, slot % page_size].detach().cpu()
    if row.dtype != torch.uint8:
        return array(row)
    raw = row.numpy()
    values = E4M3[raw[:512]] * np.repeat(raw[512:528].copy().view(np.float32).astype(np.float64), 128)
    rope_key = array(row[528:656].clone().view(torch.bfloat16))
    return np.concatenate((values, rope_key))


def index_row(cache: torch.Tensor, slot: int) -> tuple[Array, float]:
    """The float64 key at a slot, unscaled, and its scale."""
    _, page_size, width = cache.shape
    page, offset = divmod(slot, page_size)
    if cache.dtype != torch.uint8:
        return array(cache[page, offset]), 1.0
    dim = width - 4
    raw = cache[page].detach().cpu().reshape(-1).numpy()
    scale = raw[page_size * dim :].copy().view(np.float32)[offset]
    return E4M3[raw[offset * dim : (offset + 1) * dim]], float(scale)


def slot_at(table: Array, seq: int, position: int, pages: int, page_size: int) -> int | None:
    """The slot of a position, None where it is absent."""
    column = position // page_size
    if column >= table.shape[1] or not 0 <= table[seq, column] < pages:
        return None
    return int(table[seq, column]) * page_size + position % page_size


# rope and rotation


def rope(x: Array, cos_sin: Array, interleaved: bool) -> Array:
    """Multiply the pairs by cos + i sin; x [..., D], cos_sin [R]."""
    half = len(cos_sin) // 2
    turn = cos_sin[:half] + 1j * cos_sin[half:]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    turned = (x[..., first] + 1j * x[..., second]) * turn
    result = x.copy()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def rotate(x: Array) -> Array:
    """Sylvester's matrix by parity: entry (i, j) is (-1)**popcount(i & j)."""
    dim = x.shape[-1]
    matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)])
    return x @ matrix / np.sqrt(dim)


# operations


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def norm_rope_cache(
    q_a_tl: torch.Tensor,
    kv_a_tc: torch.Tensor,
    k_pe_tr: torch.Tensor,
    index_k_td: torch.Tensor | None,
    positions_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    q_a_weight_l: torch.Tensor,
    kv_a_weight_c: torch.Tensor,
    eps: float,
    index_k_weight_d: torch.Tensor | None = None,
    index_k_bias_d: torch.Tensor | None = None,
    index_eps: float = 1e-6,
    interleaved: bool = False,
    rotate: bool = False,
    **_: Any,
) -> tuple[Array, Array, Array | None]:
    """(q_a_norm [T, L], latent rows [T, C+R], index keys [T, D] or None), unrounded."""
    angles = array(rope_table_pr)[array(positions_t)]
    q_a = rms_norm(array(q_a_tl), array(q_a_weight_l), eps)
    latent = rms_norm(array(kv_a_tc), array(kv_a_weight_c), eps)
    rope_key = np.array([rope(row, angle, True) for row, angle in zip(array(k_pe_tr), angles, strict=True)])
    rows = np.concatenate((latent, rope_key.reshape(len(latent), -1)), axis=1)
    if index_k_td is None or index_k_weight_d is None or index_k_bias_d is None:
        return q_a, rows, None
    normed = layer_norm(array(index_k_td), array(index_k_weight_d), array(index_k_bias_d), index_eps)
    keys = np.array([rope(row, angle, interleaved) for row, angle in zip(normed, angles, strict=True)])
    return q_a, rows, _rotate(keys) if rotate else keys


_rotate = rotate


def index_query(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    positions_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    interleaved: bool = False,
    rotate: bool = False,
    **_: Any,
) -> tuple[Array, Array]:
    """(queries [T, I, D], weights [T, I]), neither rounded nor quantised."""
    _, heads, dim = q_tid.shape
    angles = array(rope_table_pr)[array(positions_t)]
    turned = np.array([rope(row, angle, interleaved) for row, angle in zip(array(q_tid), angles, strict=True)])
    return _rotate(turned) if rotate else turned, array(weights_ti) / np.sqrt(dim * heads)


def rope_query(q_pe_thr: torch.Tensor, positions_t: torch.Tensor, rope_table_pr: torch.Tensor) -> Array:
    """[T, H, R], not rounded."""
    angles = array(rope_table_pr)[array(positions_t)]
    return np.array([rope(row, angle, True) for row, angle in zip(array(q_pe_thr), angles, strict=True)])


def fp8_or_float(x: torch.Tensor) -> Array:
    return E4M3[x.detach().cpu().numpy()] if x.dtype == torch.uint8 else array(x)


def _score(q_id: Array, weights_i: Array, key_d: Array, key_scale: float) -> tuple[float, float]:
    dots = q_id @ key_d
    terms = np.abs(weights_i) * (np.abs(q_id) @ np.abs(key_d))
    return float(weights_i @ np.maximum(dots, 0)) * key_scale, float(terms.sum()) * key_scale


def index_logits_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    max_visible: int,
    **_: Any,
) -> Exact:
    query, weights, table, visible = fp8_or_float(q_bnid), array(weights_bni), array(block_table_bp), array(visible_bn)
    sequences, tokens, _heads, _dim = query.shape
    pages, page_size, _width = index_cache.shape
    value = np.full((sequences, tokens, max_visible), -np.inf)
    terms = np.zeros_like(value)
    for b in range(sequences):
        for s in range(min(max_visible, visible[b].max(initial=0))):
            slot = slot_at(table, b, s, pages, page_size)
            if slot is None:
                continue
            key, scale = index_row(index_cache, slot)
            for n in range(tokens):
                if s < visible[b, n]:
                    value[b, n, s], terms[b, n, s] = _score(query[b, n], weights[b, n], key, scale)
    return exact(value, terms)


def index_logits_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    **_: Any,
) -> Exact:
    query, weights, keys = fp8_or_float(q_tid), array(weights_ti), fp8_or_float(k_sd)
    scale = np.ones(len(keys)) if k_scale_s is None else array(k_scale_s)
    value = np.full((len(query), len(keys)), -np.inf)
    terms = np.zeros_like(value)
    for t, (start, end) in enumerate(zip(array(start_t), array(end_t), strict=True)):
        for s in range(start, end):
            value[t, s], terms[t, s] = _score(query[t], weights[t], keys[s], scale[s])
    return exact(value, terms)


class _Attention:
    """Collects the rows of an attention, token by token."""

    def __init__(self, tokens: int, heads: int, width: int) -> None:
        self.out = np.zeros((tokens, heads, width))
        self.out_terms = np.zeros_like(self.out)
        self.out_inner = np.zeros_like(self.out)
        self.lse = np.full((tokens, heads), -np.inf)
        self.lse_terms = np.zeros_like(self.lse)

    def add(self, t: int, query_hd: Array, keys_shd: Array, values_shv: Array, scale: float) -> None:
        if not len(keys_shd):
            return
        score = scale * np.einsum("hd,shd->hs", query_hd, keys_shd)
        size = scale * np.einsum("hd,shd->hs", np.abs(query_hd), np.abs(keys_shd)).max(1)
        top = score.max(1, keepdims=True)
        weight = np.exp(score - top)
        total = weight.sum(1, keepdims=True)
        weight = weight / total
        self.out[t] = np.einsum("hs,shv->hv", weight, values_shv)
        self.out_terms[t] = np.einsum("hs,shv->hv", weight, np.abs(values_shv))
        self.out_inner[t] = 2 * size[:, None] * self.out_terms[t]
        self.lse[t] = (top + np.log(total))[:, 0]
        self.lse_terms[t] = 1 + size

    def result(self) -> tuple[Exact, Exact]:
        return exact(self.out, self.out_terms, self.out_inner), exact(self.lse, self.lse_terms)


def sparse_mla(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    scale: float,
    **_: Any,
) -> tuple[Exact, Exact]:
    """(out, lse)"""
    rank = q_latent_thc.shape[2]
    query = np.concatenate((array(q_latent_thc), array(q_rope_thr)), axis=2)
    total = latent_cache.shape[0] * latent_cache.shape[1]
    attention = _Attention(*q_latent_thc.shape)
    for t, slots in enumerate(array(slots_tk)):
        rows = [latent_row(latent_cache, int(slot)) for slot in slots if 0 <= slot < total]
        keys = np.array(rows).reshape(len(rows), 1, query.shape[2])
        attention.add(t, query[t], keys.repeat(query.shape[1], 1), keys[..., :rank].repeat(query.shape[1], 1), scale)
    return attention.result()


def dense_mla(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    seq_t: torch.Tensor,
    visible_t: torch.Tensor,
    scale: float,
    max_visible: int,
    **_: Any,
) -> tuple[Exact, Exact]:
    """(out, lse)"""
    pages, page_size, _width = latent_cache.shape
    table, visible = array(block_table_bp), array(visible_t).clip(0, max_visible)
    slots = np.full((len(visible), max(1, visible.max(initial=0))), -1)
    for t, (seq, count) in enumerate(zip(array(seq_t), visible, strict=True)):
        for s in range(count):
            slot = slot_at(table, int(seq), s, pages, page_size)
            slots[t, s] = -1 if slot is None else slot
    return sparse_mla(q_latent_thc, q_rope_thr, latent_cache, torch.from_numpy(slots), scale)


def has_bit(words: list[int], key: int) -> bool:
    """Whether the bit of a key is set in a row of a mask."""
    word = words[4 * (key // 128) + key % 8 // 2]
    return bool(word >> (2 * (key % 128 // 8) + key % 2) & 1)


def masked_mha(
    q_thd: torch.Tensor,
    k_shd: torch.Tensor,
    v_shv: torch.Tensor,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    scale: float,
    mask_tw: torch.Tensor | None = None,
    **_: Any,
) -> tuple[Exact, Exact]:
    """(out, lse)"""
    query, keys, values = array(q_thd), array(k_shd), array(v_shv)
    attention = _Attention(*query.shape[:2], values.shape[2])
    for t, (start, end) in enumerate(zip(array(start_t), array(end_t), strict=True)):
        words = None if mask_tw is None else mask_tw[t].tolist()
        seen = [s for s in range(start, end) if words is None or has_bit(words, s)]
        attention.add(t, query[t], keys[seen], values[seen], scale)
    return attention.result()
