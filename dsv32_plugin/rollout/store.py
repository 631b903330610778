"""What was selected for the tokens that lie in a paged cache, by their slots, as blocks of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from dsv32_plugin.rollout.selection import decode_block, encode_block, encode_selection


class _Row:
    """The selections of one token: a block, and the row that it differs from."""

    __slots__ = ("before", "block", "position")

    def __init__(self, position: int, block: bytes, before: _Row | None) -> None:
        self.position, self.block, self.before = position, block, before


class SelectionStore:
    """A row for every slot whose token sees more keys than it may select.

    Sequences that share a prefix share its slots and rows. A slot that is used again gets another row. A row holds on
    to that which it differs from: where an engine puts equal pages in place of a sequence's own, its rows stay right.
    """

    def __init__(self, layers: Sequence[int], topk: int, recent: int) -> None:
        """`recent`: tokens at the ends of sequences whose selections are kept as they are, for the next token's."""
        self.layers, self.topk = tuple(layers), topk
        self._rows: dict[int, _Row] = {}
        self._most_recent = recent
        self._recent: OrderedDict[int, tuple[_Row, np.ndarray]] = OrderedDict()

    def add(
        self,
        slots_t: Sequence[int],
        positions_t: Sequence[int],
        before_t: Sequence[int],
        selected_tlk: np.ndarray,
        *,
        any_may_be_last: bool,
    ) -> None:
        """Keep what was selected for the tokens of a step.

        Args:
            before_t: slot of the token before each in its sequence.
            selected_tlk: [T, L, K] int32: positions, ascending; K of them for each token that is kept.
            any_may_be_last: the next step may go on behind any of these tokens, as after drafts.
        """
        kept = [token for token, position in enumerate(positions_t) if position >= self.topk]
        if not kept:
            return
        followed = {before_t[token] for token in kept}
        of_step: dict[int, tuple[_Row, np.ndarray]] = {}
        nothing: tuple[_Row | None, np.ndarray | None] = (None, None)
        for token in kept:
            slot, before, selected_lk = slots_t[token], before_t[token], selected_tlk[token]
            source, before_lk = of_step.get(before) or self._recent.get(before) or nothing
            if self._rows.get(before) is not source:
                source, before_lk = None, None
            block, differs = encode_block(selected_lk, before_lk)
            row = self._rows[slot] = _Row(positions_t[token], block, source if differs else None)
            of_step[slot] = row, selected_lk
            if any_may_be_last or slot not in followed:
                self._remember(slot, row, selected_lk)

    def stream(self, slots_p: Sequence[int]) -> bytes:
        """What is known of a sequence whose tokens lie in these slots (`encode_selection`)."""
        return encode_selection(self.layers, self.topk, len(slots_p), self._blocks(slots_p))

    def _blocks(self, slots_p: Sequence[int]) -> Iterator[bytes | None]:
        before: _Row | None = None
        for position in range(self.topk, len(slots_p)):
            row = self._rows.get(slots_p[position])
            if row is None or row.position != position:
                yield None
                before = None
                continue
            if row.before is None or row.before is before:
                yield row.block
            else:
                yield encode_block(self._selected(row), None)[0]
            before = row

    def _selected(self, row: _Row) -> np.ndarray:
        chain = [row]
        while (before := chain[-1].before) is not None:
            chain.append(before)
        selected_lk: np.ndarray | None = None
        for link in reversed(chain):
            selected_lk = decode_block(link.block, len(self.layers), self.topk, selected_lk)
        assert selected_lk is not None
        return selected_lk

    def _remember(self, slot: int, row: _Row, selected_lk: np.ndarray) -> None:
        self._recent[slot] = row, selected_lk.copy()
        self._recent.move_to_end(slot)
        while len(self._recent) > self._most_recent:
            self._recent.popitem(last=False)
