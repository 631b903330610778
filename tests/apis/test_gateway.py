"""The gateway in front of an application that stands for an engine's."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsv32_plugin import apis
from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.apis.gateway import Gateway

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "custom", "name": "patch"}
FUNCTION = {"type": "function", "function": {"name": "f"}}


class Engine:
    """An application that keeps what it is asked, and answers with a status, headers and the pieces of a body."""

    def __init__(self, body: Any = None, status: int = 200, kind: str = "application/json", refuses: str = "") -> None:
        self.pieces = body if isinstance(body, list) else [json.dumps(body if body is not None else {}).encode()]
        self.status, self.kind, self.refuses = status, kind, refuses
        self.asked: Any = None
        self.length: int | None = None
        self.conversation: apis.Conversation | None = None
        self.then: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.asked = message["body"]
        self.length = int(dict(scope["headers"]).get(b"content-length", -1))
        self.conversation = apis.current()
        if self.refuses:
            assert self.conversation is not None
            self.conversation.refuse(ValueError(self.refuses))
        headers = [(b"content-type", self.kind.encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for i, piece in enumerate(self.pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": i < len(self.pieces) - 1})
        self.then = (await receive())["type"]


def ask(
    engine: Callable[..., Any],
    path: str,
    body: Any,
    *,
    server: Server | None = Server(),  # noqa: B008
    method: str = "POST",
    gateway: Gateway | None = None,
    kind: str = "application/json",
) -> tuple[int, Any]:
    """The status and the body that the client gets; JSON where it is."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[Any] = []
    unsent = [{"type": "http.request", "body": raw[:7], "more_body": True}, {"type": "http.request", "body": raw[7:]}]

    async def receive() -> Any:
        return unsent.pop(0) if unsent else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(raw))]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run((gateway or Gateway(engine, lambda: server))(scope, receive, send))
    start, *bodies = sent
    content = b"".join(message.get("body", b"") for message in bodies)
    lengths = [int(value) for name, value in start["headers"] if name == b"content-length"]
    assert not lengths or lengths == [len(content)]
    try:
        return start["status"], json.loads(content)
    except ValueError:
        return start["status"], content


def test_the_engine_gets_a_plain_request_and_its_hook_the_conversation() -> None:
    engine = Engine({"object": "chat.completion", "choices": []})
    body = {"messages": [USER], "tools": [{"type": "web_search"}], "thinking": {"type": "enabled"}, "seed": 5}
    assert ask(engine, "/v1/chat/completions", body) == (200, {"object": "chat.completion", "choices": []})
    asked = json.loads(engine.asked)
    assert asked == {"messages": [USER], "seed": 5, "chat_template_kwargs": {"thinking": True}}
    assert engine.length == len(engine.asked)
    assert engine.conversation is not None
    assert engine.conversation.thinking
    assert engine.then == "http.disconnect", "that the client has gone is still heard"
    assert apis.current() is None


@pytest.mark.parametrize(
    ("path", "body", "server"),
    [
        ("/v1/completions", {"prompt": "x"}, Server()),
        ("/tokenize", {"prompt": "x"}, Server()),
        ("/v1/chat/completions", {"messages": [USER], "chat_template": "{{ messages }}"}, Server()),
        ("/v1/chat/completions", {"messages": [{"role": "robot"}]}, None),
        ("/v1/chat/completions", b"{", Server()),
        ("/v1/chat/completions", [1], Server()),
    ],
)
def test_what_is_not_ours_passes_untouched(path: str, body: Any, server: Server | None) -> None:
    engine = Engine({"ok": 1})
    assert ask(engine, path, body, server=server) == (200, {"ok": 1})
    assert engine.asked[:7] == (body if isinstance(body, bytes) else json.dumps(body).encode())[:7]
    assert engine.conversation is None


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/chat/completions", {"messages": [USER, {"role": "robot"}]}, "messages[1]"),
        ("/v1/responses", {"input": [{"type": "web_search_call"}]}, "input[0]"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ("/prefix/v1/messages/count_tokens", {"messages": [{"role": "robot"}]}, "messages[0]"),
    ],
)
def test_a_refusal_has_the_form_of_its_api(path: str, body: Any, says: str) -> None:
    engine = Engine()
    status, answer = ask(engine, path, body)
    assert status == 400
    assert says in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer.get("type") == ("error" if "messages" in path else None)
    assert engine.asked is None


@pytest.mark.parametrize("kind", ["Application/JSON", "application/problem+JSON; charset=UTF-8"])
def test_a_media_type_is_read_in_any_case(kind: str) -> None:
    engine = Engine()
    assert ask(engine, "/v1/chat/completions", {"messages": [{"role": "robot"}]}, kind=kind)[0] == 400
    assert engine.asked is None


PARAMETERS = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"], "minLength": 1}}}
RESULT = [{"type": "text", "text": "r"}]
REQUESTS: dict[str, Any] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "t"}]},
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": RESULT},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS, "strict": True}}],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
        },
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}},
        "thinking": {"type": "enabled"},
    },
    "/v1/responses": {
        "instructions": "s",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "t"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r"}]},
        ],
        "tools": [
            {"type": "function", "name": "f", "parameters": PARAMETERS, "strict": True},
            {"type": "namespace", "name": "fs", "tools": [{"type": "function", "name": "w", "parameters": PARAMETERS}]},
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": PARAMETERS}},
        "reasoning": {"effort": "high"},
    },
    "/v1/messages": {
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "d"}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": "x"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": RESULT}]},
        ],
        "tools": [{"name": "f", "input_schema": PARAMETERS}, {"type": "bash_20250124", "name": "bash"}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    },
}
ODD: list[Any] = [None, True, 0, 5, -1.5, 10**400, "", "x", [], [None], [1, 2], [[]], {}, {"type": {}}, {"x": [1]}]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from _places(part, (*path, key))


def _replaced(request: Any, path: tuple[Any, ...], value: Any) -> Any:
    copied = copy.deepcopy(request)
    place = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copied


@pytest.mark.parametrize("path", REQUESTS)
def test_a_value_of_a_wrong_type_is_the_clients_mistake(path: str) -> None:
    """Nothing is raised: the engine is asked, or the client is told what is wrong."""
    for place in _places(REQUESTS[path]):
        for value in ODD:
            status, answer = ask(Engine(), path, _replaced(REQUESTS[path], place, value))
            assert status in (200, 400), (place, value, answer)
            assert "of the wrong type" not in json.dumps(answer), (place, value, "no reader names it")


def test_a_thread_is_refused_as_anthropics_sdk_reads_it() -> None:
    """Its tool runner asks for one first, and sends whole conversations once it is told by this code."""
    thread = {"type": "continue", "previous_message_id": "m"}
    result = {"type": "tool_result", "tool_use_id": "x", "content": "1"}
    body = {"messages": [{"role": "user", "content": [result]}], "thread": thread}
    status, answer = ask(Engine(), "/v1/messages", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (503, "overloaded_error"),
        (500, "api_error"),
        (418, "invalid_request_error"),
    ],
)
@pytest.mark.parametrize(
    "engines",
    [
        {"error": {"message": "why", "type": "BadRequestError"}},
        {"object": "error", "message": "why"},
        {"detail": "why"},
    ],
)
def test_an_engines_error_has_anthropics_form(status: int, kind: str, engines: Any) -> None:
    engine = Engine(engines, status)
    for body in ({"messages": [USER]}, b"no json"):
        answer = ask(engine, "/v1/messages", body)
        assert answer == (status, {"type": "error", "error": {"type": kind, "message": "why"}})


@pytest.mark.parametrize(
    "engine",
    [
        Engine(
            {"type": "error", "error": {"type": "api_error", "message": "Internal server error"}},
            500,
            refuses="too long",
        ),
        Engine([b"event: error\n", b"data: {}\n\n"], 200, "text/event-stream", refuses="too long"),
    ],
    ids=["whole", "streamed"],
)
def test_the_true_reason_replaces_what_the_engine_made_of_it(engine: Engine) -> None:
    status, answer = ask(engine, "/v1/messages", {"messages": [USER]})
    assert (status, answer["error"]) == (400, {"type": "invalid_request_error", "message": "too long"})


def test_a_stream_of_messages_that_begins_with_an_error_is_none() -> None:
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    raw = f"event: error\ndata: {json.dumps(error)}\n\n".encode()
    stop = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
    engine = Engine([raw, stop], 200, "text/event-stream")
    assert ask(engine, "/v1/messages", {"messages": [USER], "stream": True}) == (400, error)
    late = Engine([stop, raw], 200, "text/event-stream")
    assert ask(late, "/v1/messages", {"messages": [USER], "stream": True}) == (200, stop + raw)


def test_a_stream_is_changed_event_by_event_however_it_is_cut() -> None:
    item = {"type": "function_call", "id": "f", "call_id": "c", "name": "patch", "arguments": ""}
    events = [
        {"type": "response.output_item.added", "output_index": 0, "item": item, "sequence_number": 0},
        {
            "type": "response.function_call_arguments.delta",
            "output_index": 0,
            "item_id": "f",
            "delta": '{"input": "é',
            "sequence_number": 1,
        },
    ]
    raw = b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)
    raw += b": ping\n\ndata: [DONE]\n\n"
    said = []
    for size in (1, 10, len(raw)):
        engine = Engine([raw[i : i + size] for i in range(0, len(raw), size)], kind="text/event-stream; charset=utf-8")
        said.append(ask(engine, "/v1/responses", {"input": "hi", "tools": [TOOL], "stream": True}))
    assert said[0] == said[1] == said[2]
    text = said[0][1].decode()
    assert text.startswith("event: response.output_item.added\ndata: ")
    assert "event: response.custom_tool_call_input.delta\n" in text
    assert '"delta": "é"' in text
    assert text.endswith(": ping\n\ndata: [DONE]\n\n")


def test_a_response_that_is_asked_for_again_is_changed_again() -> None:
    call = {"type": "function_call", "id": "f", "call_id": "c", "name": "patch", "arguments": '{"input": "x"}'}
    engine = Engine({"object": "response", "id": "resp_1", "output": [call], "tools": []})
    gateway = Gateway(engine, Server)
    _, first = ask(engine, "/v1/responses", {"input": "hi", "tools": [TOOL]}, gateway=gateway)
    _, again = ask(engine, "/v1/responses/resp_1", b"", method="GET", gateway=gateway)
    assert first["output"][0]["type"] == "custom_tool_call"
    assert again == first


def test_a_deep_request_is_refused() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    function = {"name": "f", "parameters": {"a": deep}}
    for path, body in (
        ("/v1/chat/completions", {"messages": [USER], "tools": [{"type": "function", "function": function}]}),
        ("/v1/chat/completions", {"messages": [{**USER, "content": deep}]}),
        ("/v1/messages", {"messages": [{**USER, "content": deep}]}),
        ("/v1/responses", {"input": [{**USER, "content": deep}]}),
    ):
        status, answer = ask(Engine(), path, body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "nested too deeply" in answer["error"]["message"]
    endless = b'{"messages": ' + b"[" * 100_000
    engine = Engine({"ok": 1})
    assert ask(engine, "/v1/chat/completions", endless) == (200, {"ok": 1})
    assert engine.asked == endless


def test_a_batch_is_read_conversation_by_conversation() -> None:
    engine = Engine({"choices": []})
    parts = [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    path = "/v1/chat/completions/batch"
    assert ask(engine, path, {"messages": [[USER], parts], "reasoning_effort": "high"})[0] == 200
    asked = json.loads(engine.asked)
    assert asked == {"messages": [[USER], [{**USER, "content": "ab"}]], "chat_template_kwargs": {"thinking": True}}
    assert engine.conversation is None, "the engine renders each from its own request"
    goes_on = {"role": "assistant", "content": "x", "prefix": True}
    for body, says in (
        ({"messages": [[USER], [{"role": "robot"}]]}, "messages[1]: messages[0]: unknown role 'robot'"),
        ({"messages": [[USER], []]}, "messages[1]: messages: expected at least one"),
        ({"messages": [USER]}, "messages[0]: messages: expected a list of messages, got dict"),
        ({"messages": []}, "messages: expected a list of conversations"),
        ({"messages": [[USER]], "tools": [FUNCTION]}, "tools: expected none in a batch"),
        ({"messages": [[USER], [USER, goes_on]]}, "all answers go on"),
        ({"messages": [[USER, goes_on]], "reasoning_effort": "high"}, "can't think in a batch"),
        ({"messages": [[USER], [USER, {"role": "tool", "content": "x"}]]}, "messages[1]: messages[1]: a tool result"),
        ({"messages": [[USER]], "stream": True}, "stream: expected false in a batch"),
    ):
        status, answer = ask(Engine(), path, body)
        assert (status, says in answer["error"]["message"]) == (400, True), answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_number_that_no_reader_takes_is_refused(path: str) -> None:
    """It went to the engine unread, and so as the engine reads it."""
    engine = Engine()
    status, answer = ask(engine, path, b'{"messages": [], "seed": %s}' % (b"1" * 5000))
    assert (status, engine.asked) == (400, None)
    assert "too many digits" in answer["error"]["message"]
