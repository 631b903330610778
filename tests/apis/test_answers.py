"""Answers in the form that the client asked in: custom tools, namespaces, tools named by a type; whole and streamed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from openai.types.responses import ResponseUsage

from dsv32_plugin.apis import chat, responses
from dsv32_plugin.apis.exchange import InputText, Server, input_of
from dsv32_plugin.apis.responses import Store

TEXT = 'a "quoted" \\ line\n\ttab 😀 é \u2028'
ARGUMENTS = json.dumps({"input": TEXT})
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
TOOLS = [
    {"type": "custom", "name": "patch"},
    {
        "type": "namespace",
        "name": "fs",
        "description": "d",
        "tools": [{"type": "function", "name": "write_file", "parameters": SCHEMA}, {"type": "custom", "name": "edit"}],
    },
    {"type": "local_shell"},
    {"type": "shell"},
    {"type": "apply_patch"},
    {"type": "web_search"},
    {"type": "function", "name": "get", "parameters": SCHEMA},
]
IN_EFFECT = [tool for tool in TOOLS if tool["type"] != "web_search"]


def answer_of(body: dict[str, Any] | None = None, store: Store | None = None) -> responses.ResponsesAnswer:
    request = {"input": "hi", "tools": TOOLS, **(body or {})}
    answer = responses.read(request, Server(), store or Store()).answer
    assert isinstance(answer, responses.ResponsesAnswer)
    return answer


def made(name: str, arguments: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": name,
        "arguments": arguments,
        "status": "completed",
    }


CALLS = [
    ("get", '{"path": "x"}', {**made("get", '{"path": "x"}')}),
    ("fs__write_file", "{}", {**made("write_file", "{}"), "namespace": "fs"}),
    (
        "patch",
        ARGUMENTS,
        {
            "type": "custom_tool_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "patch",
            "input": TEXT,
            "status": "completed",
        },
    ),
    (
        "fs__edit",
        ARGUMENTS,
        {
            "type": "custom_tool_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "edit",
            "namespace": "fs",
            "input": TEXT,
            "status": "completed",
        },
    ),
    (
        "local_shell",
        '{"command": ["ls", "-l"], "working_directory": "/"}',
        {
            "type": "local_shell_call",
            "id": "fc_1",
            "call_id": "call_1",
            "status": "completed",
            "action": {"type": "exec", "command": ["ls", "-l"], "env": {}, "working_directory": "/"},
        },
    ),
    (
        "shell",
        '{"commands": ["ls"]}',
        {
            "type": "shell_call",
            "id": "fc_1",
            "call_id": "call_1",
            "status": "completed",
            "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None},
        },
    ),
    (
        "apply_patch",
        '{"type": "delete_file", "path": "x"}',
        {
            "type": "apply_patch_call",
            "id": "fc_1",
            "call_id": "call_1",
            "status": "completed",
            "operation": {"type": "delete_file", "path": "x"},
        },
    ),
]


def response(*items: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "response",
        "id": "resp_1",
        "output": list(items),
        "tools": [],
        "tool_choice": "required",
        "status": "completed",
    }


@pytest.mark.parametrize(("name", "arguments", "expected"), CALLS, ids=[name for name, *_ in CALLS])
def test_a_whole_call(name: str, arguments: str, expected: dict[str, Any]) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "local_shell"}]}
    body = {"tool_choice": choice, "reasoning": {"effort": "none"}}
    changed = answer_of(body).whole(response(made(name, arguments)))
    assert changed["output"] == [expected]
    assert changed["tools"] == IN_EFFECT, "the response lists what is in effect, as the client gave it"
    assert (changed["tool_choice"], changed["reasoning"]) == (choice, {"effort": "none"})


def stream(name: str, fragments: list[str]) -> list[dict[str, Any]]:
    """What an engine sends for one call."""
    place = {"item_id": "fc_1", "output_index": 1}
    arguments = "".join(fragments)
    kind = "response.function_call_arguments"
    events = [
        {"type": "response.created", "response": response()},
        {
            "type": "response.output_item.added",
            "output_index": 1,
            "item": {**made(name, ""), "status": "in_progress"},
        },
        *({"type": f"{kind}.delta", **place, "delta": fragment} for fragment in fragments),
        {"type": f"{kind}.done", **place, "arguments": arguments, "name": name},
        {"type": "response.output_item.done", "output_index": 1, "item": made(name, arguments)},
        {"type": "response.completed", "response": response(made(name, arguments))},
    ]
    return [{**copy.deepcopy(event), "sequence_number": number} for number, event in enumerate(events)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("name", "arguments", "expected"), CALLS, ids=[name for name, *_ in CALLS])
def test_a_streamed_call(name: str, arguments: str, expected: dict[str, Any], size: int) -> None:
    answer = answer_of()
    fragments = [arguments[i : i + size] for i in range(0, len(arguments), size)]
    events = [sent for event in stream(name, fragments) for sent in answer.event(event)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    added = next(event["item"] for event in events if event["type"] == "response.output_item.added")
    assert (added["type"], added["status"]) == (expected["type"], "in_progress")
    done = next(event["item"] for event in events if event["type"] == "response.output_item.done")
    assert done == expected
    assert events[-1]["response"]["output"] == [expected]
    kinds = {event["type"] for event in events}
    if expected["type"] == "custom_tool_call":
        deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
        assert "".join(deltas) == TEXT
        assert all(deltas)
        assert added["input"] == ""
        (end,) = (event for event in events if event["type"] == "response.custom_tool_call_input.done")
        assert end["input"] == TEXT
        assert not any("function_call" in kind for kind in kinds)
    elif expected["type"] == "function_call":
        (end,) = (event for event in events if event["type"] == "response.function_call_arguments.done")
        assert (end["name"], end["arguments"]) == (expected["name"], arguments)
    else:
        assert not any("arguments" in kind for kind in kinds)


@pytest.mark.parametrize("size", range(1, 12))
def test_the_text_of_a_custom_call_however_it_is_cut(size: int) -> None:
    for arguments in (
        ARGUMENTS,
        json.dumps({"input": TEXT}, ensure_ascii=False),
        '{ "input" :"x\\ud83d y"}',
        '{"input": ""}',
    ):
        text = InputText()
        pieces = [text.feed(arguments[i : i + size]) for i in range(0, len(arguments), size)]
        assert "".join(pieces) + text.finish(arguments) == input_of(arguments)


def test_the_text_of_a_custom_call_that_was_cut() -> None:
    assert input_of('{"input": "rm -rf /home/u') == "rm -rf /home/u"
    assert input_of('{"input": "a\\') == "a"
    assert input_of('{"input": "') == ""
    assert input_of("{") == "{"


def test_the_text_of_a_custom_call_that_is_none() -> None:
    assert input_of('{"other": 1}') == '{"other": 1}'
    assert input_of("") == ""


def test_a_conversation_goes_on_after_a_call() -> None:
    store = Store()
    first = answer_of({"instructions": "Once."}, store)
    first.whole(
        response(
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]}, made("fs__write_file", "{}")
        )
    )
    follow = {
        "previous_response_id": "resp_1",
        "input": [{"type": "function_call_output", "call_id": "call_1", "output": "ok"}],
    }
    exchange = responses.read(follow, Server(), store)
    assert [message["role"] for message in exchange.conversation.messages] == ["user", "assistant", "tool"]
    turn = exchange.conversation.messages[1]
    assert turn["reasoning_content"] == "r"
    assert turn["tool_calls"][0]["function"]["name"] == "fs__write_file"
    assert "previous_response_id" not in exchange.body, "the engine has forgotten the call"
    again = exchange.answer.whole({**response(), "id": "resp_2"})
    assert again["previous_response_id"] == "resp_1"
    third = responses.read({"previous_response_id": "resp_2", "input": "and?"}, Server(), store)
    assert [message["role"] for message in third.conversation.messages] == ["user", "assistant", "tool", "user"]


def test_what_is_not_stored_can_not_be_gone_on_from() -> None:
    store = Store(size=1)
    answer_of({"store": False}, store).whole(response())
    assert store.get("resp_1") is None
    answer_of(None, store).whole(response())
    answer_of(None, store).whole({**response(), "id": "resp_2"})
    assert store.get("resp_1") is None, "the oldest is forgotten"
    assert store.get("resp_2") is not None


CHAT_TOOLS = [{"type": "custom", "custom": {"name": "patch"}}, {"type": "function", "function": {"name": "get"}}]


def chat_answer() -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": CHAT_TOOLS}
    return chat.read(body, Server()).answer


def test_a_custom_call_of_a_chat() -> None:
    def call(name: str, arguments: str) -> dict[str, Any]:
        return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}

    message = {"role": "assistant", "tool_calls": [call("patch", ARGUMENTS), call("get", "{}")]}
    changed = chat_answer().whole({"choices": [{"index": 0, "message": message}]})
    assert changed["choices"][0]["message"]["tool_calls"] == [
        {"id": "c", "type": "custom", "custom": {"name": "patch", "input": TEXT}},
        call("get", "{}"),
    ]


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_streamed_custom_call_of_a_chat(size: int) -> None:
    answer = chat_answer()
    pieces = [
        {"index": 0, "id": "c", "type": "function", "function": {"name": "patch", "arguments": ""}},
        *({"index": 0, "function": {"arguments": ARGUMENTS[i : i + size]}} for i in range(0, len(ARGUMENTS), size)),
        {"index": 1, "id": "d", "type": "function", "function": {"name": "get", "arguments": "{}"}},
    ]
    sent = []
    for piece in pieces:
        (chunk,) = answer.event({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]})
        sent += chunk["choices"][0]["delta"]["tool_calls"]
    assert sent[0] == {"index": 0, "id": "c", "type": "custom", "custom": {"name": "patch", "input": ""}}
    assert "".join(piece["custom"]["input"] for piece in sent[:-1]) == TEXT
    assert sent[-1] == pieces[-1]


def test_usage_has_the_names_of_this_api() -> None:
    """SGLang before 0.5.23 gives a whole answer those of Chat, which no client of Responses can read."""
    of_chat = {
        "prompt_tokens": 70,
        "completion_tokens": 9,
        "total_tokens": 79,
        "prompt_tokens_details": {"cached_tokens": 64},
        "reasoning_tokens": 5,
    }
    usage = answer_of().whole({"object": "response", "output": [], "usage": of_chat})["usage"]
    read = ResponseUsage.model_validate(usage)
    assert (read.input_tokens, read.output_tokens, read.total_tokens) == (70, 9, 79)
    assert (read.input_tokens_details.cached_tokens, read.output_tokens_details.reasoning_tokens) == (64, 5)
    right = answer_of().whole({"object": "response", "output": [], "usage": dict(usage)})
    assert right["usage"] == usage
