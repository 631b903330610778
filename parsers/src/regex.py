"""Regular expressions of JSON schemas, as grammars of the strings that they match."""

import math
import re
from collections.abc import Sequence
from typing import Any

from . import ebnf
from .ebnf import Mode, Ranges

try:  # since Python 3.11
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
except ImportError:  # pragma: no cover
    import sre_constants as sre
    import sre_parse

_MAX_SIZE = 4096
"""Of a grammar made of one expression, counted in characters matched at least."""
_MOST_WAYS = 1 << 22
"""Of a match that Python's own matching may have to try: a fraction of a second."""

_AS_GOOD = {r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?\d+(\.\d+)?$"}
"""What pydantic writes for decimal numbers has no grammar of its own."""
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = (
    *((0x9, 0xD), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
)
_CATEGORIES: dict[Any, Ranges] = {
    sre.CATEGORY_DIGIT: ebnf.DIGIT,
    sre.CATEGORY_NOT_DIGIT: ebnf.complement(ebnf.DIGIT),
    sre.CATEGORY_SPACE: ((0x9, 0xD), (0x20, 0x20)),
    sre.CATEGORY_NOT_SPACE: ebnf.complement(_SPACE),
    sre.CATEGORY_WORD: _WORD,
    # Letters outside ASCII are words to some and none to others.
    sre.CATEGORY_NOT_WORD: ebnf.intersect(ebnf.complement(_WORD), ((0x1, 0x7F),)),
}
_BEGINNINGS = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
_ENDINGS = (sre.AT_END, sre.AT_END_STRING)
_REPEATS = tuple(getattr(sre, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if hasattr(sre, name))


class UnwritableError(ValueError):
    """No grammar says what the expression does; the message says why."""


def matches(pattern: str, text: str) -> bool:
    """Whether the expression is found in a text, as JSON schema has it; False where that could take for ever."""
    return _found(pattern, text) is True


def excludes(pattern: str, text: str) -> bool:
    """Whether it is not; False where that could take for ever."""
    return _found(pattern, text) is False


def literal_prefix(pattern: str) -> str | None:
    """The text with which all begin that match, if all that begin so do; None where there is none."""
    try:
        items = list(sre_parse.parse(pattern))
    except (re.error, OverflowError, RecursionError):
        return None
    if not items or not _is_at(items[0], _BEGINNINGS) or any(kind != sre.LITERAL for kind, _ in items[1:]):
        return None
    return "".join(chr(value) for _, value in items[1:])


def begins_apart(one: str, other: str) -> bool:
    """Whether the first character tells which of two expressions a text matches, if any."""
    firsts = [_first(one), _first(other)]
    return None not in firsts and not ebnf.intersect(*firsts)  # type: ignore[arg-type]


def _first(pattern: str) -> Ranges | None:
    """The characters with which a match begins, at the beginning of the text; None where that isn't plain."""
    try:
        items = list(sre_parse.parse(pattern))
        if len(items) < 2 or not _is_at(items[0], _BEGINNINGS):
            return None
        item = items[1]
        if item[0] in _REPEATS and item[1][0] > 0 and len(item[1][2]) == 1:
            item = item[1][2][0]
        return _characters(item)
    except (re.error, OverflowError, RecursionError, UnwritableError):
        return None


def _found(pattern: str, text: str) -> bool | None:
    """None where that could take for ever, or the expression is none of Python's."""
    try:
        tree = sre_parse.parse(pattern)
        if len(text) > 256 or _ways(tree, len(text)) * (len(text) + 1) > _MOST_WAYS:
            return None
        return re.search(pattern, text) is not None
    except (re.error, OverflowError, RecursionError):
        return None


def grammar(pattern: str, mode: Mode, *, alphabet: Ranges = ebnf.EVERY, least: int = 0, most: int | None = None) -> str:
    """The grammar of the strings in which the expression is found.

    Args:
        mode: how the string is written.
        alphabet: characters that it may have.
        least: its length at least.
        most: its length at most.

    Raises:
        UnwritableError: lookaround, back references, flags, lengths that the expression leaves open in several places,
            or too large a grammar.
    """
    try:
        tree = sre_parse.parse(_AS_GOOD.get(pattern, pattern))
        if tree.state.flags & ~re.UNICODE:
            raise UnwritableError("flags")
        writer = _Writer(mode, alphabet)
        if least or most is not None:
            return writer.bounded(list(tree), least, most)
        return writer.sequence(list(tree), True, True)
    except (re.error, OverflowError, RecursionError) as error:
        raise UnwritableError(str(error)) from error


class _Writer:
    def __init__(self, mode: Mode, alphabet: Ranges):
        self._mode = mode
        self._alphabet = alphabet
        self._anything = (_REPEATS[0], (0, sre.MAXREPEAT, [(sre.NOT_LITERAL, 0)]))
        self._size = 0

    def bounded(self, items: list[Any], least: int, most: int | None) -> str:
        """One part takes up what the others leave of the length."""
        items = _unwrapped(items)
        begins, ends = bool(items) and _is_at(items[0], _BEGINNINGS), bool(items) and _is_at(items[-1], _ENDINGS)
        items = items[begins : len(items) - ends]
        if not ends:  # then it may as well begin the text
            items = [*items, self._anything]
        elif not begins:
            items = [self._anything, *items]
        shortest, longest = _total(items)
        if shortest < least or (most is not None and longest > most):
            loose = [index for index, item in enumerate(items) if _repeats_a_character(item)]
            if not loose:
                raise UnwritableError("a length that is not up to one repeated character")
            index = max(loose, key=lambda at: int(items[at][1][1]))
            others_least, others_most = _total([*items[:index], *items[index + 1 :]])
            kind, (low, high, part) = items[index]
            low = max(low, least - others_least)
            high = high if most is None else min(int(high), most - others_most)
            if low > high:
                raise UnwritableError("a length that is not up to one repeated character")
            items[index] = (kind, (low, high, part))
        return self.sequence(items, False, False)

    def sequence(self, items: Sequence[Any], open_start: bool, open_end: bool) -> str:
        """One after the other; with anything before the first and after the last where these do not say otherwise."""
        items = list(items)
        if open_start and items and _is_at(items[0], _BEGINNINGS):
            items, open_start = items[1:], False
        if open_end and items and _is_at(items[-1], _ENDINGS):
            items, open_end = items[:-1], False
        inner_start = open_start and bool(items) and _is_group(items[0])
        inner_end = open_end and bool(items) and _is_group(items[-1])
        if open_start and not inner_start:
            items.insert(0, self._anything)
        if open_end and not inner_end:
            items.append(self._anything)
        pieces = [
            self._item(item, inner_start and index == 0, inner_end and index == len(items) - 1)
            for index, item in enumerate(items)
        ]
        return " ".join(piece for piece in pieces if piece) or '""'

    def _item(self, item: Any, open_start: bool, open_end: bool) -> str:
        kind, value = item
        if kind in _REPEATS:
            least, most, part = value
            before = self._size
            piece = self.sequence(part, False, False)
            self._grow((self._size - before) * max(least - 1, 0))
            return ebnf.repeat(piece, least, None if most == sre.MAXREPEAT else most)
        if kind == sre.SUBPATTERN:
            _, added, removed, part = value
            if added or removed:
                raise UnwritableError("flags")
            return f"({self.sequence(part, open_start, open_end)})"
        if kind == sre.BRANCH:
            options = (self.sequence(part, open_start, open_end) for part in value[1])
            return f"({' | '.join(options)})"
        ranges = _characters(item)
        self._grow(1)
        piece = ebnf.one_of(ebnf.intersect(ranges, self._alphabet), self._mode)
        if not piece:
            raise UnwritableError("a character that no value has")
        return piece

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > _MAX_SIZE:
            raise UnwritableError("its size")


def _characters(item: Any) -> Ranges:
    """The characters that an expression of one character matches."""
    kind, value = item
    if kind == sre.LITERAL:
        return ((value, value),)
    if kind == sre.NOT_LITERAL:
        return ebnf.complement(((value, value),))
    if kind == sre.ANY:
        return ebnf.complement(((0xA, 0xA), (0xD, 0xD)))
    if kind == sre.IN:
        members = [member for member in value if member[0] != sre.NEGATE]
        ranges = tuple(sorted(span for member in members for span in _members(member)))
        if len(members) < len(value):
            return ebnf.complement(ranges)
        return ebnf.complement(ebnf.complement(ranges))  # in order, none twice
    raise UnwritableError(str(kind).lower())


def _members(member: Any) -> Ranges:
    kind, value = member
    if kind == sre.RANGE:
        return (tuple(value),)
    return _CATEGORIES[value] if kind == sre.CATEGORY else ((value, value),)


def _is_at(item: Any, places: tuple[Any, ...]) -> bool:
    return item[0] == sre.AT and item[1] in places


def _is_group(item: Any) -> bool:
    return item[0] in (sre.SUBPATTERN, sre.BRANCH) and "AT" in repr(item)


def _unwrapped(items: list[Any]) -> list[Any]:
    """Without a group around all of it."""
    while len(items) == 1 and items[0][0] == sre.SUBPATTERN and not (items[0][1][1] or items[0][1][2]):
        items = list(items[0][1][3])
    return items


def _repeats_a_character(item: Any) -> bool:
    return item[0] in _REPEATS and len(item[1][2]) == 1 and _width(item[1][2][0]) == (1, 1)


def _width(item: Any) -> tuple[int, int]:
    """The length of what an expression matches, at least and at most."""
    kind, value = item
    if kind == sre.AT:
        return 0, 0
    if kind == sre.SUBPATTERN:
        return _total(value[3])
    if kind == sre.BRANCH:
        widths = [_total(part) for part in value[1]]
        return min(width[0] for width in widths), max(width[1] for width in widths)
    if kind in _REPEATS:
        shortest, longest = _total(value[2])
        return shortest * value[0], min(longest * int(value[1]), int(sre.MAXREPEAT))
    return 1, 1


def _total(items: Any) -> tuple[int, int]:
    widths = [_width(item) for item in items]
    return sum(width[0] for width in widths), sum(width[1] for width in widths)


def _ways(items: Any, length: int) -> float:
    """At most so many ways there are to match a text of this length from one place on; matching may try them all."""
    return math.prod(_ways_of(kind, value, length) for kind, value in items)


def _ways_of(kind: Any, value: Any, length: int) -> float:
    if kind in _REPEATS:
        least, most, inside = value[0], min(int(value[1]), length), _ways(value[2], length)
        counts = max(1, most - least + 1)
        return counts if inside == 1 else counts * float(min(inside, _MOST_WAYS)) ** min(most, 64)
    if kind == sre.BRANCH:
        return sum(_ways(part, length) for part in value[1])
    if kind == sre.SUBPATTERN:
        return _ways(value[3], length)
    if kind in (sre.ASSERT, sre.ASSERT_NOT):
        return _ways(value[1], length)
    if kind == getattr(sre, "ATOMIC_GROUP", None):
        return _ways(value, length)
    if kind == sre.GROUPREF_EXISTS:
        return _MOST_WAYS
    # A reference back is of any length; what it repeats was counted where it stands.
    return 1
