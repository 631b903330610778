"""The items of the Responses API to messages: calls and their outputs are items of their own, in any order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dsv32_plugin.core.chat import is_complete
from dsv32_plugin.parsers.parts import PartError, read_content, read_reasoning, well_formed

from .exchange import JsonObject
from .refusal import Refusal
from .tools import NAMESPACE_SEPARATOR

_BOOKKEEPING = {"id", "type", "status", "call_id", "created_by", "caller", "execution", "async", "environment"}
"""Fields of an item that are no part of what was called, or came back."""
_OUTPUT = "_output"
_CALL = "_call"


class ItemReader:
    """Reads items in order; `messages` and `labels` are complete after `finish`.

    An assistant's turn is all of its reasoning, text and calls up to the first output, or to another's message. Its
    outputs follow it at once, wherever they are.
    """

    def __init__(self) -> None:
        self.messages: list[Mapping[str, Any]] = []
        self.labels: list[str] = []
        self._outputs: dict[str, tuple[str, str]] = {}
        self._called: set[str] = set()
        self._turn: JsonObject = {}
        self._turn_label = ""
        self._results: list[tuple[str, str, str]] = []

    def read(self, items: Iterable[tuple[str, Any]]) -> None:
        """Read `(label, item)` pairs.

        Raises:
            Refusal: names the item's label and type.
        """
        checked = [(label, _checked(item, label)) for label, item in items]
        for label, item in checked:
            if _is_output(item):
                self._keep_output(item, label)
        for label, item in checked:
            self._read(item, label)
        self._end_turn()
        for label, item in checked:
            if _is_output(item) and _id(item) not in self._called:
                raise Refusal(f"{label}: a {item['type']} without its call: no call has the call_id {_id(item)!r}")

    def _read(self, item: JsonObject, label: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._read_message(item, label)
        elif kind == "reasoning":
            if reasoning := _reasoning(item, label):
                self._open_turn(label)
                self._turn["reasoning_content"] = self._turn.get("reasoning_content", "") + reasoning
        elif _is_output(item):
            if any(call["id"] == _id(item) for call in self._turn.get("tool_calls", ())):
                self._end_turn()
        else:
            self._read_call(item, label)

    def _read_message(self, item: JsonObject, label: str) -> None:
        role, content = item.get("role"), item.get("content")
        if role != "assistant":
            self._end_turn()
            self._add(label, role=role, content=content)
            return
        try:
            text, thoughts = read_content(content, role)
        except PartError as error:
            raise Refusal(f"{label}: {error}", param="input") from error
        if "content" in self._turn and "tool_calls" not in self._turn:
            self._end_turn()
        self._open_turn(label)
        if thoughts:
            self._turn["reasoning_content"] = self._turn.get("reasoning_content", "") + thoughts
        self._turn["content"] = self._turn.get("content", "") + (text or "")

    def _read_call(self, item: JsonObject, label: str) -> None:
        kind = item["type"]
        call_id = _id(item)
        called = _called(item, label)
        inline = _inline_output(item)
        if called is None or (inline is None and not (kind in _KNOWN_CALLS or self._has_output(item))):
            raise Refusal(
                f"{label}: an item of type {kind!r} can't be rendered: expected a message, reasoning, or a call and "
                "its output; leave it out",
                param="input",
            )
        if call_id is None or call_id in self._called:
            problem = "no call_id" if call_id is None else f"the call_id {call_id!r} of another call"
            raise Refusal(f"{label}: expected a {kind} with a call_id of its own, got {problem}", param="input")
        self._open_turn(label)
        name, arguments = called
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn.setdefault("tool_calls", []).append(call)
        self._called.add(call_id)
        self._called.update(other for other in (item.get("id"),) if isinstance(other, str) and other in self._outputs)
        if inline is not None:
            self._results.append((label, call_id, inline))
        elif (output := self._output_of(item)) is not None:
            self._results.append((output[0], call_id, output[1]))

    def _keep_output(self, item: JsonObject, label: str) -> None:
        call_id = _id(item)
        if call_id is None:
            raise Refusal(f"{label}: expected a {item['type']} with a call_id, got none", param="input")
        if call_id in self._outputs:
            raise Refusal(f"{label}: a second output for the call {call_id!r}", param="input")
        self._outputs[call_id] = (label, _output_text(item, label))

    def _has_output(self, item: JsonObject) -> bool:
        return self._output_of(item) is not None

    def _output_of(self, item: JsonObject) -> tuple[str, str] | None:
        """OpenAI's local_shell_call_output names the call by its id."""
        return next((self._outputs[id] for id in (_id(item), item.get("id")) if id in self._outputs), None)

    def _open_turn(self, label: str) -> None:
        if not self._turn:
            self._turn_label = label

    def _end_turn(self) -> None:
        if not self._turn:
            return
        turn, results = self._turn, self._results
        self._turn, self._results = {}, []
        calls = turn.get("tool_calls", ())
        answered = {call_id for _, call_id, _ in results}
        lacking = [call for call in calls if call["id"] not in answered and not _is_unfinished(call)]
        if results and lacking:
            raise Refusal(f"{self._turn_label}: no output has the call_id {lacking[0]['id']!r}", param="input")
        self._add(self._turn_label, role="assistant", **turn)
        for label, call_id, text in results:
            self._add(label, role="tool", tool_call_id=call_id, content=text)

    def _add(self, label: str, **message: Any) -> None:
        self.messages.append(message)
        self.labels.append(label)


def _checked(item: Any, label: str) -> JsonObject:
    if not isinstance(item, Mapping):
        raise Refusal(f"{label}: expected an item, got {type(item).__name__}", param="input")
    kind = item.get("type")
    if kind is not None and not isinstance(kind, str):
        raise Refusal(f"{label}.type: expected text, got {type(kind).__name__}", param="input")
    if kind is None and "role" not in item:
        raise Refusal(f"{label}: expected an item with a type or a role, got {', '.join(item) or 'nothing'}")
    return {**well_formed(item), "type": kind or "message"}


def _is_output(item: JsonObject) -> bool:
    return str(item["type"]).endswith(_OUTPUT)


def _id(item: JsonObject) -> str | None:
    """`call_id`, or the item's own id where it has none."""
    return next((value for value in (item.get("call_id"), item.get("id")) if isinstance(value, str) and value), None)


def _is_unfinished(call: JsonObject) -> bool:
    """The model was stopped in the call: nobody can run it."""
    arguments = call["function"]["arguments"]
    return isinstance(arguments, str) and bool(arguments) and not is_complete(arguments)


def _reasoning(item: JsonObject, label: str) -> str:
    """The text of a reasoning item; what only another server can read is none."""
    try:
        return read_reasoning(item.get("content")) or read_reasoning(item.get("summary"))
    except PartError as error:
        raise Refusal(f"{label}: its reasoning {error}", param="input") from error


_KNOWN_CALLS = {"function_call", "custom_tool_call", "local_shell_call", "shell_call", "apply_patch_call"}


def _called(item: JsonObject, label: str) -> tuple[str, Any] | None:
    """The function that an item calls, and its arguments; None where it calls none."""
    kind = str(item["type"])
    name = item.get("name")
    if kind in ("function_call", "custom_tool_call"):
        if not isinstance(name, str) or not name:
            raise Refusal(f"{label}.name: expected the name of a tool, got {name!r}", param="input")
        namespace = item.get("namespace")
        if namespace is not None and not isinstance(namespace, str):
            raise Refusal(f"{label}.namespace: expected text, got {type(namespace).__name__}", param="input")
        full = f"{namespace}{NAMESPACE_SEPARATOR}{name}" if namespace else name
        if kind == "function_call":
            return full, item.get("arguments")
        text = item.get("input")
        if text is not None and not isinstance(text, str):
            raise Refusal(f"{label}.input: expected text, got {type(text).__name__}", param="input")
        return full, {"input": text or ""}
    if kind == "mcp_call":
        return f"{item.get('server_label')}{NAMESPACE_SEPARATOR}{name}", item.get("arguments")
    if kind == "apply_patch_call":
        return "apply_patch", _without_null(item.get("operation"))
    for field in ("arguments", "action"):
        if isinstance(item.get(field), (Mapping, str)):
            fields = item[field]
            break
    else:
        fields = {key: value for key, value in item.items() if key not in _BOOKKEEPING | {"outputs", "results"}}
    if isinstance(fields, Mapping):
        fields = {key: value for key, value in _without_null(fields).items() if not (key == "type" and value == "exec")}
    return kind.removesuffix(_CALL), fields


def _inline_output(item: JsonObject) -> str | None:
    """The output that an item of a provider's tool brings along."""
    if item["type"] == "mcp_call":
        result = next((item[key] for key in ("output", "error") if item.get(key) is not None), None)
    else:
        result = next((item[key] for key in ("outputs", "results") if isinstance(item.get(key), list)), None)
    return None if result is None else _as_text(result)


def _output_text(item: JsonObject, label: str) -> str:
    output = next((item[key] for key in ("output", "result") if item.get(key) is not None), None)
    if output is None:
        rest = {key: value for key, value in item.items() if key not in _BOOKKEEPING and value is not None}
        return _as_text(rest) if rest else str(item.get("status") or "")
    if isinstance(output, Mapping) and "type" in output:
        output = [output]
    if isinstance(output, list) and all(map(_is_part, output)):
        try:
            return read_content(output, "tool")[0] or ""
        except PartError as error:
            raise Refusal(f"{label}: {error}", param="input") from error
    return _as_text(output)


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and "type" in value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _without_null(fields: Any) -> JsonObject:
    return {key: value for key, value in fields.items() if value is not None} if isinstance(fields, Mapping) else {}
