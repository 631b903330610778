"""What a client is told of an answer by vLLM's endpoints, asked the same way and read with the public clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import anthropic
import openai
from chats import USER, WEATHER

NAME = WEATHER["function"]["name"]


@cache
def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@cache
def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


@dataclass
class Told:
    """What a client was told of one answer."""

    thoughts: str = ""
    text: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    ending: str | None = None
    detail: Any = None
    """Responses: the status of each item, and the response's reason. Messages: the stop sequence."""


def tell_chat(url: str, stream: bool, choice: str, **wishes: Any) -> list[Told]:
    """Of every choice."""
    names = {"limit": "max_tokens", "thinking": "chat_template_kwargs"}
    body = {names.get(name, name): wish for name, wish in wishes.items()}
    if choice == "named":
        body["tool_choice"] = {"type": "function", "function": {"name": NAME}}
    elif body.get("tools"):
        body["tool_choice"] = choice
    made = openai_client(url).chat.completions.create(model="tiny", messages=USER, stream=stream, extra_body=body)
    told = [Told() for _ in range(wishes.get("n", 1))]
    for chunk in made if stream else [made]:
        for part in chunk.choices:
            said, one = (part.delta if stream else part.message), told[part.index]
            one.thoughts += getattr(said, "reasoning", None) or ""
            one.text += said.content or ""
            for number, call in enumerate(said.tool_calls or []):
                index = call.index if stream else number
                if index == len(one.names):
                    one.names.append(call.function.name)
                    one.arguments.append("")
                one.arguments[index] += call.function.arguments or ""
            if part.finish_reason is not None:
                assert one.ending is None, "told twice how it ended"
                one.ending = part.finish_reason
    return told


def tell_responses(url: str, stream: bool, choice: str, **wishes: Any) -> list[Told]:
    names = {"limit": "max_output_tokens", "thinking": "chat_template_kwargs"}
    body = {names.get(name, name): wish for name, wish in wishes.items()}
    if "tools" in body:
        body["tools"] = [{"type": "function", **tool["function"]} for tool in body["tools"]]
        body["tool_choice"] = {"type": "function", "name": NAME} if choice == "named" else choice
    made = openai_client(url).responses.create(model="tiny", input=USER, stream=stream, extra_body=body)
    if stream:
        events = list(made)
        items = [event.item for event in events if event.type == "response.output_item.done"]
        assert events[-1].type in ("response.completed", "response.incomplete")
        assert [event.sequence_number for event in events] == list(range(len(events)))
        response = events[-1].response
        assert events[-1].type == f"response.{response.status}"
        final = [(item.type, item.status) for item in response.output if item.type != "reasoning"]
        assert final == [(item.type, item.status) for item in items if item.type != "reasoning"]
    else:
        response = made
        items = response.output
    told = Told(ending=response.status)
    for item in items:
        if item.type == "message":
            told.text += "".join(part.text for part in item.content)
        elif item.type == "reasoning":
            told.thoughts += "".join(part.text for part in item.content)
        else:
            told.names.append(item.name)
            told.arguments.append(item.arguments)
    reason = response.incomplete_details and response.incomplete_details.reason
    told.detail = ([item.status for item in items if item.type != "reasoning"], reason)
    return [told]


def tell_messages(url: str, stream: bool, choice: str, **wishes: Any) -> list[Told]:
    names = {"limit": "max_tokens", "thinking": "chat_template_kwargs", "stop": "stop_sequences"}
    body = {"max_tokens": 4000} | {names.get(name, name): wish for name, wish in wishes.items()}
    if "tools" in body:
        body["tools"] = [
            {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in body["tools"]
        ]
        kinds = {"auto": {"type": "auto"}, "required": {"type": "any"}, "none": {"type": "none"}}
        body["tool_choice"] = kinds.get(choice, {"type": "tool", "name": NAME})
    limit = body.pop("max_tokens")
    made = anthropic_client(url).messages.create(
        model="tiny", messages=USER, max_tokens=limit, stream=stream, extra_body=body
    )
    told = Told()
    if not stream:
        told.ending, told.detail = made.stop_reason, made.stop_sequence
        for block in made.content:
            told.thoughts += getattr(block, "thinking", "")
            told.text += getattr(block, "text", "")
            if block.type == "tool_use":
                told.names.append(block.name)
                told.arguments.append(json.dumps(block.input))
        return [told]
    for event in made:
        if event.type == "content_block_start" and event.content_block.type == "tool_use":
            told.names.append(event.content_block.name)
            told.arguments.append("")
        elif event.type == "content_block_delta":
            told.thoughts += getattr(event.delta, "thinking", "")
            told.text += getattr(event.delta, "text", "")
            if event.delta.type == "input_json_delta":
                told.arguments[-1] += event.delta.partial_json
        elif event.type == "message_delta":
            told.ending, told.detail = event.delta.stop_reason, event.delta.stop_sequence
    return [told]


Tell = Callable[..., list[Told]]
TELL: dict[str, Tell] = {"chat": tell_chat, "responses": tell_responses, "messages": tell_messages}
