"""GLM-5's answers through SGLang's own parsers, with the plugin's hooks in place."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("sglang")

import glm
from chats import WEATHER
from scripted_sglang import put_hooks
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from dsv32_plugin.core import chat_format

NAME = WEATHER["function"]["name"]
(SPOKEN,) = (known for known in chat_format.FORMATS if known.name.startswith("GLM"))
TOOL, REASONING = SPOKEN.parsers["sglang"]
CALLS = glm.call(NAME, city="Hangzhou", days="3") + glm.call(NAME, city="巴黎", days="1")
ANSWER = "Let me see: 1 < 2.</think>I ask.\n" + CALLS
ARGUMENTS = [{"city": "Hangzhou", "days": 3}, {"city": "巴黎", "days": 1}]


def parse(pieces: list[str]) -> tuple[str, str, list[str], list[Any]]:
    """Thoughts, text, names and arguments; of one piece as a whole, else streamed."""
    reasoning = ReasoningParser(REASONING, stream_reasoning=True, force_reasoning=True)
    calls = FunctionCallParser([Tool(**WEATHER)], TOOL)
    thoughts, text, names, arguments = "", "", [], {}
    for piece in pieces:
        if len(pieces) == 1:
            thought, rest = reasoning.parse_non_stream(piece)
            plain, found = calls.parse_non_stream(rest)
        else:
            thought, rest = reasoning.parse_stream_chunk(piece)
            plain, found = calls.parse_stream_chunk(rest) if rest else ("", [])
        thoughts, text = thoughts + (thought or ""), text + (plain or "")
        for number, item in enumerate(found):
            index = number if len(pieces) == 1 else item.tool_index
            if item.name:
                names.append(item.name)
            arguments[index] = arguments.get(index, "") + (item.parameters or "")
    return thoughts, text, names, [json.loads(arguments[index]) for index in sorted(arguments)]


# Each of GLM's marks is one token: a piece of a stream holds the whole mark.
TOKENS = re.findall(r"</?(?:think|tool_call|arg_key|arg_value)>|.", ANSWER, re.DOTALL)


@pytest.mark.parametrize("tokens", [None, 1, 3, 7, 20])
def test_nothing_of_an_answer_is_lost(tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    put_hooks(monkeypatch)
    step = tokens or len(TOKENS)
    pieces = ["".join(TOKENS[start : start + step]) for start in range(0, len(TOKENS), step)]
    thoughts, text, names, arguments = parse(pieces)
    assert thoughts.strip() == "Let me see: 1 < 2."
    assert text.strip() == "I ask."
    assert (names, arguments) == ([NAME, NAME], ARGUMENTS)
