"""Requests of real clients, as they were recorded: each is read, and its prompt has everything where DeepSeek's has it.

They hold no prompt text but words of the same length, and the scripted model's marks. By its rules (scripted/
scripted_rules.py) a call is made only if the prompt has the tools and the user's turn in their places, and a result is
repeated only if the prompt has the client's call and its result. test_replay.py asks a real server the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import filler
import pytest
import scripted_rules

from dsv32_plugin import apis
from dsv32_plugin.apis import anthropic, chat, responses
from dsv32_plugin.apis.exchange import Exchange, Server
from dsv32_plugin.parsers import OutputParser, protocol

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))


def read(path: str, body: dict[str, Any]) -> Exchange:
    """As the gateway does."""
    if "chat/completions" in path:
        return chat.read(body, Server())
    if "responses" in path:
        return responses.read(body, Server(), responses.Store())
    return anthropic.read(body, Server())


@pytest.mark.parametrize("path", RECORDED, ids=[path.stem for path in RECORDED])
def test_a_recorded_request_is_read_and_rendered(path: Path) -> None:
    for request in json.loads(path.read_text(encoding="utf-8")):
        conversation = read(request["path"], filler.fill(request["body"])).conversation
        prompt = str(apis.rendered(conversation, [], {}, "v3.2", len))
        assert prompt.endswith((protocol.THINK_START, protocol.THINK_END)), "the answer has its mark"
        said = OutputParser.parse(scripted_rules.answer(prompt), thinking=conversation.thinking)
        assert [call.name for call in said.tool_calls] == request["calls"]
        assert said.content.startswith(request["says"])


def test_whole_loops_are_recorded() -> None:
    """Of every kind of client, so that an empty folder does not pass."""
    loops = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RECORDED}
    for client in ("anthropic", "ag2", "cli", "langchain", "litellm", "openai", "openai-agents", "pydantic-ai"):
        calls = [request["calls"] for name, loop in loops.items() if name.startswith(client) for request in loop]
        assert any(calls), client
