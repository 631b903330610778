"""Pieces of grammars as xgrammar reads them: texts, sets of characters, ranges of numbers."""

import json
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Final, Literal, TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Code points from the first to the second of each pair, in order, none twice."""
Mode: TypeAlias = Literal["raw", "json"]
"""How a string's characters are written: as they are, or as in JSON."""

BAR: Final = "｜"
"""Every mark of the chat format has it: no value that a grammar bounds holds it as it is, so none ends too early."""
EVERY: Final[Ranges] = ((0x1, 0xD7FF), (0xE000, 0x10FFFF))
DIGIT: Final[Ranges] = ((0x30, 0x39),)

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_IN_JSON = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", BAR: "\\uff5c"}
_FEW = 16
_CLASS = re.compile(r"\[(?:[^\]\\]|\\.)*\]")
_ONE = re.compile(r"\[(?:[^\]\\]|\\.)*\]|\w+")
INTEGER: Final = '"-"? ("0" | [1-9] [0-9]*)'
NUMBER: Final = f'{INTEGER} ("." [0-9]+)? ([eE] [+\\-]? [0-9]{{1,2}})?'


def text(value: str) -> str:
    """The grammar of exactly this text."""
    return '"' + "".join(_ESCAPES.get(character, _visible(character)) for character in str(value)) + '"'


def json_text(value: object) -> str:
    """The grammar of exactly this JSON value, in the official layout."""
    return text(json.dumps(value, ensure_ascii=False).replace(BAR, "\\uff5c"))


def is_text(value: str) -> bool:
    """A grammar can hold this."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def intersect(a: Ranges, b: Ranges) -> Ranges:
    """The characters of both."""
    return tuple(
        (max(low, other_low), min(high, other_high))
        for low, high in a
        for other_low, other_high in b
        if max(low, other_low) <= min(high, other_high)
    )


def without(ranges: Ranges, excluded: Iterable[str]) -> Ranges:
    """The characters but for these."""
    kept = list(ranges)
    for code in map(ord, excluded):
        kept = [
            piece
            for low, high in kept
            for piece in ((low, min(high, code - 1)), (max(low, code + 1), high))
            if piece[0] <= piece[1]
        ]
    return tuple(sorted(set(kept)))


def complement(ranges: Ranges) -> Ranges:
    """All other characters."""
    kept, start = [], 1
    for low, high in sorted(ranges):
        if start < low:
            kept.append((start, low - 1))
        start = max(start, high + 1)
    return intersect((*kept, (start, 0x10FFFF)) if start <= 0x10FFFF else tuple(kept), EVERY)


def one_of(ranges: Ranges, mode: Mode) -> str:
    """The grammar of one character; empty where there is none."""
    if mode == "raw":
        return _class(without(ranges, BAR))
    plain = _class(without(intersect(ranges, ((0x20, 0x10FFFF),)), '"\\' + BAR))
    escaped = [text(short) for character, short in _IN_JSON.items() if intersect(ranges, ((ord(character),) * 2,))]
    pieces = [plain, *escaped] if plain else escaped
    return f"({' | '.join(pieces)})" if len(pieces) > 1 else "".join(pieces)


def repeat(piece: str, least: int, most: int | None) -> str:
    """The grammar of a piece several times.

    xgrammar writes a class that often out and takes seconds for it, unlike one of several options.
    """
    if most is not None and most > _FEW and _CLASS.fullmatch(piece):
        piece = f"{piece} | {piece}"
    times = {0: "*", 1: "+"}.get(least) if most is None else None
    return (piece if _ONE.fullmatch(piece) else f"({piece})") + (times or f"{{{least},{'' if most is None else most}}}")


def text_without(stop: str) -> str:
    """A rule's body: any text that does not have `stop`."""
    return f"TagDispatch(loop_after_dispatch=false, excludes=({text(stop)}))"


def text_up_to(start: str, rule: str) -> str:
    """A rule's body: any text; where it has `start`, it ends in that and what the rule named says comes then."""
    return f"TagDispatch(({text(start)}, {rule}), loop_after_dispatch=false, excludes=())"


def _class(ranges: Ranges) -> str:
    if not ranges:
        return ""
    spans = (_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in ranges)
    return f"[{''.join(spans)}]"


def _code(code: int) -> str:
    character = chr(code)
    if character.isascii() and character.isalnum():
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _visible(character: str) -> str:
    return character if " " <= character != "\x7f" else _code(ord(character))


def integers(low: int | None, high: int | None) -> str:
    """The grammar of the whole numbers from `low` to `high`, both included; empty where there are none."""
    options = []
    if low is None or low < 0:
        negative = _naturals(1 if high is None or high >= 0 else -high, None if low is None else -low)
        options += [f'"-" ({negative})'] if negative else []
    if high is None or high >= 0:
        natural = _naturals(max(low or 0, 0), high)
        options += [natural] if natural else []
    return " | ".join(options)


def whole(low: Decimal | None, high: Decimal | None, above: bool, below: bool) -> str:
    """The grammar of the whole numbers among those of `numbers`."""
    return integers(_first(low, 0, above), _last(high, 0, below))


def numbers(low: Decimal | None, high: Decimal | None, above: bool, below: bool) -> str:
    """The grammar of the numbers from `low` to `high`, with any digits after the point and no exponent.

    Args:
        above: `low` itself is too small.
        below: `high` itself is too large.
    """
    options = []
    if high is None or high >= 0:
        begins = low is not None and low >= 0
        options.append(_positive(low if begins else None, high, above and begins, below))
    if low is None or low < 0:
        begins = high is not None and high < 0
        least, most = None if high is None or not begins else -high, None if low is None else -low
        negative = _positive(least, most, below or not begins, above)
        options.append(f'"-" ({negative})' if negative else "")
    return " | ".join(option for option in options if option)


def _positive(low: Decimal | None, high: Decimal | None, above: bool, below: bool) -> str:
    """The same of numbers not below zero, which is where `low` is None.

    Up to as many digits as the bounds have, a number is one of a range of whole numbers. More digits may follow
    whatever is at least `low` and below `high`.
    """
    low = Decimal(0) if low is None else low
    most = max(1, *(-int(bound.as_tuple().exponent) for bound in (low, high) if bound is not None))
    options = [whole(low, high, above, below)]
    for digits in range(1, most + 1):
        first, last = _first(low, digits, above), _last(high, digits, below)
        options.append(_decimals(first or 0, last, digits))
    least, last = _first(low, most, False), _last(high, most, True)
    longer = _decimals(least or 0, last, most)
    options.append(f"({longer}) [0-9]* [1-9] [0-9]*" if longer else "")
    return " | ".join(option for option in options if option)


def _first(bound: Decimal | None, digits: int, excluded: bool) -> int | None:
    if bound is None:
        return None
    scaled = bound.scaleb(digits)
    whole = int(scaled.to_integral_value(rounding="ROUND_CEILING"))
    return whole + 1 if excluded and whole == scaled else whole


def _last(bound: Decimal | None, digits: int, excluded: bool) -> int | None:
    opposite = _first(None if bound is None else -bound, digits, excluded)
    return None if opposite is None else -opposite


def _decimals(first: int, last: int | None, digits: int) -> str:
    """Numbers not below zero with so many digits after the point, given in units of the last one."""
    if last is not None and first > last:
        return ""
    unit = 10**digits
    whole, fraction = divmod(first, unit)
    any_fraction = f'"." [0-9]{{{digits}}}'
    if last is not None and last // unit == whole:
        return f'{text(str(whole))} "." ({_padded(fraction, last % unit, digits)})'
    options = []
    if fraction:
        options.append(f'{text(str(whole))} "." ({_padded(fraction, unit - 1, digits)})')
        whole += 1
    if last is None:
        return " | ".join([*options, f"({_naturals(whole, None)}) {any_fraction}"])
    between = _naturals(whole, last // unit - 1)
    options += [f"({between}) {any_fraction}"] if between else []
    options.append(f'{text(str(last // unit))} "." ({_padded(0, last % unit, digits)})')
    return " | ".join(options)


def _naturals(low: int, high: int | None) -> str:
    """Whole numbers from `low`, which is not below zero; empty where there are none."""
    options = []
    if high is not None and low > high:
        return ""
    longest = len(str(low if high is None else high))
    for length in range(len(str(low)), longest + 1):
        least = max(low, 10 ** (length - 1) if length > 1 else 0)
        most = 10**length - 1 if high is None else min(high, 10**length - 1)
        if least <= most:
            options.append(_padded(least, most, length))
    if high is None:
        options.append(f"[1-9] [0-9]{{{longest}}} [0-9]*")
    return " | ".join(options)


def _padded(low: int, high: int, length: int) -> str:
    """Exactly `length` digits, from `low` to `high`."""
    if length == 0:
        return '""'
    if low == 0 and high == 10**length - 1:
        return f"[0-9]{{{length}}}"
    unit = 10 ** (length - 1)
    first, last = low // unit, high // unit
    if first == last:
        rest = _padded(low % unit, high % unit, length - 1)
        return f'"{first}"' if rest == '""' else f'"{first}" ({rest})'
    options = []
    if low % unit:
        options.append(f'"{first}" ({_padded(low % unit, unit - 1, length - 1)})')
        first += 1
    full_last = high % unit == unit - 1
    top = last if full_last else last - 1
    if first <= top:
        options.append(f"[{first}-{top}]" + (f" [0-9]{{{length - 1}}}" if length > 1 else ""))
    if not full_last:
        options.append(f'"{last}" ({_padded(0, high % unit, length - 1)})')
    return " | ".join(options)
