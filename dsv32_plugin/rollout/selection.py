"""The positions that every layer selected for every token of a sequence, as bytes.

    header     "DSEL", version, layers, index_topk, positions; the numbers of the layers that select
    position   length of what follows, 0 where nothing is known; for each layer a set of positions (`gaps`)

A position below index_topk sees no more keys than it may select: it selects all, and nothing is stored. A set with the
flag has the positions by which the selection differs from that of the position before. `docs/rollout.md` says how to
ask for it.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsv32_plugin.rollout import gaps

_HEADER = struct.Struct("<4sBBHII")
_MAGIC, _VERSION = b"DSEL", 1
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Selection:
    """What the layers of one sequence selected."""

    layers: tuple[int, ...]
    """Those that select; every other uses the selection of the last of these before it."""
    topk: int
    known_p: np.ndarray
    """[positions] bool: whether the selection of a position came with the answer."""
    stored_plk: np.ndarray
    """[positions from topk on, layers, topk] int32, ascending; -1 where nothing is known."""

    @property
    def positions(self) -> int:
        return len(self.known_p)

    def of(self, layer: int) -> np.ndarray:
        """[positions, topk] int32: the selected positions, ascending, then -1; all -1 where nothing is known."""
        if layer not in self.layers:
            raise ValueError(
                f"layer: expected one that selects ({', '.join(map(str, self.layers))}), got {layer}; "
                "a layer that shares attends to what the last of these before it selected"
            )
        key_k = np.arange(self.topk, dtype=np.int32)
        first = min(self.topk, self.positions)
        every_pk = np.where(key_k <= np.arange(first, dtype=np.int32)[:, None], key_k, -1).astype(np.int32)
        return np.concatenate([every_pk, self.stored_plk[:, self.layers.index(layer)]])

    def stacked(self) -> np.ndarray:
        """[positions, layers that select, topk] int32, as what SGLang's own code returns is reshaped."""
        return np.stack([self.of(layer) for layer in self.layers], axis=1)

    def mask(self, layer: int) -> np.ndarray:
        """[positions, positions] bool: which keys each position attends to. Raises ValueError where one is unknown."""
        if not self.known_p.all():
            missing = np.flatnonzero(~self.known_p)
            raise ValueError(f"selection: {len(missing)} positions are not known, the first is {missing[0]}")
        mask_pp = np.zeros((self.positions, self.positions + 1), dtype=bool)
        np.put_along_axis(mask_pp, np.where((of := self.of(layer)) < 0, self.positions, of), True, axis=1)
        return mask_pp[:, :-1]


def decode_selection(data: bytes | str) -> Selection:
    """Read what an answer brought: its bytes, or their base64. Raises ValueError where these are something else."""
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise ValueError(f"selection: expected base64, got something else ({error})") from None
    if data[:4] != _MAGIC:
        raise ValueError(f"selection: expected bytes that begin with {_MAGIC!r}, got {data[:4]!r}")
    try:
        return _decode(data)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"selection: {error}; was the answer cut?") from None


def _decode(data: bytes) -> Selection:
    _, version, _, num_layers, topk, positions = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"selection: expected version {_VERSION}, got {version}; install the server's dsv32-plugin")
    layers_end = _HEADER.size + 2 * num_layers
    layers = struct.unpack(f"<{num_layers}H", data[_HEADER.size : layers_end])
    known_p = np.ones(positions, dtype=bool)
    stored_plk = np.full((max(0, positions - topk), num_layers, topk), -1, dtype=np.int32)
    offset, before_lk = layers_end, None
    for row, selected_lk in enumerate(stored_plk):
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        if length:
            selected_lk[:] = decode_block(data[offset : offset + length], num_layers, topk, before_lk)
        known_p[topk + row] = length > 0
        before_lk = selected_lk if length else None
        offset += length
    if offset != len(data):
        raise ValueError(f"selection: expected {offset} bytes, got {len(data)}; was the answer cut?")
    return Selection(layers, topk, known_p, stored_plk)


def encode_selection(layers: Sequence[int], topk: int, positions: int, blocks: Iterable[bytes | None]) -> bytes:
    """The bytes of a sequence, of the block of every position from `topk` on, None where nothing is known."""
    parts = [_HEADER.pack(_MAGIC, _VERSION, 0, len(layers), topk, positions), struct.pack(f"<{len(layers)}H", *layers)]
    for block in blocks:
        parts += [_LENGTH.pack(len(block or b"")), block or b""]
    return b"".join(parts)


def encode_block(selected_lk: np.ndarray, before_lk: np.ndarray | None) -> tuple[bytes, bool]:
    """Encode what the layers selected for one position; returns the block, and whether it needs the one before.

    Args:
        selected_lk: [L, K] int32, ascending.
        before_lk: likewise, of the position before, where that is at hand.
    """
    (layers, topk), row_l1 = selected_lk.shape, np.arange(len(selected_lk))[:, None]
    width = 1 + max(int(part[:, -1].max()) for part in (selected_lk, before_lk) if part is not None)
    member_lp = np.zeros((layers, width), dtype=bool)
    member_lp[row_l1, selected_lk] = True
    differs_l = np.zeros(layers, dtype=bool)
    if before_lk is not None:
        member_lp[row_l1, before_lk] ^= True
        # As many as are selected are no gain.
        differs_l = member_lp.sum(axis=1) < topk
        member_lp[~differs_l] = False
        member_lp[row_l1[~differs_l], selected_lk[~differs_l]] = True
    counts_l = member_lp.sum(axis=1)
    sets = gaps.encode(np.flatnonzero(member_lp) % width, counts_l, differs_l)
    return b"".join(sets), bool(differs_l.any())


def decode_block(block: bytes, layers: int, topk: int, before_lk: np.ndarray | None) -> np.ndarray:
    """[L, K] int32: what the layers selected for one position."""
    selected_lk, offset = np.empty((layers, topk), dtype=np.int32), 0
    for layer in range(layers):
        found, differs, offset = gaps.decode(block, offset)
        if differs:
            if before_lk is None:
                raise ValueError("selection: a position differs from one before it that is not known")
            found = np.setxor1d(found, before_lk[layer], assume_unique=True)
        if len(found) != topk:
            raise ValueError(f"selection: expected {topk} positions for a token and layer, got {len(found)}")
        selected_lk[layer] = found
    return selected_lk
