"""Text that remembers which of its characters the template wrote."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]


class Markup(str):
    """A string, and the places in it that are the template's. All else in it is text that others wrote.

    Control tokens are read in those places only. `+` and `join` with plain strings keep them; whatever else makes a
    string of it (an f-string, a slice, `str.join`) forgets them, and then nothing in the text is a control token.

    Attributes:
        spans: `(start, end)` of every stretch that the template wrote, in order; two never touch.
    """

    __slots__ = ("spans",)
    spans: tuple[Span, ...]

    def __new__(cls, text: str = "", spans: Iterable[Span] | None = None) -> Markup:
        """All of `text` is the template's where no `spans` are given."""
        self = super().__new__(cls, text)
        self.spans = (((0, len(text)),) if text else ()) if spans is None else tuple(spans)
        return self

    def __add__(self, other: str) -> Markup:
        return _joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Markup:
        return _joined((other, self)) if isinstance(other, str) else NotImplemented

    def join(self, parts: Iterable[str], /) -> Markup:
        pieces: list[str] = []
        for part in parts:
            pieces += (self, part) if pieces else (part,)
        return _joined(pieces)


def _joined(pieces: Iterable[str]) -> Markup:
    texts: list[str] = []
    spans: list[Span] = []
    end = 0
    for piece in pieces:
        for start, stop in piece.spans if isinstance(piece, Markup) else ():
            if spans and spans[-1][1] == end + start:
                spans[-1] = (spans[-1][0], end + stop)
            else:
                spans.append((end + start, end + stop))
        texts.append(piece)
        end += len(piece)
    return Markup("".join(texts), spans)
