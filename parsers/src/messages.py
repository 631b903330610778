"""Reading OpenAI-shaped messages: every accepted spelling becomes one `Turn`, everything else is refused by name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .parts import NestingError, PartError, read_content, read_reasoning, well_formed
from .unfinished import ended_parameters

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")


class EncodingError(ValueError):
    """The conversation has no faithful rendering.

    Attributes:
        reason: what is wrong and what to do about it.
        index: the index of the message at fault in `messages` (or in `context`), None where no message is at fault.
        where: "messages" or "context".
    """

    def __init__(self, reason: str, index: int | None = None, where: str = "messages"):
        super().__init__(reason if index is None else f"{where}[{index}]: {reason}")
        self.reason = reason
        self.index = index
        self.where = where


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call of an assistant turn, its arguments decoded; `unfinished` if the model was stopped in them."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, normalised. `index` and `where` say where it came from, for errors.

    Its texts are plain strings, never `Markup`: others wrote them.
    """

    role: Role
    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    prefix: bool = False
    index: int | None = field(default=None, compare=False)
    where: str = field(default="messages", compare=False)

    def error(self, reason: str) -> EncodingError:
        return EncodingError(reason, self.index, self.where)


def read_turns(messages: Sequence[Mapping[str, Any]], where: str = "messages") -> list[Turn]:
    """Normalise a list of messages; raises EncodingError naming the index of the first bad one."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise EncodingError(f"{where}: expected a list of messages, got {type(messages).__name__}")
    turns = []
    for index, message in enumerate(messages):
        try:
            turns.append(_read_turn(message, index, where))
        except EncodingError as error:
            raise EncodingError(error.reason, index, where) from error.__cause__
        except NestingError as error:
            raise EncodingError(str(error), index, where) from error
    return turns


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The `function` object of each tool; takes OpenAI's wrapped tools and bare function objects."""
    if tools is None:
        return ()
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise EncodingError(f"tools: expected a list, got {type(tools).__name__}")
    functions = []
    try:
        tools = well_formed(tools)
    except NestingError as error:
        raise EncodingError(f"tools: {error}") from error
    for position, tool in enumerate(tools):
        function = tool
        if isinstance(tool, Mapping) and "function" in tool:
            if tool.get("type", "function") != "function":
                raise EncodingError(f"tools[{position}]: type must be 'function', got {tool['type']!r}")
            function = tool["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise EncodingError(f"tools[{position}]: expected a function object with a name")
        functions.append(function)
    return tuple(functions)


def match_results(call_ids: Sequence[str | None], result_ids: Sequence[str | None]) -> list[int]:
    """The call of each result: the first free one with its id; the others fill the free calls in order."""
    by_id: dict[str | None, list[int]] = {}
    for slot in reversed(range(len(call_ids))):
        by_id.setdefault(call_ids[slot], []).append(slot)
    by_id.pop(None, None)
    slots = [matching.pop() if (matching := by_id.get(id)) else None for id in result_ids]
    free = iter(sorted(set(range(len(call_ids))) - set(slots)))
    return [next(free) if slot is None else slot for slot in slots]


def _read_turn(message: Any, index: int, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise EncodingError(f"expected a mapping with a role, got {type(message).__name__}")
    message = well_formed(message)
    role = message.get("role")
    if role is None and "type" in message:
        raise EncodingError(f"an item of type {message['type']!r} is no message; expected one with a role")
    if role not in ROLES:
        raise EncodingError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
    try:
        text, thoughts = read_content(message.get("content"), role)
        if role == "assistant" and not text and isinstance(message.get("refusal"), str):
            text = message["refusal"]
    except PartError as error:
        raise EncodingError(str(error)) from error
    if role == "user" and text is None:
        raise EncodingError("a user message needs content, got none")
    is_assistant = role == "assistant"
    if is_assistant and message.get("function_call"):
        raise EncodingError("function_call: expected none; a call is one of tool_calls, its result of the role tool")
    takes_tools = role in ("system", "developer")
    return Turn(
        role=role,
        text=str(text or ""),
        reasoning=str(_read_reasoning(message) or thoughts) if is_assistant else "",
        calls=_read_calls(message.get("tool_calls")) if is_assistant else (),
        call_id=_read_id(message.get("tool_call_id"), "tool_call_id") if role == "tool" else None,
        tools=read_tools(message.get("tools")) if takes_tools else (),
        response_format=message.get("response_format") if takes_tools else None,
        prefix=_read_prefix(message.get("prefix"), is_assistant),
        index=index,
        where=where,
    )


def _read_prefix(value: Any, is_assistant: bool) -> bool:
    if value is not None and not isinstance(value, bool):
        raise EncodingError(f"prefix: expected true or false, got {value!r}")
    if value and not is_assistant:
        raise EncodingError("prefix: expected an assistant's message, which the answer goes on")
    return bool(value)


def _read_reasoning(message: Mapping[str, Any]) -> str:
    for key in ("reasoning_content", "reasoning"):
        try:
            value = read_reasoning(message.get(key))
        except PartError as error:
            raise EncodingError(f"{key} {error}") from error
        if value:
            return value
    return ""


def _read_calls(tool_calls: Any) -> tuple[Call, ...]:
    if tool_calls is None:
        return ()
    if isinstance(tool_calls, (str, bytes, Mapping)) or not isinstance(tool_calls, Sequence):
        raise EncodingError(f"tool_calls must be a list, got {type(tool_calls).__name__}")
    return tuple(_read_call(call, position) for position, call in enumerate(tool_calls))


def _read_call(call: Any, position: int) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    custom = call.get("custom") if isinstance(call, Mapping) and call.get("type") == "custom" else None
    if isinstance(custom, Mapping):
        # A custom tool is a function of one string (`dsv32_plugin.apis.tools`).
        text = custom.get("input")
        if text is not None and not isinstance(text, str):
            raise EncodingError(f"tool_calls[{position}]: custom.input: expected text, got {type(text).__name__}")
        function = {"name": custom.get("name"), "arguments": {"input": text or ""}}
    if not isinstance(function, Mapping):
        raise EncodingError(f"tool_calls[{position}]: expected a mapping with a function")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise EncodingError(f"tool_calls[{position}]: the function needs a name")
    arguments = function.get("arguments")
    unfinished = False
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = well_formed(json.loads(arguments))
        except (ValueError, RecursionError) as error:
            unfinished = True
            arguments = _read_unfinished(arguments, f"tool_calls[{position}] ({name}): arguments are not JSON: {error}")
    elif arguments is None or arguments == "" or isinstance(arguments, str):
        arguments = {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise EncodingError(f"tool_calls[{position}] ({name}): arguments must be a JSON object, got {kind}")
    return Call(str(name), dict(arguments), _read_id(call.get("id"), f"tool_calls[{position}].id"), unfinished)


def _read_unfinished(arguments: str, reason: str) -> dict[str, Any]:
    """The arguments of a call that the model was stopped in: the parameters that ended, then the open one as text."""
    try:
        ended, open_parameter = ended_parameters(arguments)
    except ValueError as error:
        raise EncodingError(reason) from error
    if open_parameter is not None:
        name, text = open_parameter
        ended[name] = text
    return dict(well_formed(ended))


def _read_id(value: Any, name: str) -> str | None:
    """By which a result finds its call; a number is as good as its digits."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise EncodingError(f"{name}: expected text, got {type(value).__name__}")
