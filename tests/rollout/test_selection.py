"""Selections as bytes: they come back as they were, in few bytes, and what is not known says so."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from dsv32_plugin.rollout import decode_selection, gaps
from dsv32_plugin.rollout.selection import decode_block, encode_block, encode_selection
from dsv32_plugin.rollout.store import SelectionStore

RANDOM = np.random.default_rng(0)
KB = 1024


def drawn(keys: int, topk: int) -> np.ndarray:
    return np.sort(RANDOM.choice(keys, topk, replace=False)).astype(np.int32)


def moved(before_k: np.ndarray, keys: int, overlap: float) -> np.ndarray:
    """As many of `before_k`, and others that are not of them."""
    kept = RANDOM.choice(before_k, round(overlap * len(before_k)), replace=False)
    others = np.setdiff1d(np.arange(keys), before_k)
    return np.sort(np.concatenate([kept, RANDOM.choice(others, len(before_k) - len(kept), replace=False)]))


def test_sets_of_any_size_come_back() -> None:
    sets = [np.array(members, dtype=np.int64) for members in ([], [0], [163839], [0, 1, 2], [5, 70000, 70001])]
    sets.append(np.flatnonzero(RANDOM.random(5000) < 0.3))
    flags = np.arange(len(sets)) % 2 == 0
    coded = gaps.encode(np.concatenate(sets), np.array([len(members) for members in sets]), flags)
    data, offset = b"".join(coded), 0
    for members, flag in zip(sets, flags, strict=True):
        found, flagged, offset = gaps.decode(data, offset)
        assert (found.tolist(), flagged) == (members.tolist(), flag)
    assert offset == len(data)


@pytest.mark.parametrize("keys", [4096, 32768, 131072, 163840])
def test_a_layer_and_token_take_at_most_two_kilobytes(keys: int) -> None:
    """SGLang's own are 8 KB, whatever is selected."""
    clustered = np.arange(keys - 2048, keys, dtype=np.int32)
    mixed = np.sort(np.concatenate([drawn(keys // 2, 1024), clustered[1024:]]))
    for selected_k in (drawn(keys, 2048), clustered, mixed):
        block, _ = encode_block(selected_k[None], None)
        assert np.array_equal(decode_block(block, 1, 2048, None)[0], selected_k)
        assert len(block) <= 2 * KB


@pytest.mark.parametrize(("overlap", "most"), [(0.9, 0.6 * KB), (0.99, 0.09 * KB), (0.5, 2 * KB), (0.0, 2 * KB)])
def test_what_neighbours_share_costs_little(overlap: float, most: float) -> None:
    before_k = drawn(131072, 2048)
    selected_k = moved(before_k, 131072, overlap)
    block, differs = encode_block(selected_k[None], before_k[None])
    assert len(block) <= most, f"{len(block)} bytes"
    assert np.array_equal(decode_block(block, 1, 2048, before_k[None] if differs else None)[0], selected_k)


TOPK, LAYERS = 4, (0, 1, 5)


def selections(positions: int) -> np.ndarray:
    """[positions, layers, topk]; those of the first positions are made up and never read."""
    rows = [[drawn(max(position + 1, TOPK), TOPK) for _ in LAYERS] for position in range(positions)]
    return np.array(rows, dtype=np.int32)


def add(store: SelectionStore, slots: list[int], first: int, selected: np.ndarray, **options: bool) -> None:
    """The tokens of one sequence from position `first` on."""
    tokens = range(first, first + len(selected))
    before = [slots[position - 1] if position else -1 for position in tokens]
    options = {"any_may_be_last": False, **options}
    store.add([slots[position] for position in tokens], list(tokens), before, selected, **options)


@pytest.mark.parametrize("step", [1, 3, 7, 50])
def test_a_sequence_comes_back_however_it_was_cut_into_steps(step: int) -> None:
    store, truth, slots = SelectionStore(LAYERS, TOPK, recent=8), selections(50), list(range(900, 950))
    for first in range(0, 50, step):
        add(store, slots, first, truth[first : first + step])
    found = decode_selection(base64.b64encode(store.stream(slots)).decode())
    assert (found.layers, found.topk, found.positions, found.known_p.all()) == (LAYERS, TOPK, 50, True)
    for number, layer in enumerate(LAYERS):
        assert np.array_equal(found.of(layer)[TOPK:], truth[TOPK:, number])
        assert found.of(layer)[:TOPK].tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]]
        assert found.mask(layer).sum(axis=1).tolist() == [1, 2, 3, *[TOPK] * 47]
    assert np.array_equal(found.stacked()[TOPK:], truth[TOPK:])


def test_a_prefix_that_two_share_and_pages_that_are_put_in_place() -> None:
    """The second sequence computed its own prefix, and is then given the first one's slots for the half of it."""
    store, first, second = SelectionStore(LAYERS, TOPK, recent=8), selections(30), selections(30)
    add(store, list(range(30)), 0, first)
    slots = list(range(100, 130))
    add(store, slots, 0, second[:20])
    slots[:15] = range(15)
    for position in range(20, 30):
        add(store, slots, position, second[position : position + 1])
    found = decode_selection(store.stream(slots)).of(1)
    assert np.array_equal(found[TOPK:15], first[TOPK:15, 1])
    assert np.array_equal(found[15:], second[15:, 1])


def test_drafts_that_are_rejected_leave_nothing() -> None:
    store, truth, slots = SelectionStore(LAYERS, TOPK, recent=64), selections(40), list(range(40))
    add(store, slots, 0, truth[:10])
    for first in range(10, 38, 2):  # of four that are verified two are accepted
        rejected = selections(4)[: min(2, 38 - first)] + 4
        add(store, slots, first, np.concatenate([truth[first : first + 2], rejected]), any_may_be_last=True)
    add(store, slots, 38, truth[38:], any_may_be_last=True)
    assert np.array_equal(decode_selection(store.stream(slots)).of(5)[TOPK:], truth[TOPK:, 2])


def test_what_is_not_known_says_so() -> None:
    store, truth = SelectionStore(LAYERS, TOPK, recent=8), selections(20)
    add(store, list(range(20)), 0, truth)
    slots = [*range(10), 500, *range(11, 20)]
    found = decode_selection(store.stream(slots))
    assert np.flatnonzero(~found.known_p).tolist() == [10]
    assert (found.of(0)[10] == -1).all()
    assert np.array_equal(found.of(0)[11:], truth[11:, 0])
    with pytest.raises(ValueError, match="1 positions are not known, the first is 10"):
        found.mask(0)


def test_a_slot_that_is_used_again_is_another_token() -> None:
    store = SelectionStore(LAYERS, TOPK, recent=8)
    add(store, list(range(20)), 0, selections(20))
    add(store, list(range(19, -1, -1)), 0, truth := selections(12))
    assert np.array_equal(decode_selection(store.stream(list(range(19, 7, -1)))).of(0)[TOPK:], truth[TOPK:, 0])
    # Slot 3 still has position 3 of the first, which is not stored; slot 7 has its position 7.
    assert not decode_selection(store.stream(list(range(100, 120)))).known_p[TOPK:].any()


def test_other_bytes_are_refused() -> None:
    data = encode_selection(LAYERS, TOPK, 5, [None])
    for bad, says in [
        (b"", "begin with"),
        (b"JSON" + data[4:], "begin with"),
        ("not base64!", "base64"),
        (data[:4] + b"\x09" + data[5:], "expected version 1, got 9"),
        (data + b"\0", "was the answer cut"),
        (data[:-2], "was the answer cut"),
        (data[:9], "was the answer cut"),
    ]:
        with pytest.raises(ValueError, match=says):
            decode_selection(bad)
    with pytest.raises(ValueError, match="expected one that selects \\(0, 1, 5\\), got 3"):
        decode_selection(data).of(3)
