"""Random outputs of a model: prose, calls, and both damaged in the ways that models damage them."""

import json
import random
from typing import Any, NamedTuple

from parser_cases import BOS, EOS, D

NAMES = ["now", "run", "search", "edit", "get_weather", "nope"]
KEYS = ["query", "topn", "code", "env", "args", "label", "target", "anything", "arguments", "input", "x", 'a"b', "<c>"]
MARKS = [D, D, D, D, D, "|DSML|", "｜｜DSML｜｜", "‖DSML‖", " | DSML | ", "｜DSML｜ ", ""]
WRAPPERS = ["function_calls"] * 5 + ["tool_calls", "toolcall", "tool_use", "calls"]
PROSE = [
    "Sure.",
    "a < b",
    " <b>c</b> ",
    "\n",
    "\n\n",
    " ",
    "`",
    "```\n",
    '"',
    "“",
    "x",
    "杭州",
    "</",
    "<",
    "<|",
    "|",
    "\\",
]
PROSE += [
    "the tag ",
    "<think>",
    "</think>",
    EOS,
    BOS,
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "{",
    "[1]",
    "</parameter>",
]
JSON = [
    1,
    -2.5,
    True,
    None,
    "s",
    'q"\\\n',
    [],
    [1, [2, "]"]],
    {"a": {"b": None}},
    {"query": "x", "topn": 5},
    {"x": 1},
    "é😀",
]
BROKEN = [
    '{"a": 1',
    "[1, ",
    "tru",
    "12 apples",
    "{a: 1}",
    "1e999",
    "NaN",
    "[True, None,]",
    '["a\n\\d"',
    "",
    " ",
    "00",
    '{"query": oops',
]
PIECES = [
    "<",
    "</",
    "｜",
    D,
    "invoke",
    "parameter",
    "function_calls",
    ' name="now"',
    ' string="',
    ">",
    "/>",
    "\\u00",
    '"',
    "{",
    "}",
]
MODES: list[dict[str, Any]] = [{}, {}, {}, {"thinking": True}, {"tools": None}, {"policy": "strict"}]
MODES += [{"tools": None, "thinking": True}, {"thinking": True, "tool_calls": False}, {"think_tags": False}]
MODES += [{"thinking": True, "policy": "strict"}]


class Output(NamedTuple):
    """A text with the options of its parser; `marks` are the characters in it that occur once, to be found again."""

    text: str
    options: dict[str, Any]
    ended: bool
    marks: str


def random_output(rng: random.Random) -> Output:
    """The same for the same state of `rng`."""
    parts: list[str] = []
    if rng.random() < 0.4:
        parts += [*_prose(rng), "</think>"]
    for _ in range(rng.randrange(4)):
        parts += _prose(rng) if rng.random() < 0.5 else _block(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 2, 4])):
        _damage(rng, parts)
    marks = ""
    if rng.random() < 0.5:
        marks = "".join(chr(0x4E00 + i) for i in range(len(parts)))
        parts = [part + mark if rng.random() < 0.3 else part for part, mark in zip(parts, marks, strict=True)]
        marks = "".join(mark for part, mark in zip(parts, marks, strict=True) if part.endswith(mark))
    text = "".join(parts)
    if rng.random() < 0.3:
        text = text[: rng.randrange(len(text) + 1)]
    return Output(text, rng.choice(MODES), rng.random() < 0.5, marks)


def _prose(rng: random.Random) -> list[str]:
    return rng.choices(PROSE, k=rng.randrange(1, 5))


def _block(rng: random.Random) -> list[str]:
    mark, wrapper = rng.choice(MARKS[:-1]), rng.choice(WRAPPERS)
    calls = [part for _ in range(rng.randrange(1, 3)) for part in _call(rng, mark)]
    if rng.random() < 0.2:
        return calls
    return [rng.choice(["\n\n", "\n\n", "\n", ""]), f"<{mark}{wrapper}>", "\n", *calls, f"</{mark}{wrapper}>"]


def _call(rng: random.Random, mark: str) -> list[str]:
    parts = [f'<{mark}invoke name="{rng.choice(NAMES)}">', "\n"]
    if rng.random() < 0.1:
        parts += [rng.choice([json.dumps(rng.choice(JSON)), *BROKEN, "hello"]), "\n"]
    for _ in range(rng.randrange(3)):
        own = rng.choice(MARKS) if rng.random() < 0.1 else mark
        kind = rng.choice([' string="true"', ' string="false"', ' string="false"', "", " string='x'", f"g={D}"])
        parts += [f'<{own}parameter name="{rng.choice(KEYS)}"{kind}>', *_value(rng), f"</{own}parameter>", "\n"]
    return [*parts, f"</{mark}invoke>", "\n"]


def _value(rng: random.Random) -> list[str]:
    chance = rng.random()
    if chance < 0.4:
        return [json.dumps(rng.choice(JSON), ensure_ascii=rng.random() < 0.5)]
    return [rng.choice(BROKEN)] if chance < 0.6 else rng.choices(PROSE + PIECES, k=rng.randrange(4))


def _damage(rng: random.Random, parts: list[str]) -> None:
    at = rng.randrange(len(parts) + 1)
    chance = rng.random()
    if not parts or at == len(parts) or chance < 0.3:
        parts.insert(at, rng.choice(PIECES + PROSE))
    elif chance < 0.6:
        del parts[at]
    elif chance < 0.8:
        cut = rng.randrange(len(parts[at]) + 1)
        parts[at] = parts[at][:cut] + rng.choice(["", rng.choice(PIECES)]) + parts[at][cut + rng.randrange(2) :]
    else:
        parts.insert(at, rng.choice(parts))
