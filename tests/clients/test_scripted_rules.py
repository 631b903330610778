"""The scripted model's rules, from prompts as the encoder writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import scripted_rules

from dsv32_plugin.parsers import OutputParser, encode_messages

TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("read", "mcp__sums__add")
]


def turn(*messages: dict[str, Any], thinking: bool = False) -> Any:
    prompt = encode_messages(list(messages), tools=TOOLS, thinking_mode="thinking" if thinking else "chat")
    return OutputParser.parse(scripted_rules.answer(prompt), tools=TOOLS, thinking=thinking)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def called(*names: str) -> dict[str, Any]:
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in names]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(name: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": text}


@pytest.mark.parametrize("thinking", [False, True], ids=["chat", "thinking"])
def test_calls_come_before_results_and_the_answer_after(thinking: bool) -> None:
    ask = user('Do. [[call read {"path": "a ]] b"}]] [[call add {"a": 1}]]')
    message = turn(ask, thinking=thinking)
    assert message.reasoning == (scripted_rules.THOUGHTS if thinking else "")
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == [
        ("read", {"path": "a ]] b"}),
        ("mcp__sums__add", {"a": 1}),
    ]
    history = [ask, called("read", "mcp__sums__add"), result("read", "one"), result("mcp__sums__add", "two")]
    message = turn(*history)
    assert (message.content, message.tool_calls) == ("The tool said: two", ())
    assert turn(*history, {"role": "system", "content": "On."}).content == "The tool said: two"


def test_rounds_and_the_last_word() -> None:
    ask = user("[[call read {}]] [[then]] [[call add {}]] [[say All done.]]")
    history = [ask, called("read"), result("read", "one")]
    assert [call.name for call in turn(*history).tool_calls] == ["mcp__sums__add"]
    history += [called("mcp__sums__add"), result("mcp__sums__add", "two")]
    assert turn(*history).content == "All done."


def test_a_missing_tool_is_named() -> None:
    assert turn(user("[[call write {}]]")).content == "There is no tool write among read, mcp__sums__add."


def test_without_marks_a_word_is_said() -> None:
    assert turn(user("Name this conversation.")).content == scripted_rules.NO_SCRIPT
