"""The grammar of the multiples of a number: those between two bounds one by one, or all that end in certain digits."""

from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, gcd, lcm

from . import ebnf

_MOST_LISTED = 1000
"""Of values, or of endings."""
_MOST_DIGITS = 12
"""After the point of the number."""


def grammar(
    steps: tuple[Decimal, ...], low: Decimal | None, high: Decimal | None, above: bool, below: bool, fractions: bool
) -> str | None:
    """The grammar of the multiples of all `steps`, which are above zero; None where it would be too large.

    Args:
        low, high, above, below: as for `ebnf.numbers`.
        fractions: not only whole numbers.
    """
    step = Fraction(1) if not fractions else Fraction(steps[0])
    for other in map(Fraction, steps):
        step = Fraction(lcm(step.numerator, other.numerator), gcd(step.denominator, other.denominator))
    digits = next((count for count in range(_MOST_DIGITS + 1) if (step * 10**count).denominator == 1), None)
    if digits is None:
        return None
    first = None if low is None else _first(Fraction(low) / step, above)
    last = None if high is None else -_first(-Fraction(high) / step, below)
    if first is not None and last is not None and last - first < _MOST_LISTED:
        return " | ".join(ebnf.text(_plain(step * count, digits)) for count in range(first, last + 1))
    positive = _from_zero(step, digits, max(first or 0, 0), last) if last is None or last >= 0 else ""
    negative = _from_zero(step, digits, max(-(last or 0), 1), None if first is None else -first)
    if positive is None or negative is None:
        return None
    negative = "" if first is not None and first >= 0 else negative and f'"-" ({negative})'
    return " | ".join(option for option in (positive, negative) if option)


def _first(bound: Fraction, excluded: bool) -> int:
    return floor(bound) + 1 if excluded else ceil(bound)


def _plain(number: Fraction, digits: int) -> str:
    """With as few digits as it takes."""
    while digits and (number * 10 ** (digits - 1)).denominator == 1:
        digits -= 1
    return ("-" if number < 0 else "") + _pointed(str(int(abs(number) * 10**digits)).rjust(digits + 1, "0"), digits)


def _from_zero(step: Fraction, digits: int, first: int, last: int | None) -> str | None:
    """The multiples from `first` steps, which is not below zero, with up to so many digits after the point."""
    options = []
    for point in range(digits + 1):
        # In units of the last digit: what all are multiples of, and the bounds.
        scale = step * 10**point
        unit = scale.numerator
        most = None if last is None else floor(last * scale / unit)
        options.append(_ending(unit, ceil(first * scale / unit), most, point))
    if None in options:
        return None
    return " | ".join(option for option in options if option)


def _ending(unit: int, least: int, most: int | None, point: int) -> str | None:
    """The multiples of `unit` from `least` to `most` times it, with a point before the last digits.

    A number is told from its last digits where a power of ten is a multiple of `unit`; what is before them is free.
    """
    digits = next((count for count in range(_MOST_DIGITS) if 10**count % unit == 0), None)
    if digits is None:
        return None
    digits = max(digits, point)
    round_ = 10**digits
    if round_ // unit > _MOST_LISTED:
        return None
    spans: dict[tuple[int, int | None], list[str]] = {}
    options = []
    for end in range(0, round_, unit):
        begins = max(ceil(Fraction(least * unit - end, round_)), 0)
        ends = None if most is None else floor(Fraction(most * unit - end, round_))
        if begins == 0 and (ends is None or ends >= 0):
            options.append(_pointed(str(end).rjust(point + 1, "0"), point))
            begins = 1
        if ends is None or ends >= begins:
            spans.setdefault((begins, ends), []).append(_pointed(str(end).rjust(digits, "0"), point))
    written = [" | ".join(map(ebnf.text, options))] if options else []
    for (begins, ends), endings in spans.items():
        after = "" if digits == 0 else f" ({' | '.join(map(ebnf.text, endings))})"
        written.append(f"({ebnf.integers(begins, ends)}){after}")
    return " | ".join(written)


def _pointed(digits: str, point: int) -> str:
    return f"{digits[:-point]}.{digits[-point:]}" if point else digits
