"""The tools of the three APIs: what a client runs is a function, what a provider's server runs is left out."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dsv32_plugin.apis import Refusal, tools
from dsv32_plugin.apis.tools import Tools, read_chat_tools, read_messages_tools, read_responses_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get", "description": "d", "parameters": SCHEMA}
SERVER_TOOLS = [
    pytest.param(read_responses_tools, {"type": kind, **more}, id=kind)
    for kind, more in (
        ("web_search", {"external_web_access": True}),
        ("web_search_preview", {}),
        ("mcp", {"server_label": "deepwiki", "server_url": "https://x", "require_approval": "never"}),
        ("file_search", {"vector_store_ids": ["v"]}),
        ("code_interpreter", {"container": {"type": "auto"}}),
        ("image_generation", {}),
        ("tool_search", {}),
        ("computer_use_preview", {"display_width": 1, "display_height": 1, "environment": "browser"}),
        ("something_of_tomorrow", {}),
    )
] + [
    pytest.param(read_responses_tools, {"type": "shell", "environment": {"type": "container_auto"}}, id="hosted-shell"),
    *(
        pytest.param(read_messages_tools, {"type": kind, "name": name}, id=kind)
        for kind, name in (
            ("web_search_20250305", "web_search"),
            ("web_fetch_20250910", "web_fetch"),
            ("code_execution_20250825", "code_execution"),
            ("tool_search_tool_regex_20251119", "tool_search_tool_regex"),
            ("computer_20250124", "computer"),
        )
    ),
    pytest.param(read_chat_tools, {"type": "web_search"}, id="chat"),
]


@pytest.mark.parametrize(("read", "tool"), SERVER_TOOLS)
def test_a_tool_of_the_providers_server_is_left_out_and_said(
    read: Any, tool: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "_warned", set())
    with caplog.at_level(logging.WARNING):
        assert read([tool]).functions == []
    assert read([tool]).given == []
    (said,) = caplog.messages
    assert tool["type"] in said


def test_a_function_is_the_same_whatever_api_it_came_by() -> None:
    chat = read_chat_tools([{"type": "function", "function": {**FUNCTION, "strict": None}}])
    bare = read_chat_tools([FUNCTION])
    responses = read_responses_tools(
        [
            {
                "type": "function",
                "parameters": SCHEMA,
                "strict": False,
                "defer_loading": True,
                "name": "get",
                "description": "d",
            }
        ]
    )
    messages = read_messages_tools(
        [{"input_schema": SCHEMA, "name": "get", "description": "d", "cache_control": {"type": "ephemeral"}}]
    )
    for read in (chat, bare, responses, messages):
        assert [list(function.items()) for function in read.functions] == [list(FUNCTION.items())]


def test_strict_is_shown_where_it_is_true() -> None:
    chat = read_chat_tools([{"type": "function", "function": {**FUNCTION, "strict": True}}])
    responses = read_responses_tools([{"type": "function", **FUNCTION, "strict": True}])
    messages = read_messages_tools([{"name": "get", "description": "d", "input_schema": SCHEMA, "strict": True}])
    assert chat.functions == responses.functions == messages.functions == [{**FUNCTION, "strict": True}]


@pytest.mark.parametrize(
    ("read", "tool", "name", "kind"),
    [
        (read_responses_tools, {"type": "custom", "name": "patch", "description": "p"}, "patch", "custom"),
        (read_chat_tools, {"type": "custom", "custom": {"name": "patch", "description": "p"}}, "patch", "custom"),
        (read_responses_tools, {"type": "local_shell"}, "local_shell", "local_shell"),
        (read_responses_tools, {"type": "shell"}, "shell", "shell"),
        (read_responses_tools, {"type": "apply_patch"}, "apply_patch", "apply_patch"),
        (read_messages_tools, {"type": "bash_20250124", "name": "bash"}, "bash", "function"),
        (
            read_messages_tools,
            {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
            "str_replace_based_edit_tool",
            "function",
        ),
        (read_messages_tools, {"type": "memory_20250818", "name": "memory"}, "memory", "function"),
    ],
)
def test_a_tool_that_the_client_runs_is_a_function(read: Any, tool: dict[str, Any], name: str, kind: str) -> None:
    made = read([tool])
    (function,) = made.functions
    assert function["name"] == name
    assert function["parameters"]["type"] == "object"
    assert made.by_name[name].kind == kind
    assert made.given == [tool]


def test_a_custom_tool_takes_one_string_and_tells_its_grammar() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: WORD"}
    chat = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: WORD"}}
    responses = read_responses_tools([{"type": "custom", "name": "patch", "format": grammar}])
    assert (
        responses.functions
        == read_chat_tools([{"type": "custom", "custom": {"name": "patch", "format": chat}}]).functions
    )
    (function,) = responses.functions
    assert function["parameters"]["required"] == ["input"]
    assert "start: WORD" in function["parameters"]["properties"]["input"]["description"]


def test_the_tools_of_a_namespace() -> None:
    inner = [{"type": "function", "name": "write_file", "parameters": SCHEMA}, {"type": "custom", "name": "patch"}]
    given = {"type": "namespace", "name": "fs", "description": "files", "tools": [*inner, {"type": "web_search"}]}
    made = read_responses_tools([given])
    assert [function["name"] for function in made.functions] == ["fs__write_file", "fs__patch"]
    assert made.by_name["fs__write_file"].namespace == "fs"
    assert made.by_name["fs__write_file"].name == "write_file"
    assert made.given == [given]


@pytest.mark.parametrize(
    ("read", "tool"),
    [
        (read_chat_tools, {"type": "function", "function": {"description": "d"}}),
        (read_chat_tools, "get"),
        (read_responses_tools, {"type": "function"}),
        (read_responses_tools, {"type": "namespace", "tools": []}),
        (read_messages_tools, {"name": "get"}),
    ],
)
def test_what_is_no_tool_is_refused_by_its_place(read: Any, tool: Any) -> None:
    with pytest.raises(Refusal, match=r"tools\[1\]"):
        read([{**FUNCTION, "input_schema": SCHEMA}, tool])


def test_a_call_is_required_where_no_tool_is_left() -> None:
    left = read_responses_tools([{"type": "web_search"}])
    with pytest.raises(Refusal, match="no tool is in effect"):
        left.choose("required")
    with pytest.raises(Refusal, match="'web_search' is run by the provider's server"):
        left.choose("required", ["web_search"])
    with pytest.raises(Refusal, match="no tool is in effect"):
        Tools().choose("required")
