"""Responses: what OpenAI's clients send, conversations that go on by an id, and the tools of the answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import context
from .chat import engine_kwargs
from .conversation import UNSEEN, Conversation
from .exchange import Answer, Exchange, InputText, JsonObject, Server, arguments_of, input_of
from .fields import RESPONSES, refuse_foreign
from .items import ItemReader
from .refusal import Refusal
from .thinking import requested, template_kwargs
from .tools import ClientTool, Tools, allowed_tools, read_responses_tools

KEPT_RESPONSES = 4096
"""As many answers can be gone on from; the oldest are forgotten."""
_ECHOED = ("tool_choice", "reasoning", "previous_response_id", "instructions", "truncation")
_NO_PARAMETERS: JsonObject = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Kept:
    """An answered request, from which another may go on.

    Attributes:
        before: that from which it went on.
        items: what its client sent.
        output: the items of the answer.
        answer: how the answer was changed, for a client that asks for it again.
    """

    before: Kept | None
    items: tuple[Any, ...]
    output: tuple[Any, ...]
    answer: Answer

    def all_items(self) -> list[Any]:
        chain, kept = [], self
        while kept is not None:
            chain.append(kept)
            kept = kept.before  # type: ignore[assignment]
        return [item for kept in reversed(chain) for item in (*kept.items, *kept.output)]


class Store:
    """The answers of this process that the engine stored, too."""

    def __init__(self, size: int = KEPT_RESPONSES) -> None:
        self._size = size
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def get(self, response_id: Any) -> Kept | None:
        return self._kept.get(response_id) if isinstance(response_id, str) else None

    def put(self, response_id: str, kept: Kept) -> None:
        self._kept[response_id] = kept
        self._kept.move_to_end(response_id)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)


def read(body: JsonObject, server: Server, store: Store) -> Exchange:
    """Read a request of Responses.

    Raises:
        Refusal: it has no faithful rendering.
    """
    refuse_foreign(body, RESPONSES)
    tools = read_responses_tools(body.get("tools"))
    _choose(body.get("tool_choice"), tools)
    before = None
    if body.get("previous_response_id") is not None:
        before = store.get(body["previous_response_id"])
        if before is None:
            raise _not_found(body["previous_response_id"], server)
    items = _items(body.get("input"), before)
    reader = ItemReader()
    if body.get("instructions"):
        reader.messages.append({"role": "system", "content": body["instructions"]})
        reader.labels.append("instructions")
    earlier = before.all_items() if before else []
    reader.read(
        [
            *((f"previous_response_id: item {i}", item) for i, item in enumerate(earlier)),
            *((f"input[{i}]", item) for i, item in enumerate(items)),
        ]
    )
    conversation = Conversation(
        messages=reader.messages,
        labels=reader.labels,
        tools=tools.shown(server.hides_unused_tools),
        thinking=requested(body, _effort(body.get("reasoning")), server.default_thinking, name="reasoning.effort"),
        continues=_continues(items),
        plan=context.settle(
            [context.read_responses(body), context.read_template_kwargs(template_kwargs(body))],
            server.plan,
            server.context_tokens,
            body.get("max_output_tokens"),
        ),
    )
    stores = server.stores and body.get("store") is not False
    answer = ResponsesAnswer(body, tools, before, items, conversation, store if stores else None)
    return Exchange(_engine_body(body, conversation, tools), conversation, answer)


def _items(given: Any, before: Kept | None) -> list[Any]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given and before is None:
        raise Refusal("input: expected text or a list of items, got none", param="input")
    if given is None:
        return []
    if not isinstance(given, list):
        raise Refusal(f"input: expected text or a list of items, got {type(given).__name__}", param="input")
    return given


def _effort(reasoning: Any) -> Any:
    if reasoning is None:
        return None
    if not isinstance(reasoning, Mapping):
        raise Refusal(f"reasoning: expected an object, got {type(reasoning).__name__}", param="reasoning")
    return reasoning.get("effort")


def _continues(items: list[Any]) -> bool:
    """A final message or reasoning that isn't complete goes on."""
    last = items[-1] if items and isinstance(items[-1], Mapping) else {}
    is_own = last.get("role") == "assistant" or last.get("type") == "reasoning"
    return is_own and last.get("status") in ("in_progress", "incomplete")


def _not_found(response_id: Any, server: Server) -> Refusal:
    why = "" if server.stores else "; this server stores none (vLLM does with VLLM_ENABLE_RESPONSES_API_STORE=1)"
    return Refusal(
        f"previous_response_id: there is no response {response_id!r}{why}; send the whole conversation as input",
        param="previous_response_id",
        status=404,
        code="previous_response_not_found",
    )


def _choose(choice: Any, tools: Tools) -> None:
    if choice is None or choice in ("auto", "none", "required"):
        tools.choose(choice or "auto")
    elif not isinstance(choice, Mapping):
        raise Refusal(f"tool_choice: expected auto, none, required or a tool, got {choice!r}", param="tool_choice")
    elif choice.get("type") == "allowed_tools":
        given = allowed_tools(choice, "tool_choice")
        names = [name for tool in given if (name := _named(tool, tools)) in tools.by_name]
        unknown = [tool for tool in given if not {_named(tool, tools), tool.get("type")} & _known(tools)]
        if unknown:
            raise tools.refusal(_named(unknown[0], tools))
        tools.choose(choice.get("mode", "auto"), names)
    else:
        tools.choose("required", [_named(choice, tools)])


def _known(tools: Tools) -> set[str]:
    return set(tools.by_name) | tools.left_out


def _named(choice: Mapping[str, Any], tools: Tools) -> Any:
    """The name in the prompt of a tool that is named by its name, its namespace and name, or its type alone."""
    name, namespace = choice.get("name"), choice.get("namespace")
    by_type = choice.get("server_label") or choice.get("type")
    if not isinstance(by_type if name is None else name, str):
        raise Refusal(f"tool_choice: expected a tool with a name or a type, got {dict(choice)!r}", param="tool_choice")
    if name is None:
        return by_type
    if name in tools.by_name and not namespace:
        return name
    named = (
        full for full, tool in tools.by_name.items() if tool.name == name and namespace in (None, "", tool.namespace)
    )
    return next(named, name)


def _engine_body(body: JsonObject, conversation: Conversation, tools: Tools) -> JsonObject:
    # By truncation an engine would cut the prompt's first tokens off, its beginning and its tools.
    dropped = ("tools", "tool_choice", "thinking", *_ECHOED[1:], "context_management")
    changed = {key: value for key, value in body.items() if key not in dropped}
    changed["input"] = UNSEEN
    changed["chat_template_kwargs"] = engine_kwargs(body, conversation)
    reasoning = body.get("reasoning")
    if isinstance(reasoning, Mapping) and reasoning.get("summary") is not None:
        changed["reasoning"] = {"summary": reasoning["summary"]}
    if isinstance(body.get("include"), list):
        # What a provider's search would add to the answer; the engines know no such value.
        changed["include"] = [what for what in body["include"] if not str(what).startswith("web_search_call.")]
    if tools.by_name:
        # Of a forced choice only what may be called: not every engine takes a name here.
        changed["tools"] = [
            {"type": "function", "strict": False, "parameters": _NO_PARAMETERS, **function}
            for function in tools.callable
        ]
        changed["tool_choice"] = tools.forced
    return changed


def _usage(usage: Any) -> Any:
    """The tokens of an answer as this API counts them.

    SGLang before 0.5.23 gives a whole answer the names of Chat; neither engine says what it wrote to its cache, which
    clients since openai 3 read.
    """
    if not isinstance(usage, Mapping):
        return usage
    if "prompt_tokens" in usage:
        details = usage.get("prompt_tokens_details") or {}
        usage = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": details.get("cached_tokens") or 0},
            "output_tokens": usage.get("completion_tokens") or 0,
            "output_tokens_details": {"reasoning_tokens": usage.get("reasoning_tokens") or 0},
            "total_tokens": usage["total_tokens"],
        }
    return {**usage, "input_tokens_details": {"cache_write_tokens": 0, **(usage.get("input_tokens_details") or {})}}


class ResponsesAnswer(Answer):
    """An answer whose tools are the client's, and that can be gone on from."""

    changes = True

    def __init__(
        self,
        body: JsonObject,
        tools: Tools,
        before: Kept | None,
        items: list[Any],
        conversation: Conversation,
        store: Store | None,
    ) -> None:
        self._echo = {"tool_choice": "auto"} | {key: body[key] for key in _ECHOED if body.get(key) is not None}
        self._tools = tools
        self._before = before
        self._items = tuple(items)
        self._conversation = conversation
        self._store = store
        self._inputs: dict[Any, InputText] = {}
        self._streamed: dict[Any, ClientTool] = {}
        self._sequence = 0

    def whole(self, answer: JsonObject) -> JsonObject:
        return self._response(answer) if answer.get("object") == "response" else answer

    def event(self, event: JsonObject) -> list[JsonObject]:
        events = self._events(event)
        for sent in events:
            if "sequence_number" in sent:
                sent["sequence_number"] = self._sequence
                self._sequence += 1
        return events

    def _response(self, response: JsonObject) -> JsonObject:
        response |= self._echo
        response["tools"] = self._tools.given
        response["usage"] = usage = _usage(response.get("usage"))
        if self._conversation.outcome is not None and usage is not None:
            usage["context_management"] = self._conversation.outcome.report
        response["output"] = [self._item(item) for item in response.get("output") or []]
        if self._store is not None and isinstance(response.get("id"), str):
            self._store.put(response["id"], Kept(self._before, self._items, tuple(response["output"]), self))
        return response

    def _events(self, event: JsonObject) -> list[JsonObject]:
        kind = event.get("type", "")
        if isinstance(event.get("response"), dict):
            event["response"] = self._response(event["response"])
        elif kind == "response.output_item.added":
            return [self._added(event)]
        elif kind == "response.output_item.done":
            event["item"] = self._item(event["item"])
        elif kind.startswith("response.function_call_arguments."):
            return self._arguments(event, kind.rpartition(".")[2])
        return [event]

    def _added(self, event: JsonObject) -> JsonObject:
        item = event["item"]
        tool = self._tool(item)
        if tool is not None:
            self._streamed[event.get("output_index")] = tool
            event["item"] = self._item(item)
            if tool.kind == "custom":
                self._inputs[event.get("output_index")] = InputText()
                event["item"]["input"] = ""
        return event

    def _arguments(self, event: JsonObject, what: str) -> list[JsonObject]:
        """The arguments of a call: a custom tool's are its text, those of a tool that has a type come when whole."""
        tool = self._streamed.get(event.get("output_index"))
        if tool is None or tool.kind == "function":
            if tool is not None and "name" in event:
                event["name"] = tool.name
            return [event]
        if tool.kind != "custom":
            return []
        text = self._inputs[event["output_index"]]
        fields: JsonObject = {key: event[key] for key in ("item_id", "output_index", "sequence_number") if key in event}
        delta = text.feed(event["delta"]) if what == "delta" else text.finish(event.get("arguments") or "")
        kind = "response.custom_tool_call_input"
        events: list[JsonObject] = [{"type": f"{kind}.delta", **fields, "delta": delta}] if delta else []
        if what == "done":
            events.append({"type": f"{kind}.done", **fields, "input": input_of(event.get("arguments") or "")})
        return events

    def _tool(self, item: JsonObject) -> ClientTool | None:
        return self._tools.by_name.get(str(item.get("name"))) if item.get("type") == "function_call" else None

    def _item(self, item: JsonObject) -> JsonObject:
        tool = self._tool(item)
        if tool is None:
            return item
        arguments = item.get("arguments") or ""
        if tool.kind == "function":
            return {**item, "name": tool.name, **({"namespace": tool.namespace} if tool.namespace else {})}
        kind = "custom_tool_call" if tool.kind == "custom" else f"{tool.kind}_call"
        made: JsonObject = {"type": kind, "id": item.get("id"), "call_id": item.get("call_id")}
        made["status"] = item.get("status") or "completed"
        if tool.kind == "custom":
            made |= {"name": tool.name, "input": input_of(arguments)}
            return {**made, "namespace": tool.namespace} if tool.namespace else made
        read = dict(arguments_of(arguments))
        if tool.kind == "local_shell":
            made["action"] = {"type": "exec", "env": {}, "command": [], **read}
        elif tool.kind == "shell":
            made["action"] = {"commands": [], "timeout_ms": None, "max_output_length": None, **read}
        else:
            made["operation"] = read
        return made
