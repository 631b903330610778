"""Messages: what Anthropic's clients send, and errors in Anthropic's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv32_plugin.parsers.parts import PartError, describe, nested_text, read_content, well_formed

from . import context
from .chat import engine_kwargs
from .conversation import UNSEEN, Conversation
from .exchange import Answer, Exchange, JsonObject, Server
from .fields import MESSAGES, refuse_foreign
from .refusal import Refusal
from .thinking import requested, template_kwargs
from .tools import Tools, read_messages_tools, warn_once

_SWITCHES = ("enabled", "disabled", "adaptive")
_NOT_THE_ENGINES = (
    *("thinking", "system", "tools", "tool_choice", "context_management", "mcp_servers", "container"),
    *("output_config", "output_format"),
)
_NO_PARAMETERS = {"type": "object", "properties": {}}
_BILLING = "x-anthropic-billing-header"
"""How a system block of Claude Code begins that is none of the prompt: it differs in every request."""
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def read(body: JsonObject, server: Server) -> Exchange:
    """Read a request of Messages, or of its token count.

    Raises:
        Refusal: it has no faithful rendering.
    """
    if body.get("thread") is not None:
        # Its SDK reads the code, and goes on with whole conversations.
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise Refusal("thread: expected none, send the whole conversation; none is kept here", details=details)
    refuse_foreign(body, MESSAGES)
    for name in ("mcp_servers", "container"):
        if body.get(name):
            warn_once(f"messages: {name} is for what the provider's server runs; here it is left out")
    tools = read_messages_tools(body.get("tools"))
    _choose(body.get("tool_choice"), tools)
    reader = _Reader()
    reader.read_system(body.get("system"))
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        got = "an empty one" if messages == [] else type(messages).__name__
        raise Refusal(f"messages: expected a list of at least one, got {got}", param="messages")
    for index, message in enumerate(well_formed(messages)):
        reader.read(message, f"messages[{index}]")
    conversation = Conversation(
        messages=reader.messages,
        labels=reader.labels,
        tools=tools.shown(server.hides_unused_tools),
        thinking=requested(body, None, server.default_thinking, _SWITCHES),
        answer_format=_answer_format(body),
        continues=bool(reader.messages) and reader.messages[-1]["role"] == "assistant",
        plan=context.settle(
            [context.read_messages(body), context.read_template_kwargs(template_kwargs(body))],
            server.plan,
            server.context_tokens,
            body.get("max_tokens"),
        ),
    )
    kept = {key: value for key, value in body.items() if key not in _NOT_THE_ENGINES}
    changed: JsonObject = {
        **kept,
        "messages": [{"role": "user", "content": UNSEEN}],
        "chat_template_kwargs": engine_kwargs(body, conversation),
    }
    if conversation.answer_format is not None:
        # Without "effort", by which the engines would switch thinking on.
        changed["output_config"] = {"format": conversation.answer_format}
    if tools.by_name:
        changed["tools"] = [_engine_tool(function) for function in tools.functions]
        changed["tool_choice"] = _engine_choice(tools)
    return Exchange(changed, conversation, Answer() if conversation.plan is None else MessagesAnswer(conversation))


class MessagesAnswer(Answer):
    """An answer, or a count, that says what was done with the conversation."""

    changes = True

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def whole(self, answer: JsonObject) -> JsonObject:
        outcome = self._conversation.outcome
        if outcome is not None and answer.get("type") == "message":
            answer["context_management"] = {"applied_edits": outcome.anthropic_edits}
        elif outcome is not None and "input_tokens" in answer:
            answer["context_management"] = {"original_input_tokens": outcome.managed.original_tokens}
        return answer

    def event(self, event: JsonObject) -> list[JsonObject]:
        outcome = self._conversation.outcome
        if outcome is not None and event.get("type") == "message_delta":
            event["context_management"] = {"applied_edits": outcome.anthropic_edits}
        return [event]


def error(status: int, message: str, details: Mapping[str, Any] | None = None) -> JsonObject:
    """An error as Anthropic's API has it."""
    kind = ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    more = {} if details is None else {"details": dict(details)}
    return {"type": "error", "error": {"type": kind, "message": message, **more}}


def status_of(kind: str) -> int:
    """The HTTP status of an error of this type."""
    return next((status for status, known in ERROR_TYPES.items() if known == kind), 500)


def _answer_format(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`output_config.format`, or `output_format` as its name was in the beta."""
    config, old = body.get("output_config"), body.get("output_format")
    if config is not None and not isinstance(config, Mapping):
        raise Refusal(f"output_config: expected an object, got {type(config).__name__}", param="output_config")
    name, given = ("output_format", old) if old is not None else ("output_config.format", (config or {}).get("format"))
    if given is None:
        return None
    if not (
        isinstance(given, Mapping) and given.get("type") == "json_schema" and isinstance(given.get("schema"), Mapping)
    ):
        raise Refusal(f'{name}: expected {{"type": "json_schema", "schema": …}}, got {given!r}'[:300], param=name)
    return {"type": "json_schema", "schema": given["schema"]}


def _choose(choice: Any, tools: Tools) -> None:
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    if kind in (None, "auto", "none"):
        tools.choose(kind or "auto")
    elif kind == "any":
        tools.choose("required")
    elif kind == "tool":
        tools.choose("required", [choice.get("name")])
    else:
        raise Refusal(f"tool_choice: expected auto, any, none or a tool, got {choice!r}", param="tool_choice")


def _engine_tool(function: Mapping[str, Any]) -> JsonObject:
    tool = {key: function[key] for key in ("name", "description", "strict") if key in function}
    return {**tool, "input_schema": function.get("parameters", _NO_PARAMETERS)}


def _engine_choice(tools: Tools) -> JsonObject:
    if tools.forced != "required":
        return {"type": tools.forced}
    return {"type": "tool", "name": tools.allowed[0]} if tools.allowed else {"type": "any"}


class _Reader:
    """Blocks to messages. A user's results are messages of their own, and precede what else the user says."""

    def __init__(self) -> None:
        self.messages: list[Mapping[str, Any]] = []
        self.labels: list[str] = []

    def read_system(self, system: Any) -> None:
        if system:
            self._system(well_formed(system), "system")

    def read(self, message: Any, label: str) -> None:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("user", "assistant", "system"):
            raise Refusal(f"{label}: expected a message of role user, assistant or system, got {role!r}")
        content = message.get("content")
        if content is None:
            raise Refusal(f"{label}: expected content, got none")
        if role == "system":
            self._system(content, label)
        elif isinstance(content, str) and role == "user":
            self._add(label, role=role, content=content)
        elif isinstance(content, str):
            self._assistant([{"type": "text", "text": content}], label)
        elif not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
            raise Refusal(f"{label}.content: expected text or a list of blocks, got {type(content).__name__}")
        elif role == "user":
            self._user(content, label)
        else:
            self._assistant(content, label)

    def _system(self, content: Any, label: str) -> None:
        blocks = [content] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise Refusal(f"{label}: expected text or a list of blocks, got {type(content).__name__}")
        text = "".join(
            part for part in (self._text(block, f"{label}[{i}]") for i, block in enumerate(blocks)) if part is not None
        )
        if text:
            self._add(label, role="system", content=text)

    def _text(self, block: Any, label: str) -> str | None:
        text = _block(block, "system", label)
        return None if text.startswith(_BILLING) else text

    def _user(self, blocks: list[Mapping[str, Any]], label: str) -> None:
        said = []
        for index, block in enumerate(blocks):
            where = f"{label}.content[{index}]"
            if block.get("type") == "tool_result":
                self._result(block, where)
            else:
                said.append(_document(block, where) or _block(block, "user", where))
        if said or not blocks:
            self._add(label, role="user", content="".join(said))

    def _assistant(self, blocks: list[Mapping[str, Any]], label: str) -> None:
        """A tool that the provider ran has its result within the message; the model's turn goes on after it.

        Messages of the assistant in a row are one turn.
        """
        turn: JsonObject = {}
        if self.messages and self.messages[-1]["role"] == "assistant":
            turn = {**self.messages.pop()}
            label = self.labels.pop()
        before = len(self.messages)
        for index, block in enumerate(blocks):
            kind = str(block.get("type"))
            where = f"{label}.content[{index}]"
            if kind == "thinking":
                thought = block.get("thinking")
                if thought is not None and not isinstance(thought, str):
                    raise Refusal(f"{where}.thinking: expected text, got {type(thought).__name__}", param="messages")
                turn["reasoning_content"] = turn.get("reasoning_content", "") + (thought or "")
            elif kind == "redacted_thinking":
                continue
            elif kind.endswith("tool_use"):
                call = {"name": block.get("name"), "arguments": block.get("input") or {}}
                turn.setdefault("tool_calls", []).append({"id": block.get("id"), "function": call})
            elif kind.endswith("tool_result"):
                self._add(label, **{"role": "assistant", **turn})
                turn = {}
                self._result(block, where)
            else:
                turn["content"] = turn.get("content", "") + _block(block, "assistant", where)
        if turn or len(self.messages) == before:
            self._add(label, **{"role": "assistant", "content": "", **turn})

    def _result(self, block: Mapping[str, Any], label: str) -> None:
        content = block.get("content")
        if isinstance(content, Mapping):
            content = [content]
        text = _read(content, "tool", label) or ("error" if block.get("is_error") else "")
        self._add(label, role="tool", tool_call_id=block.get("tool_use_id"), content=text)

    def _add(self, label: str, **message: Any) -> None:
        self.messages.append(message)
        self.labels.append(label)


def _document(block: Mapping[str, Any], label: str) -> str | None:
    """The text that a user's document holds; None where it holds none, or is none."""
    if block.get("type") not in ("document", "search_result"):
        return None
    try:
        return None if nested_text(block) is None else describe(block)
    except PartError as error:
        raise Refusal(f"{label}: {error}", param="messages") from error


def _block(block: Any, role: str, label: str) -> str:
    try:
        return read_content([block], role)[0] or ""
    except PartError as error:
        raise Refusal(f"{label}{str(error).removeprefix('content part 0')}", param="messages") from error


def _read(content: Any, role: str, label: str) -> str:
    try:
        return read_content(content, role)[0] or ""
    except PartError as error:
        raise Refusal(f"{label}: {error}", param="messages") from error
