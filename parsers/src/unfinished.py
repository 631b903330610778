"""The arguments of a call that the output stopped in: the beginning of a JSON object."""

import json
import re
from typing import Any, NoReturn

from .json_stream import JsonStream

_SPACE = re.compile(r"[ \t\n\r]*")
_ATOM = re.compile(r"[-+.0-9A-Za-z_]+")
_LITERALS = ("true", "false", "null")
_HALF_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_LONGEST_HALF_ESCAPE = 5


def ended_parameters(arguments: str, *, value_is_open: bool = True) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """Take the arguments of an unfinished call apart.

    Args:
        arguments: the beginning of a JSON object. Empty text counts as one, and so does a whole object.
        value_is_open: whether a number at its end may go on (`OutputParser.value_is_open`).

    Returns:
        The parameters that ended, and name and text of the one that was being written, None if there was none. The text
        is that of an open string, else the JSON so far. A parameter that was given before and is being written again is
        not among those that ended.

    Raises:
        ValueError: this is not the beginning of a JSON object.
    """
    if not value_is_open:
        arguments += " "
    ended: dict[str, Any] = {}
    at = _skip(arguments, 0, "{")
    while at < len(arguments) and arguments[at] != "}":
        key = _read(arguments, at)
        if key is None:  # the name isn't whole
            _text_so_far(arguments[at:])
            return ended, None
        name, at = key
        if not isinstance(name, str):
            raise ValueError(f"expected a name in quotes, got {name!r}")
        at = _skip(arguments, at, ":")
        value = _read(arguments, at)
        if value is None:
            ended.pop(name, None)
            return ended, (name, _text_so_far(arguments[at:]))
        ended[name], at = value
        at = _skip(arguments, at, ",}")
    if arguments[at + 1 :].strip():
        raise ValueError(f"expected nothing after the JSON object, got {arguments[at + 1 :].strip()[:80]!r}")
    return ended, None


def _skip(text: str, at: int, expected: str) -> int:
    """Where to go on after one of the characters `expected` and the white space around it."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if at == len(text):
        return at
    if text[at] not in expected:
        raise ValueError(f"expected {' or '.join(expected)} at character {at} of a JSON object, got {text[at]!r}")
    if text[at] == "}":
        return at
    return _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]


def _read(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value at `start` and where it ends; None if the text ends before it does, or before that is certain."""
    atom = _ATOM.match(text, start)
    if atom and atom.end() == len(text) and atom[0] not in _LITERALS:
        return None
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _text_so_far(value: str) -> str:
    """The text of an open string, else the JSON as it is; raises ValueError where it is the beginning of no value."""
    if value.startswith('"'):
        escape = value.rfind("\\", max(0, len(value) - _LONGEST_HALF_ESCAPE))
        if escape >= 0 and _HALF_ESCAPE.fullmatch(value, escape) and _is_escape(value, escape):
            value = value[:escape]
        text: str = _DECODER.decode(value + '"')
        return text[:-1] if "\ud800" <= text[-1:] <= "\udbff" else text  # half a pair
    stream = JsonStream()
    stream.feed(value)
    if stream.failed:
        raise ValueError(f"expected the beginning of a JSON value, got {value[:80]!r}")
    return value


def _is_escape(value: str, at: int) -> bool:
    """The backslash there is not itself escaped."""
    before = value[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 0


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)
