"""Sorted sets of integers in few bits: the gaps between their members, in Rice's code.

A set is three bytes (flags and bits of a remainder, number of members), then for every member the low bits of its gap,
then for every member the rest of its gap in unary: as many zeros, and a one. K members below n take at most
K (k + 1) + n / 2^k bits, where 2^k is about 0.7 n / K: 2048 random positions of 160K take 1.96 KB. Those in clusters
far apart could take 2.1 KB; what is longer than LONG is deflated, with its length in two bytes more.
"""

from __future__ import annotations

import struct
import zlib
from math import log

import numpy as np

_HEAD = struct.Struct("<BH")
_FLAG, _DEFLATED, _BITS = 0x80, 0x40, 0x3F
_LENGTH = struct.Struct("<H")
LONG = 2040
MOST_MEMBERS = 0xFFFF


def encode(values_x: np.ndarray, counts_n: np.ndarray, flags_n: np.ndarray) -> list[bytes]:
    """Encode many sets at once.

    Args:
        values_x: [sum of counts] int64: the members of each set, ascending, set after set.
        counts_n: [N] int64: members of each set, at most MOST_MEMBERS.
        flags_n: [N] bool: a bit for the reader, by set.
    """
    set_x = np.repeat(np.arange(len(counts_n)), counts_n)
    first_n = np.cumsum(counts_n) - counts_n
    before_x = np.empty_like(values_x)
    before_x[1:] = values_x[:-1]
    before_x[first_n[counts_n > 0]] = -1
    gaps_x = values_x - before_x - 1

    mean_n = np.bincount(set_x, gaps_x, len(counts_n)) / np.maximum(counts_n, 1)
    bits_n = np.ceil(np.log2(np.maximum(mean_n * log(2), 1))).astype(np.int64)
    bits_x = bits_n[set_x]
    unary_x = (gaps_x >> bits_x) + 1
    ends_x = np.cumsum(unary_x)
    unary_n = np.bincount(set_x, unary_x, len(counts_n)).astype(np.int64)
    before_n = np.cumsum(unary_n) - unary_n

    bytes_n = (counts_n * bits_n + unary_n + 7) // 8
    starts_n = 8 * (np.cumsum(bytes_n) - bytes_n)
    written = np.zeros(8 * int(bytes_n.sum()), dtype=np.uint8)
    low_x = starts_n[set_x] + (np.arange(len(values_x)) - first_n[set_x]) * bits_x
    for bit in range(int(bits_n.max(initial=0))):
        has_x = np.flatnonzero(bits_x > bit)
        written[low_x[has_x] + bit] = gaps_x[has_x] >> bit & 1
    written[(starts_n + counts_n * bits_n - before_n)[set_x] + ends_x - 1] = 1
    data = np.packbits(written).tobytes()
    heads = zip(flags_n.tolist(), bits_n.tolist(), counts_n.tolist(), strict=True)
    parts = zip(heads, (starts_n // 8).tolist(), bytes_n.tolist(), strict=True)
    return [_packed(bits | (_FLAG if flag else 0), n, data[at : at + size]) for (flag, bits, n), at, size in parts]


def _packed(head: int, count: int, code: bytes) -> bytes:
    if len(code) > LONG and len(deflated := zlib.compress(code)) + _LENGTH.size < len(code):
        return _HEAD.pack(head | _DEFLATED, count) + _LENGTH.pack(len(deflated)) + deflated
    return _HEAD.pack(head, count) + code


def decode(data: bytes, offset: int) -> tuple[np.ndarray, bool, int]:
    """The members of the set at `offset`, its flag, and where it ends. Raises ValueError where there is none."""
    try:
        head, count = _HEAD.unpack_from(data, offset)
    except struct.error as error:
        raise ValueError(f"a set of positions at byte {offset}: {error}") from None
    bits, start = head & _BITS, offset + _HEAD.size
    if head & _DEFLATED:
        (length,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size
        members, _ = _members(zlib.decompress(data[start : start + length]), 0, bits, count)
        return members, bool(head & _FLAG), start + length
    members, end = _members(data, start, bits, count)
    return members, bool(head & _FLAG), end


def _members(data: bytes, start: int, bits: int, count: int) -> tuple[np.ndarray, int]:
    """The members of a set whose code begins at `start`, and where it ends."""
    # The unary part is as long as it has to be for so many ones.
    size = min((count * (bits + 1) + 7) // 8, len(data) - start)
    while True:
        read = np.unpackbits(np.frombuffer(data, np.uint8, size, start))
        ones = np.flatnonzero(read[count * bits :])[:count]
        if len(ones) == count:
            break
        if start + size == len(data):
            raise ValueError(f"a set of {count} positions at byte {start}: the data ends at byte {len(data)}")
        size = min(2 * size, len(data) - start)
    low = read[: count * bits].reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
    gaps = (np.diff(ones, prepend=-1) - 1 << bits) + low
    used = count * bits + (int(ones[-1]) + 1 if count else 0)
    return np.cumsum(gaps + 1) - 1, start + (used + 7) // 8
