"""Chat Completions: what DeepSeek's and OpenAI's clients send, and custom tools in the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dsv32_plugin.core.chat import render
from dsv32_plugin.parsers import EncodingError
from dsv32_plugin.parsers.messages import Turn, read_turns

from . import context
from .conversation import Conversation
from .exchange import Answer, Exchange, InputText, JsonObject, Server, input_of
from .fields import CHAT, flag, listed, refuse_foreign
from .refusal import Refusal
from .thinking import requested, template_kwargs
from .tools import Tools, allowed_tools, read_chat_tools, warn_once


def read(body: JsonObject, server: Server) -> Exchange:
    """Read a request of Chat Completions, or one like it that asks for its prompt.

    Raises:
        Refusal: it has no faithful rendering.
    """
    refuse_foreign(body, CHAT)
    messages = body.get("messages")
    try:
        turns = read_turns(messages)  # type: ignore[arg-type]  # it refuses what is no list
    except EncodingError as error:
        raise Refusal(str(error), param="messages") from error
    if not turns:
        raise Refusal("messages: expected at least one", param="messages")
    if body.get("web_search_options") is not None:
        warn_once("chat completions: web_search_options are for the provider's server; here they are left out")
    tools = read_chat_tools(body.get("tools"))
    _choose(body.get("tool_choice"), tools)
    continues = bool(flag(body, "continue_final_message")) or turns[-1].prefix
    conversation = Conversation(
        messages=list(messages),  # type: ignore[arg-type]
        labels=[f"messages[{i}]" for i in range(len(turns))],
        tools=tools.shown(server.hides_unused_tools),
        thinking=requested(body, body.get("reasoning_effort"), server.default_thinking, name="reasoning_effort"),
        continues=continues,
        add_generation_prompt=flag(body, "add_generation_prompt") is not False,
        plan=context.settle(
            [context.read_template_kwargs(template_kwargs(body))],
            server.plan,
            server.context_tokens,
            body.get("max_completion_tokens") or body.get("max_tokens"),
        ),
    )
    changed = {key: value for key, value in body.items() if key not in ("thinking", "reasoning_effort")}
    changed["messages"] = [_plain(turn, i) for i, turn in enumerate(turns)]
    if continues:
        changed["continue_final_message"] = True
        changed.setdefault("add_generation_prompt", False)
    if not server.ends_prompts:
        changed.pop("add_generation_prompt", None)
    changed["chat_template_kwargs"] = engine_kwargs(body, conversation)
    _set_tools(changed, body, tools)
    changes = tools.needs_translation or conversation.plan is not None
    return Exchange(changed, conversation, ChatAnswer(tools, conversation) if changes else Answer())


def read_batch(body: JsonObject, server: Server) -> Exchange:
    """Read a request of vLLM's for an answer to each of several conversations.

    Raises:
        Refusal: one of them has no faithful rendering, or has what the engine's batches have not.
    """
    batch = listed(body.get("messages"), "messages")
    if not batch:
        raise Refusal("messages: expected a list of conversations, got none", param="messages")
    if flag(body, "stream"):
        raise Refusal("stream: expected false in a batch; send each conversation by itself", param="stream")
    for name in ("tools", "context"):
        if body.get(name) or template_kwargs(body).get(name):
            raise Refusal(f"{name}: expected none in a batch; send each conversation by itself", param=name)
    exchanges = [_read_of_batch(body, messages, f"messages[{i}]", server) for i, messages in enumerate(batch)]
    first = exchanges[0]
    if any(exchange.conversation.continues != first.conversation.continues for exchange in exchanges):
        raise Refusal("messages: expected a batch in which all answers go on, or none", param="messages")
    if first.conversation.continues and first.conversation.thinking:
        # The engine is told once for all where the reasoning is over.
        raise Refusal("messages: answers that go on can't think in a batch; send each by itself", param="messages")
    changed = {**first.body, "messages": [exchange.body["messages"] for exchange in exchanges]}
    return Exchange(changed, first.conversation, is_batch=True)


def _read_of_batch(body: JsonObject, messages: Any, label: str, server: Server) -> Exchange:
    """Rendered here, too: what the engine's encoder hook says of it names no conversation."""
    try:
        exchange = read({**body, "messages": messages}, server)
        render(messages, exchange.conversation.options, server.variant)
    except (Refusal, EncodingError) as error:
        raise Refusal(f"{label}: {error}", param=getattr(error, "param", "messages")) from error
    return exchange


def engine_kwargs(body: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
    """`chat_template_kwargs` for the engine: one word on thinking, by which it reads the answer."""
    kwargs = template_kwargs(body)
    for name in ("enable_thinking", "reasoning_effort", "context"):
        kwargs.pop(name, None)
    return {**kwargs, "thinking": conversation.answer_thinks}


def _choose(choice: Any, tools: Tools) -> None:
    if choice is None or choice in ("auto", "none", "required"):
        tools.choose(choice or "auto")
        return
    kind = choice.get("type", "function") if isinstance(choice, Mapping) else None
    if kind in ("function", "custom"):
        tools.choose("required", [_named(choice, kind)])
    elif kind == "allowed_tools":
        allowed = choice.get("allowed_tools")
        where = "tool_choice.allowed_tools" if isinstance(allowed, Mapping) else "tool_choice"
        allowed = allowed if isinstance(allowed, Mapping) else choice
        names = [_named(tool, tool.get("type", "function")) for tool in allowed_tools(allowed, where)]
        tools.choose(allowed.get("mode", "auto"), [name for name in names if not tools.leaves_out(name)])
    elif kind is not None:
        raise tools.refusal(kind)
    else:
        raise Refusal(f"tool_choice: expected auto, none, required or a tool, got {choice!r}", param="tool_choice")


def _named(choice: Mapping[str, Any], kind: str) -> Any:
    inner = choice.get(kind, choice) if isinstance(kind, str) else choice
    return inner.get("name", kind) if isinstance(inner, Mapping) else kind


def _set_tools(changed: JsonObject, body: Mapping[str, Any], tools: Tools) -> None:
    if not tools.by_name:
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            changed.pop(name, None)
        return
    named = tools.allowed if tools.forced == "required" and len(tools.allowed or ()) == 1 else None
    shown = tools.functions if named else tools.callable
    changed["tools"] = [{"type": "function", "function": function} for function in shown]
    if named:
        changed["tool_choice"] = {"type": "function", "function": {"name": named[0]}}
    elif body.get("tool_choice") is not None:
        changed["tool_choice"] = tools.forced


def _plain(turn: Turn, index: int) -> JsonObject:
    """A message in the form that every engine's classes accept."""
    message: JsonObject = {"role": turn.role, "content": turn.text}
    if turn.reasoning:
        message["reasoning_content"] = message["reasoning"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{index}_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for number, call in enumerate(turn.calls)
        ]
    if turn.role == "tool":
        message["tool_call_id"] = turn.call_id or ""
    return message


class ChatAnswer(Answer):
    """Calls of custom tools in a custom tool's form, and what was done with the conversation."""

    changes = True

    def __init__(self, tools: Tools, conversation: Conversation) -> None:
        self._conversation = conversation
        self._custom = {name for name, tool in tools.by_name.items() if tool.kind == "custom"}
        self._streams: dict[tuple[int, int], InputText] = {}

    def whole(self, answer: JsonObject) -> JsonObject:
        for choice in answer.get("choices") or []:
            message = choice.get("message") or {}
            if message.get("tool_calls"):
                message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return self._with_report(answer)

    def event(self, event: JsonObject) -> list[JsonObject]:
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            if delta.get("tool_calls"):
                pieces = [self._piece(choice.get("index", 0), call) for call in delta["tool_calls"]]
                delta["tool_calls"] = [piece for piece in pieces if piece is not None]
        return [self._with_report(event)]

    def _with_report(self, answer: JsonObject) -> JsonObject:
        outcome = self._conversation.outcome
        if outcome is not None and isinstance(answer.get("usage"), dict):
            answer["usage"]["context_management"] = outcome.report
        return answer

    def _call(self, call: JsonObject) -> JsonObject:
        called = call.get("function") or {}
        if called.get("name") not in self._custom:
            return call
        custom = {"name": called["name"], "input": input_of(called.get("arguments") or "")}
        return {"id": call.get("id"), "type": "custom", "custom": custom}

    def _piece(self, choice: int, call: JsonObject) -> JsonObject | None:
        called = call.get("function") or {}
        key = (choice, call.get("index", 0))
        name = called.get("name")
        if name in self._custom:
            self._streams[key] = InputText()
        if key not in self._streams:
            return call
        text = self._streams[key].feed(called.get("arguments") or "")
        if name in self._custom:
            custom = {"name": name, "input": text}
            return {"index": key[1], "id": call.get("id"), "type": "custom", "custom": custom}
        return {"index": key[1], "type": "custom", "custom": {"input": text}} if text else None
