"""Items of the Responses API to messages."""

from __future__ import annotations

from typing import Any

import pytest

from dsv32_plugin.apis import Refusal
from dsv32_plugin.apis.items import ItemReader
from dsv32_plugin.parsers import encode_messages

USER = {"role": "user", "content": "u"}


def read(*items: Any) -> list[dict[str, Any]]:
    reader = ItemReader()
    reader.read((f"input[{i}]", item) for i, item in enumerate(items))
    assert len(reader.messages) == len(reader.labels)
    encode_messages(reader.messages, always_answer=True)
    return [dict(message) for message in reader.messages]


def call(call_id: str, name: str = "get", arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def output(call_id: str, text: Any = "ok") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def shape(messages: list[dict[str, Any]]) -> list[str]:
    """Roles, and the ids of calls and results."""
    shapes = []
    for message in messages:
        ids = [made["id"] for made in message.get("tool_calls", [])] or [message.get("tool_call_id")]
        shapes.append(":".join([message["role"], *(id for id in ids if id)]))
    return shapes


@pytest.mark.parametrize(
    ("items", "shapes"),
    [
        pytest.param([USER, call("a"), output("a")], ["user", "assistant:a", "tool:a"], id="plain"),
        pytest.param(
            [USER, call("a"), call("b"), output("b"), output("a")],
            ["user", "assistant:a:b", "tool:a", "tool:b"],
            id="outputs-in-any-order",
        ),
        pytest.param(
            [USER, call("a"), call("b", arguments='{"x": "y'), output("a")],
            ["user", "assistant:a:b", "tool:a"],
            id="no-output-of-a-call-that-was-cut",
        ),
        pytest.param(
            [USER, call("a", arguments='{"x": "y')], ["user", "assistant:a"], id="a-call-that-was-cut-at-the-end"
        ),
        pytest.param(
            [USER, call("a"), {"role": "developer", "content": "hint"}, output("a")],
            ["user", "assistant:a", "tool:a", "developer"],
            id="a-message-between-a-call-and-its-output",
        ),
        pytest.param(
            [USER, call("a"), {"type": "reasoning", "summary": []}, call("b"), output("a"), output("b")],
            ["user", "assistant:a:b", "tool:a", "tool:b"],
            id="reasoning-between-calls",
        ),
        pytest.param(
            [USER, call("a"), USER, call("b"), output("a"), output("b")],
            ["user", "assistant:a", "tool:a", "user", "assistant:b", "tool:b"],
            id="outputs-far-from-their-calls",
        ),
        pytest.param(
            [USER, call("a"), output("a"), call("b"), output("b")],
            ["user", "assistant:a", "tool:a", "assistant:b", "tool:b"],
            id="one-after-the-other",
        ),
        pytest.param([output("a"), USER, call("a")], ["user", "assistant:a", "tool:a"], id="output-first"),
    ],
)
def test_outputs_follow_their_calls(items: list[Any], shapes: list[str]) -> None:
    assert shape(read(*items)) == shapes


def test_a_turn_is_its_reasoning_text_and_calls() -> None:
    reasoning = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    _, turn, _ = read(USER, reasoning, said, call("a"), output("a"))
    assert (turn["reasoning_content"], turn["content"]) == ("hm", "I look.")
    assert [made["id"] for made in turn["tool_calls"]] == ["a"]


def test_reasoning_that_only_another_server_can_read_is_none() -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}
    assert shape(read(USER, sealed, USER)) == ["user", "user"]


@pytest.mark.parametrize(
    ("items", "name", "arguments", "result"),
    [
        pytest.param(
            [
                {"type": "custom_tool_call", "call_id": "a", "name": "patch", "input": '*** "x"'},
                {"type": "custom_tool_call_output", "call_id": "a", "output": "done"},
            ],
            "patch",
            {"input": '*** "x"'},
            "done",
            id="custom",
        ),
        pytest.param(
            [{**call("a", "write_file"), "namespace": "fs"}, output("a")], "fs__write_file", "{}", "ok", id="namespace"
        ),
        pytest.param(
            [
                {
                    "type": "local_shell_call",
                    "id": "lsh",
                    "call_id": "a",
                    "action": {"type": "exec", "command": ["ls"], "env": {}, "user": None},
                },
                {"type": "local_shell_call_output", "id": "lsh", "output": "file"},
            ],
            "local_shell",
            {"command": ["ls"], "env": {}},
            "file",
            id="local-shell-by-the-items-id",
        ),
        pytest.param(
            [
                {"type": "shell_call", "call_id": "a", "action": {"commands": ["ls"]}, "status": "completed"},
                {"type": "shell_call_output", "call_id": "a", "output": [{"stdout": "x", "stderr": ""}]},
            ],
            "shell",
            {"commands": ["ls"]},
            '[{"stdout": "x", "stderr": ""}]',
            id="shell",
        ),
        pytest.param(
            [
                {"type": "apply_patch_call", "call_id": "a", "operation": {"type": "delete_file", "path": "x"}},
                {"type": "apply_patch_call_output", "call_id": "a", "status": "completed"},
            ],
            "apply_patch",
            {"type": "delete_file", "path": "x"},
            "completed",
            id="apply-patch",
        ),
        pytest.param(
            [{"type": "mcp_call", "id": "a", "server_label": "wiki", "name": "ask", "arguments": "{}", "output": "x"}],
            "wiki__ask",
            "{}",
            "x",
            id="mcp-with-its-output",
        ),
        pytest.param(
            [
                {"type": "tool_search_call", "call_id": "a", "arguments": {"query": "q"}, "status": "completed"},
                {"type": "tool_search_output", "call_id": "a", "tools": [], "execution": "client"},
            ],
            "tool_search",
            {"query": "q"},
            '{"tools": []}',
            id="any-call-and-its-output",
        ),
    ],
)
def test_calls_of_other_kinds(items: list[Any], name: str, arguments: Any, result: str) -> None:
    _, turn, tool = read(USER, *items)
    (made,) = turn["tool_calls"]
    assert made["function"] == {"name": name, "arguments": arguments}
    assert tool["content"] == result


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([USER, {"type": "web_search_call", "id": "w", "status": "completed"}], r"input\[1\].*'web_search_call'"),
        ([{"type": "item_reference", "id": "x"}], r"input\[0\].*'item_reference'"),
        ([{"type": "mcp_list_tools", "id": "x", "server_label": "w", "tools": []}], "'mcp_list_tools'"),
        ([{"content": "no role"}], r"input\[0\]: expected an item with a type or a role"),
        (["text"], r"input\[0\]: expected an item, got str"),
        ([USER, output("z")], r"input\[1\]: a function_call_output without its call.*'z'"),
        ([USER, call("a"), call("b"), output("a")], r"input\[1\]: no output has the call_id 'b'"),
        ([USER, call("a"), output("a"), output("a")], r"input\[3\]: a second output for the call 'a'"),
        ([USER, call("a"), call("a"), output("a")], r"input\[2\].*the call_id 'a' of another call"),
    ],
)
def test_what_has_no_rendering_is_refused_by_its_place_and_type(items: list[Any], says: str) -> None:
    with pytest.raises(Refusal, match=says):
        read(*items)


def test_a_picture_in_an_output_becomes_a_line() -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    *_, tool = read(USER, call("a"), output("a", [{"type": "input_text", "text": "see"}, picture]))
    encode = encode_messages(read(USER, call("a"), output("a", [picture])), thinking_mode="chat")
    assert tool["content"] == "see\n[image (image/png, 3 bytes): not shown, this model reads text only]"
    assert "[image (image/png, 3 bytes)" in encode
