"""What a client got wrong: a refusal names the field and its place; nothing is ignored in silence."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dsv32_plugin import apis
from dsv32_plugin.apis import Refusal, anthropic, chat, responses, tools
from dsv32_plugin.apis.exchange import Exchange, Server

USER = {"role": "user", "content": "hi"}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {}}
GET = {"name": "get", "parameters": SCHEMA}


def over_chat(**body: Any) -> Exchange:
    return chat.read({"messages": [USER], **body}, Server())


def over_messages(**body: Any) -> Exchange:
    return anthropic.read({"messages": [USER], **body}, Server())


def over_responses(**body: Any) -> Exchange:
    return responses.read({"input": "hi", **body}, Server(), responses.Store())


def refusal(read: Any, **body: Any) -> str:
    """What the client is told, by the reader or by the encoder."""
    try:
        exchange = read(**body)
    except Refusal as refused:
        return str(refused)
    with pytest.raises(ValueError, match=": "):
        apis.rendered(exchange.conversation, [], exchange.body["chat_template_kwargs"], "v3.2", len)
    said = exchange.conversation.refusal
    assert said is not None
    return said


def calls(*ids: str | None) -> dict[str, Any]:
    made = [{"id": id, "type": "function", "function": {"name": "get", "arguments": "{}"}} for id in ids]
    return {"role": "assistant", "tool_calls": made}


def result(id: str | None) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": "ok"}


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([calls("a", "b"), result("a"), result("a")], r"messages[3]: tool_call_id: a second result of the call 'a'"),
        ([calls("a", "b"), result("a"), result("x")], r"messages[3]: tool_call_id: expected that of a call"),
        ([calls("a"), result("x")], r"messages[2]: tool_call_id: expected that of a call of"),
        ([calls("a"), result("a"), calls("b"), result("a")], r"messages[4]: tool_call_id: expected that of"),
    ],
)
def test_results_belong_to_calls(turns: Any, says: str) -> None:
    assert refusal(over_chat, messages=[USER, *turns]).startswith(says)


@pytest.mark.parametrize(
    "turns",
    [
        [calls("a", "a"), result("a"), result("a")],
        [calls(None, "b"), result("b"), result("x")],
        [calls("a", "b"), result(None), result("a")],
        [calls("a"), result(None)],
    ],
)
def test_results_without_a_call_of_their_id_take_those_without_one(turns: Any) -> None:
    exchange = over_chat(messages=[USER, *turns])
    apis.rendered(exchange.conversation, [], exchange.body["chat_template_kwargs"], "v3.2", len)


def test_results_of_anthropics_calls_too() -> None:
    use = {"type": "tool_use", "id": "a", "name": "get", "input": {}}
    twice = [{"type": "tool_result", "tool_use_id": id, "content": "ok"} for id in ("a", "x")]
    told = refusal(
        over_messages,
        messages=[
            USER,
            {"role": "assistant", "content": [use, {**use, "id": "b"}]},
            {"role": "user", "content": twice},
        ],
    )
    assert told.startswith("messages[2].content[1]: tool_call_id: expected that of a call of")


def given_up(arguments: str) -> list[tuple[Any, dict[str, Any]]]:
    """A conversation that goes on after two calls without results, as each API has it; these are the second's."""
    first, second = ({"type": "function_call", "call_id": id, "name": "get", "arguments": "{}"} for id in "ab")
    turn = calls("a", "b")
    turn["tool_calls"][1]["function"]["arguments"] = second["arguments"] = arguments
    uses = [{"type": "tool_use", "id": id, "name": "get", "input": {}} for id in "ab"]
    return [
        (over_chat, {"messages": [USER, turn, USER]}),
        (over_responses, {"input": [USER, first, second, USER]}),
        (over_messages, {"messages": [USER, {"role": "assistant", "content": uses}, USER]}),
    ]


@pytest.mark.parametrize("api", range(3), ids=["chat", "responses", "messages"])
def test_calls_without_results_cannot_be_gone_on_from(api: int) -> None:
    """As with OpenAI's, Anthropic's and DeepSeek's servers: the model read an answer that never came."""
    read, body = given_up("{}")[api]
    place = ("messages[2]", "input[3]", "messages[2]")[api]
    told = refusal(read, **body)
    assert told.startswith(f"{place}: comes before all results: 0 of 2 tool calls have one, and the call 'a' has none")


def test_a_turn_that_was_stopped_in_a_call_can() -> None:
    """No client runs its calls, and none would ever be rid of a refusal."""
    for read, body in given_up('{"x": "y')[:2]:
        exchange = read(**body)
        apis.rendered(exchange.conversation, [], exchange.body["chat_template_kwargs"], "v3.2", len)


@pytest.mark.parametrize(
    ("read", "body", "says"),
    [
        (over_chat, {"messages": []}, "messages: expected at least one"),
        (over_messages, {"messages": []}, "messages: expected a list of at least one"),
        (over_responses, {"input": []}, "input: expected text or a list of items, got none"),
        (over_responses, {"input": None}, "input: expected text or a list of items, got none"),
    ],
)
def test_a_request_says_something(read: Any, body: Any, says: str) -> None:
    assert says in refusal(read, **body)


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (over_chat, {"functions": [GET]}),
        (over_chat, {"function_call": "auto"}),
        (over_chat, {"reasoning": {"effort": "high"}}),
        (over_chat, {"enable_thinking": False}),
        (over_chat, {"system": "Be brief."}),
        (over_chat, {"audio": {"voice": "x", "format": "wav"}}),
        (over_chat, {"max_output_tokens": 5}),
        (over_responses, {"system": "Be brief."}),
        (over_responses, {"max_tokens": 5}),
        (over_messages, {"instructions": "Be brief."}),
        (over_responses, {"conversation": "conv_1"}),
        (over_responses, {"conversation": {"id": "conv_1"}}),
        (over_responses, {"prompt": {"id": "pmpt_1"}}),
        (over_responses, {"reasoning_effort": "high"}),
        (over_responses, {"response_format": {"type": "json_object"}}),
        (over_messages, {"reasoning_effort": "high"}),
        (over_messages, {"response_format": {"type": "json_object"}}),
    ],
)
def test_a_field_that_nobody_would_read_is_refused(read: Any, body: Any) -> None:
    (name,) = body
    assert refusal(read, **body).startswith(f"{name}: not a field of this API as it is served here; send ")
    read(**dict.fromkeys(body))


def test_what_anthropics_server_would_run_is_left_out_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "_warned", set())
    servers = [{"type": "url", "url": "https://x", "name": "x"}]
    with caplog.at_level(logging.WARNING):
        body = over_messages(mcp_servers=servers, container="container_1").body
    assert not {"mcp_servers", "container"} & set(body)
    assert [message.split()[1] for message in caplog.messages] == ["mcp_servers", "container"]


ANY = {"type": "object", "properties": {"x": {"type": "string"}}}


@pytest.mark.parametrize(
    ("read", "tool", "says"),
    [
        (
            over_chat,
            {"type": "Function", "function": GET},
            "tools[0].type: expected function or custom, got 'Function'",
        ),
        (over_chat, {"type": "func", **GET}, "tools[0].type: expected function or custom, got 'func'"),
        (over_chat, {"type": 5, "function": GET}, "tools[0].type: expected text, got int"),
        (over_chat, {"name": "get", "input_schema": SCHEMA}, "tools[0]: expected parameters, got an input_schema"),
        (over_responses, {"type": "Function", **GET}, "tools[0].type: expected function or custom, got 'Function'"),
        (over_responses, {"type": ["function"], **GET}, "tools[0].type: expected text, got list"),
        (over_messages, {"type": "function", "function": GET}, "tools[0].type: expected custom, or none, got 'functio"),
        (over_messages, {"type": "Custom", "name": "get"}, "tools[0].type: expected custom, or none, got 'Custom'"),
        (
            over_messages,
            {"type": "tool", "name": "get", "input_schema": ANY},
            "tools[0].type: expected custom, or none",
        ),
    ],
)
def test_a_tool_of_the_clients_with_a_wrong_type_is_no_hosted_one(read: Any, tool: Any, says: str) -> None:
    assert refusal(read, tools=[tool]).startswith(says)


@pytest.mark.parametrize("read", [over_chat, over_responses])
def test_a_tool_without_a_type_is_a_function(read: Any) -> None:
    assert [function["name"] for function in read(tools=[{"type": None, **GET}]).conversation.tools] == ["get"]


@pytest.mark.parametrize(
    ("read", "tool"),
    [
        (over_chat, {"type": "function", "function": GET}),
        (over_responses, {"type": "function", **GET}),
        (over_responses, {"type": "local_shell"}),
        (over_messages, {"name": "get", "input_schema": SCHEMA}),
        (over_messages, {"type": "bash_20250124", "name": "bash"}),
    ],
)
def test_names_of_tools_are_their_own(read: Any, tool: Any) -> None:
    assert refusal(read, tools=[tool, tool]).startswith("tools[1]: expected a name of its own, ")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            {"function_call": {"name": "get", "arguments": "{}"}},
            "function_call: expected none; a call is one of tool_c",
        ),
        ({"content": "He", "prefix": "false"}, "prefix: expected true or false, got 'false'"),
        (
            {"tool_calls": [{"id": "a", "type": "custom", "custom": {"name": "get", "input": {"x": 1}}}]},
            "tool_calls[0]: custom.input: expected text, got dict",
        ),
        (
            {"tool_calls": [{"id": "a", "function": {"name": "get", "arguments": '{"x": 1} and on'}}]},
            "tool_calls[0] (get): arguments are not JSON: Extra data: line 1 column 10 (char 9)",
        ),
        ({"content": [{"type": {}, "text": "x"}]}, "content part 0: type: expected text, got dict"),
    ],
)
def test_a_past_message_is_read_or_refused(message: Any, says: str) -> None:
    assert refusal(over_chat, messages=[USER, {"role": "assistant", **message}]).startswith(f"messages[1]: {says}")


def test_only_an_assistants_message_goes_on() -> None:
    told = refusal(over_chat, messages=[{**USER, "prefix": True}])
    assert told.startswith("messages[0]: prefix: expected an assistant's message")


FORMAT = {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize("body", [{"output_config": {"format": FORMAT, "effort": "high"}}, {"output_format": FORMAT}])
def test_the_format_of_an_answer_reaches_the_engine(body: Any) -> None:
    exchange = over_messages(**body)
    assert exchange.body["output_config"] == {"format": FORMAT}
    assert "output_format" not in exchange.body
    assert exchange.conversation.answer_format == FORMAT


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"output_config": "json"}, "output_config: expected an object, got str"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format: expected {"),
        ({"output_format": {"type": "json_schema"}}, "output_format: expected {"),
    ],
)
def test_what_is_no_format_is_refused(body: Any, says: str) -> None:
    assert refusal(over_messages, **body).startswith(says)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"type": "text", "text": 5}, "messages[0].content[0]: text: expected text, got int"),
        ({"type": ["text"]}, "messages[0].content[0]: type: expected text, got list"),
        ({"type": "image", "source": {}}, "messages[0].content[0] is 'image'; the model reads text only"),
    ],
)
def test_a_block_is_read_or_refused(block: Any, says: str) -> None:
    assert refusal(over_messages, messages=[{"role": "user", "content": [block]}]) == says


def test_a_document_may_begin_with_a_bracket() -> None:
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "[1] One"}}
    exchange = over_messages(messages=[{"role": "user", "content": [document]}])
    assert exchange.conversation.messages == [{"role": "user", "content": "[1] One"}]


@pytest.mark.parametrize("blocks", [[], [{"type": "redacted_thinking", "data": "x"}]])
def test_an_assistants_turn_without_text_is_a_turn(blocks: Any) -> None:
    exchange = over_messages(messages=[USER, {"role": "assistant", "content": blocks}, USER])
    assert [message["role"] for message in exchange.conversation.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"type": "custom_tool_call", "call_id": "a", "name": "get", "input": 5}, ".input: expected text, got int"),
        ({"type": "function_call", "call_id": "a", "name": 5}, ".name: expected the name of a tool, got 5"),
        ({"type": "function_call", "call_id": "a", "name": "f", "namespace": 5}, ".namespace: expected text, got int"),
        ({"type": ["message"], "role": "user"}, ".type: expected text, got list"),
    ],
)
def test_a_past_item_is_read_or_refused(item: Any, says: str) -> None:
    assert refusal(over_responses, input=[USER, item]).startswith(f"input[1]{says}")


def test_a_refusal_of_the_models_is_said_beside_empty_content() -> None:
    messages = [USER, {"role": "assistant", "content": "", "refusal": "I can't."}, USER]
    exchange = over_chat(messages=messages)
    assert "I can't." in str(apis.rendered(exchange.conversation, [], {}, "v3.2", len))


@pytest.mark.parametrize(
    ("read", "choice", "says"),
    [
        (over_chat, {"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": []}}, "mode: expected auto or"),
        (over_chat, {"type": "allowed_tools", "allowed_tools": {"tools": 5}}, "allowed_tools.tools: expected a list,"),
        (over_chat, {"type": "allowed_tools", "allowed_tools": {"tools": ["x"]}}, "allowed_tools.tools[0]: expected"),
        (
            over_responses,
            {"type": "allowed_tools", "mode": "sometimes", "tools": []},
            "mode: expected auto or required",
        ),
        (over_responses, {"type": "function", "name": {}}, "expected a tool with a name or a type"),
    ],
)
def test_a_choice_is_one_of_those_known(read: Any, choice: Any, says: str) -> None:
    assert says in refusal(read, tools=[{"type": "function", **GET}], tool_choice=choice)


@pytest.mark.parametrize("name", ["continue_final_message", "add_generation_prompt"])
def test_a_switch_is_true_or_false(name: str) -> None:
    assert refusal(over_chat, **{name: "false"}) == f"{name}: expected true or false, got 'false'"
