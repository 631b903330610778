"""The same conversation over the three APIs is the same prompt; what each says about thinking, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsv32_plugin import apis
from dsv32_plugin.apis import Refusal, anthropic, chat, responses
from dsv32_plugin.apis.conversation import UNSEEN
from dsv32_plugin.apis.exchange import Exchange, Server
from dsv32_plugin.parsers import encode_messages

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
LONG = 12345678901234567890123
PLAIN = Server()
USER = {"role": "user", "content": "hi"}


def over_chat(body: Any, server: Server = PLAIN) -> Exchange:
    return chat.read(body, server)


def over_messages(body: Any, server: Server = PLAIN) -> Exchange:
    return anthropic.read(body, server)


def over_responses(body: Any, server: Server = PLAIN) -> Exchange:
    return responses.read(body, server, responses.Store())


def prompt(exchange: Exchange) -> str:
    engines_own = [{"role": "user", "content": "what the engine has of it"}]
    return str(apis.rendered(exchange.conversation, engines_own, exchange.body["chat_template_kwargs"], "v3.2", len))


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        USER,
        {
            "role": "assistant",
            "reasoning_content": "r",
            "content": "I look.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get", "arguments": f'{{"x": {LONG}}}'}},
                {"id": "b", "type": "custom", "custom": {"name": "patch", "input": "*** b"}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "done"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sun"}]},
    ],
    "tools": [
        {"type": "function", "function": {"name": "get", "description": "d", "parameters": SCHEMA, "strict": False}},
        {"type": "custom", "custom": {"name": "patch", "description": "p"}},
        {"type": "web_search"},
    ],
    "thinking": {"type": "enabled"},
}
RESPONSES = {
    "instructions": "Be brief.",
    "input": [
        USER,
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "r"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "a", "name": "get", "arguments": f'{{"x": {LONG}}}'},
        {"type": "custom_tool_call", "call_id": "b", "name": "patch", "input": "*** b"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": "done"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
    ],
    "tools": [
        {"type": "function", "name": "get", "description": "d", "parameters": SCHEMA, "strict": False},
        {"type": "custom", "name": "patch", "description": "p"},
        {"type": "web_search"},
    ],
    "reasoning": {"effort": "low"},
}
CUSTOM = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
MESSAGES = {
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc; cch=1;"},
        {"type": "text", "text": "Be brief."},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "r", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "get", "input": {"x": LONG}},
                {"type": "tool_use", "id": "b", "name": "patch", "input": {"input": "*** b"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": "done"},
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sun"}]},
            ],
        },
    ],
    "tools": [
        {"name": "get", "description": "d", "input_schema": SCHEMA},
        {"name": "patch", "description": "p", "input_schema": CUSTOM},
        {"type": "web_search_20250305", "name": "web_search"},
    ],
    "thinking": {"type": "adaptive"},
}


def test_one_conversation_is_one_prompt() -> None:
    official = encode_messages(
        CHAT["messages"],
        tools=[
            {"name": "get", "description": "d", "parameters": SCHEMA},
            {"name": "patch", "description": "p", "parameters": CUSTOM},
        ],
    )
    assert str(LONG) in official
    assert prompt(over_chat(CHAT)) == official
    assert prompt(over_responses(RESPONSES)) == official
    assert prompt(over_messages(MESSAGES)) == official


@pytest.mark.parametrize(("read", "body"), [(over_responses, RESPONSES), (over_messages, MESSAGES)])
def test_what_the_engine_has_is_never_rendered(read: Any, body: Any) -> None:
    assert UNSEEN in json.dumps(read(body).body)
    with pytest.raises(RuntimeError, match="lost between the gateway and the encoder"):
        apis.rendered(None, [{"role": "user", "content": UNSEEN}], {}, "v3.2", len)


KWARGS = "chat_template_kwargs"
SAYS = [
    ({}, None),
    ({KWARGS: {"thinking": True}}, True),
    ({KWARGS: {"enable_thinking": True}}, True),
    ({KWARGS: {"enable_thinking": False}}, False),
    ({KWARGS: {"thinking": False, "enable_thinking": True}}, False),
    ({"thinking": {"type": "enabled"}}, True),
    ({"thinking": {"type": "disabled"}}, False),
    ({"thinking": None}, None),
    ({KWARGS: {"thinking": False}, "thinking": {"type": "enabled"}}, False),
]
EFFORTS = [("none", False), ("minimal", True), ("low", True), ("medium", True), ("high", True), ("xhigh", True)]
CHAT_SAYS = [*SAYS, *(({"reasoning_effort": effort}, on) for effort, on in EFFORTS)]
RESPONSES_SAYS = [
    *(({"reasoning": {"effort": effort, "summary": "auto"}}, on) for effort, on in EFFORTS),
    ({"reasoning": {"summary": "auto"}}, None),
    ({"reasoning": {}}, None),
    ({KWARGS: {"thinking": False}, "reasoning": {"effort": "high"}}, False),
]
MESSAGES_SAYS = [*SAYS, ({"thinking": {"type": "adaptive"}}, True), ({"output_config": {"effort": "high"}}, None)]


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    ("read", "body", "says", "thinks"),
    [
        *((over_chat, {"messages": [USER]}, *case) for case in CHAT_SAYS),
        *((over_responses, {"input": "hi"}, *case) for case in RESPONSES_SAYS),
        *((over_messages, {"messages": [USER]}, *case) for case in MESSAGES_SAYS),
    ],
)
def test_the_request_beats_the_server(read: Any, body: Any, says: Any, thinks: bool | None, default: bool) -> None:
    exchange = read({**body, **says}, Server(default_thinking=default))
    expected = default if thinks is None else thinks
    assert prompt(exchange).endswith("<think>" if expected else "</think>")
    assert exchange.body[KWARGS] == {"thinking": expected}, "by which the engine reads the answer"
    assert "reasoning_effort" not in exchange.body
    assert "thinking" not in exchange.body


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (over_chat, {KWARGS: {"thinking": "false"}}),
        (over_chat, {KWARGS: {"enable_thinking": 1}}),
        (over_chat, {KWARGS: {"thinking": True, "enable_thinking": "no"}}),
        (over_chat, {KWARGS: "thinking"}),
        (over_chat, {"thinking": True}),
        (over_chat, {"thinking": {"type": "on"}}),
        (over_chat, {"reasoning_effort": "off"}),
        (over_chat, {"reasoning_effort": True}),
        (over_messages, {"thinking": {"type": "on"}}),
        (over_messages, {"thinking": {}}),
        (over_responses, {"reasoning": {"effort": "off"}}),
        (over_responses, {"reasoning": "high"}),
    ],
)
def test_what_is_no_switch_is_refused(read: Any, body: Any) -> None:
    with pytest.raises(Refusal, match="expected"):
        read({"messages": [USER], "input": "hi", **body})


OPEN, CLOSED = "<｜User｜>hi<｜Assistant｜>", "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"


@pytest.mark.parametrize(
    ("read", "body", "ends", "answer_thinks"),
    [
        pytest.param(
            over_chat,
            {"messages": [USER, {"role": "assistant", "content": "Hel"}]},
            "</think>Hel<｜end▁of▁sentence｜><｜Assistant｜></think>",
            False,
            id="a-final-assistant-message",
        ),
        pytest.param(
            over_chat,
            {"messages": [USER, {"role": "assistant", "content": "Hel"}], "thinking": {"type": "enabled"}},
            "<think></think>Hel<｜end▁of▁sentence｜><｜Assistant｜><think>",
            True,
            id="the-same-in-thinking-mode",
        ),
        pytest.param(
            over_chat,
            {"messages": [USER, {"role": "assistant", "content": "Hel", "prefix": True}]},
            "</think>Hel",
            False,
            id="prefix",
        ),
        pytest.param(
            over_chat,
            {
                "messages": [USER, {"role": "assistant", "content": "Hel", "prefix": True}],
                "thinking": {"type": "enabled"},
            },
            "<think></think>Hel",
            False,
            id="prefix-and-thinking",
        ),
        pytest.param(
            over_chat,
            {
                "messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "Let me"}],
                "continue_final_message": True,
                "thinking": {"type": "enabled"},
            },
            "<think>Let me",
            True,
            id="reasoning-goes-on",
        ),
        pytest.param(
            over_messages,
            {"messages": [USER, {"role": "assistant", "content": "Hel"}]},
            "</think>Hel",
            False,
            id="prefill",
        ),
        pytest.param(
            over_responses,
            {"input": [USER, {"role": "assistant", "content": "Hel", "status": "incomplete"}]},
            "</think>Hel",
            False,
            id="an-incomplete-item",
        ),
        pytest.param(
            over_chat,
            {"messages": [USER, {"role": "system", "content": "Now."}]},
            "<｜User｜>hiNow.<｜Assistant｜></think>",
            False,
            id="a-final-system-message",
        ),
        pytest.param(
            over_messages,
            {"messages": [USER, {"role": "system", "content": "Now."}], "thinking": {"type": "adaptive"}},
            "<｜User｜>hiNow.<｜Assistant｜><think>",
            True,
            id="the-same-over-messages",
        ),
        pytest.param(
            over_responses,
            {"input": [{"role": "developer", "content": "Be brief."}, USER]},
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hi<｜Assistant｜></think>",
            False,
            id="a-developer-is-the-system",
        ),
    ],
)
def test_whatever_is_last_the_model_can_answer(read: Any, body: Any, ends: str, answer_thinks: bool) -> None:
    exchange = read(body)
    assert prompt(exchange).endswith(ends)
    assert exchange.body[KWARGS]["thinking"] is answer_thinks


@pytest.mark.parametrize(
    ("read", "body", "says"),
    [
        (over_chat, {"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[1\]"),
        (over_chat, {"messages": [USER, {"type": "message", "content": "x"}]}, r"messages\[1\].*'message'"),
        (over_chat, {"messages": "hi"}, "expected a list"),
        (over_chat, {"messages": [USER], "tools": {}}, "tools: expected a list"),
        (over_chat, {"messages": [USER], "tool_choice": "any"}, "tool_choice: expected"),
        (over_messages, {"messages": [USER, {"role": "tool", "content": ""}]}, r"messages\[1\].*'tool'"),
        (
            over_messages,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"messages\[0\].content\[0\]",
        ),
        (over_responses, {"input": 5}, "input: expected text or a list"),
        (over_responses, {"input": [{"role": "assistant", "content": [{"type": "x"}]}]}, r"input\[0\].*'x'"),
        (over_responses, {"input": "hi", "previous_response_id": "resp_x"}, "there is no response 'resp_x'"),
    ],
)
def test_a_refusal_names_the_place_and_the_cause(read: Any, body: Any, says: str) -> None:
    with pytest.raises(Refusal, match=says):
        prompt(read(body))


def test_an_error_of_the_encoder_has_the_clients_own_name_of_the_message() -> None:
    exchange = over_responses(
        {"instructions": "x", "input": [USER, {"role": "user", "content": [{"type": "input_image"}]}]}
    )
    with pytest.raises(ValueError, match="text only"):
        prompt(exchange)
    assert exchange.conversation.refusal == "input[1]: content part 0 is 'input_image'; the model reads text only"


def test_results_of_a_providers_tool_stand_within_anthropics_message() -> None:
    found = [{"type": "web_search_result", "url": "https://x", "title": "T", "encrypted_content": "secret"}]
    answer = [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": found},
        {"type": "text", "text": "Found."},
    ]
    text = prompt(over_messages({"messages": [USER, {"role": "assistant", "content": answer}, USER]}))
    assert "https://x" in text
    assert "secret" not in text
    assert text.index("</function_results>") < text.index("Found.")


def test_messages_of_the_assistant_in_a_row_are_one_turn() -> None:
    """As Anthropic's API has it; parallel calls in two messages were refused."""
    use = [{"type": "tool_use", "id": id, "name": "get", "input": {}} for id in "ab"]
    results = [{"type": "tool_result", "tool_use_id": id, "content": "sun"} for id in "ab"]
    whole = [{"role": "assistant", "content": [{"type": "text", "text": "I look."}, *use]}]
    apart = [{"role": "assistant", "content": content} for content in ("I ", [{"type": "text", "text": "look."}])]
    apart += [{"role": "assistant", "content": [call]} for call in use]
    prompts = [
        prompt(over_messages({"messages": [USER, *turn, {"role": "user", "content": results}]}))
        for turn in (whole, apart)
    ]
    assert prompts[0] == prompts[1]
    goes_on = prompt(over_messages({"messages": [USER, *apart[:2]]}))
    assert goes_on.endswith("</think>I look.")


@pytest.mark.parametrize(("content", "shown"), [("", "error"), (None, "error"), ("no file", "no file")])
def test_a_result_that_is_an_error_says_something(content: Any, shown: str) -> None:
    use = {"type": "tool_use", "id": "a", "name": "get", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": content}
    turns = [USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    assert f"<result>{shown}</result>" in prompt(over_messages({"messages": turns}))


def test_what_a_tool_shows_becomes_lines() -> None:
    shown = [
        {"type": "text", "text": "see"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
        {"type": "tool_reference", "tool_name": "get"},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "inside"}, "title": "T"},
        {"type": "search_result", "source": "https://x", "title": "S", "content": [{"type": "text", "text": "found"}]},
    ]
    body = {
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "get", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": shown}]},
        ]
    }
    result = prompt(over_messages(body)).partition("<result>")[2].partition("</result>")[0]
    assert result.split("\n") == [
        "see",
        "[image (image/png, 3 bytes): not shown, this model reads text only]",
        "[the tool get is available]",
        "T",
        "inside",
        "S",
        "https://x",
        "found",
    ]


def test_half_a_surrogate_pair_is_replaced() -> None:
    messages = [
        {"role": "user", "content": "a\ud83d\ude00b\ud83d"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "get", "arguments": '{"x": "\\ud83d"}'}}]},
        {"role": "tool", "content": "\ude00"},
    ]
    tools = [{"type": "function", "function": {"name": "get", "description": "\ud83d"}}]
    text = prompt(over_chat({"messages": messages, "tools": tools}))
    assert "a😀b�" in text
    assert text.encode().count("�".encode()) == 4


CHOICES = [
    (over_chat, "auto", "auto", None),
    (over_chat, "none", "none", None),
    (over_chat, "required", "required", None),
    (over_chat, {"type": "function", "function": {"name": "get"}}, "get", None),
    (over_chat, {"type": "custom", "custom": {"name": "patch"}}, "patch", None),
    (
        over_chat,
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get"}}]},
        },
        "auto",
        ["get"],
    ),
    (over_responses, "required", "required", None),
    (over_responses, {"type": "function", "name": "get"}, "required", ["get"]),
    (over_responses, {"type": "custom", "name": "patch"}, "required", ["patch"]),
    (
        over_responses,
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get"}, {"type": "web_search"}],
        },
        "required",
        ["get"],
    ),
    (over_responses, {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, "none", None),
    (over_messages, {"type": "any"}, "any", None),
    (over_messages, {"type": "tool", "name": "get"}, "get", None),
    (over_messages, {"type": "none"}, "none", None),
]


@pytest.mark.parametrize(("read", "choice", "forced", "allowed"), CHOICES)
def test_a_choice_of_tools(read: Any, choice: Any, forced: str, allowed: list[str] | None) -> None:
    body = {over_chat: CHAT, over_responses: RESPONSES, over_messages: MESSAGES}[read]
    exchange = read({**body, "tool_choice": choice})
    given = exchange.body["tool_choice"]
    if isinstance(given, dict):
        given = given.get("name") or given.get("function", {}).get("name") or given["type"]
    assert given == forced
    names = [(tool.get("function") or tool)["name"] for tool in exchange.body["tools"]]
    assert names == (allowed or ["get", "patch"])
    assert prompt(exchange) == prompt(read(body)), "the prompt has all tools"


def test_tools_that_may_not_be_called_can_be_hidden() -> None:
    hides = Server(hides_unused_tools=True)
    for read, body, none in (
        (over_chat, CHAT, "none"),
        (over_responses, RESPONSES, "none"),
        (over_messages, MESSAGES, {"type": "none"}),
    ):
        assert "<functions>" in prompt(read({**body, "tool_choice": none}))
        assert "<functions>" not in prompt(read({**body, "tool_choice": none}, hides))
        assert "<functions>" in prompt(read(body, hides))


@pytest.mark.parametrize(
    ("read", "choice"),
    [
        (over_chat, {"type": "function", "function": {"name": "nope"}}),
        (over_chat, {"type": "web_search"}),
        (over_responses, {"type": "web_search"}),
        (over_responses, {"type": "mcp", "server_label": "x"}),
        (over_responses, {"type": "function", "name": "nope"}),
        (over_responses, {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "nope"}]}),
        (over_responses, {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]}),
        (over_messages, {"type": "tool", "name": "web_search"}),
        (over_messages, {"type": "tool", "name": "nope"}),
    ],
)
def test_a_choice_of_what_is_not_in_effect_is_refused(read: Any, choice: Any) -> None:
    body = {over_chat: CHAT, over_responses: RESPONSES, over_messages: MESSAGES}[read]
    with pytest.raises(Refusal, match=r"tool_choice: .*the tools in effect are get, patch"):
        read({**body, "tool_choice": choice})


@pytest.mark.parametrize(
    ("read", "body", "tool", "choice"),
    [
        (over_chat, CHAT, {"type": "web_search"}, "required"),
        (over_responses, RESPONSES, {"type": "web_search"}, "required"),
        (over_messages, MESSAGES, {"type": "web_search_20250305", "name": "web_search"}, {"type": "any"}),
    ],
)
def test_a_required_call_needs_a_tool(read: Any, body: Any, tool: Any, choice: Any) -> None:
    with pytest.raises(Refusal, match="no tool is in effect"):
        read({**body, "tools": [tool], "tool_choice": choice})
    left = read({**body, "tools": [tool], "tool_choice": None})
    assert "tools" not in left.body
    assert "tool_choice" not in left.body
