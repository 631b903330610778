"""What an answer says and which tools it calls, read from its body: any of the three APIs, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    text: str = ""
    calls: list[str] = field(default_factory=list)
    """The names of the tools."""


def read(body: str) -> Answer:
    answer = Answer()
    events = [json.loads(body)] if body.startswith("{") else list(_events(body))
    for event in events:
        for choice in event.get("choices") or []:
            _chat(answer, choice.get("delta") or choice.get("message") or {})
        kind = event.get("type")
        if kind == "response.output_text.delta":
            answer.text += event["delta"]
        elif kind == "response.output_item.done" and event["item"]["type"].endswith("_call"):
            answer.calls.append(_name(event["item"]))
        elif kind == "content_block_start":
            _block(answer, event["content_block"])
        elif kind == "content_block_delta":
            answer.text += event["delta"].get("text", "")
        elif kind == "message":
            for block in event["content"]:
                _block(answer, block)
        elif event.get("object") == "response":
            for item in event["output"]:
                if item["type"].endswith("_call"):
                    answer.calls.append(_name(item))
                elif item["type"] == "message":
                    answer.text += "".join(part.get("text", "") for part in item["content"])
    return answer


def _events(body: str) -> Iterator[dict[str, Any]]:
    for line in body.splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def _name(item: dict[str, Any]) -> str:
    """A call's, as the prompt has it."""
    return f"{item['namespace']}__{item['name']}" if item.get("namespace") else item["name"]


def _chat(answer: Answer, message: dict[str, Any]) -> None:
    answer.text += message.get("content") or ""
    for call in message.get("tool_calls") or []:
        if call.get("function", {}).get("name"):
            answer.calls.append(call["function"]["name"])


def _block(answer: Answer, block: dict[str, Any]) -> None:
    if block["type"] == "tool_use":
        answer.calls.append(block["name"])
    answer.text += block.get("text") or ""
