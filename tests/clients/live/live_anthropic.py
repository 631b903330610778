"""The Anthropic SDK: messages, streamed and whole, its tool runner, and counts."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from asks import ADD, CUT, CUT_AT, FUNCTIONS, PARALLEL, SAID, SAY, SUM, SUMS, THOUGHTS

TOOLS: Any = [
    {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
    for function in FUNCTIONS
]
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def client(proxy):
    return anthropic.Anthropic(base_url=proxy.url, api_key="none", timeout=120)


def message_of(client, stream: bool, **body: Any):
    body = {"model": "tiny", "max_tokens": 2000, "tools": TOOLS, **body}
    if not stream:
        return client.messages.create(**body)
    with client.messages.stream(**body) as events:
        for _ in events:
            pass
        return events.get_final_message()


def text_in(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def thinking_in(message) -> str:
    return "".join(block.thinking for block in message.content if block.type == "thinking")


@pytest.mark.recorded
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("ask", "sums"), [(ADD, SUMS[:1]), (PARALLEL, SUMS)], ids=["one", "parallel"])
def test_loop(client, tools, stream, ask, sums) -> None:
    messages: list[Any] = [{"role": "user", "content": ask}]
    message = message_of(client, stream, messages=messages, thinking=THINKING)
    assert message.stop_reason == "tool_use"
    assert thinking_in(message) == THOUGHTS
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": getattr(tools, block.name)(**block.input)}
        for block in message.content
        if block.type == "tool_use"
    ]
    assert tools.added == sums
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    message = message_of(client, stream, messages=messages, thinking=THINKING)
    assert text_in(message).startswith("The tool said: The sum is")
    assert thinking_in(message) == THOUGHTS
    assert message.stop_reason == "end_turn"


@pytest.mark.recorded
def test_tool_runner(client, tools) -> None:
    """By default the runner lets the server hold the conversation; ours holds none."""

    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """The sum of two integers."""
        return tools.add(a, b)

    runner = client.beta.messages.tool_runner(
        model="tiny", max_tokens=400, tools=[add], messages=[{"role": "user", "content": ADD}]
    )
    message = runner.until_done()
    assert tools.added == [(2, 3)]
    assert text_in(message) == SUM


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_cut_call_is_no_call(client, stream) -> None:
    message = message_of(client, stream, messages=[{"role": "user", "content": CUT}], max_tokens=CUT_AT)
    assert message.stop_reason == "max_tokens"
    # The SDK hands out what it can read of a cut call: that it was cut, the reason alone tells.


def test_prefill_is_continued(client) -> None:
    messages: Any = [{"role": "user", "content": SAY}, {"role": "assistant", "content": "So:"}]
    assert SAID in text_in(message_of(client, False, messages=messages))


def test_count_tokens_agrees(client) -> None:
    messages: Any = [{"role": "user", "content": SAY}]
    counted = client.messages.count_tokens(model="tiny", messages=messages, tools=TOOLS).input_tokens
    assert counted == message_of(client, False, messages=messages).usage.input_tokens


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"messages": [{"role": "user", "content": "word " * 60_000}]}, id="too-long"),
        pytest.param({"extra_body": {"top_p": -1}}, id="top-p"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "1"}]}]},
            id="result-without-call",
        ),
    ],
)
def test_refusal_and_on(client, proxy, wrong) -> None:
    messages: Any = [{"role": "user", "content": SAY}]
    with pytest.raises(anthropic.BadRequestError) as refusal:
        message_of(client, False, **{"messages": messages, **wrong})
    assert refusal.value.body["error"]["type"] == "invalid_request_error"
    assert proxy.statuses() == [400], "refused once, not tried again"
    assert text_in(message_of(client, False, messages=messages)) == SAID


@pytest.mark.recorded
def test_an_image_in_a_result_ends_nothing(client) -> None:
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": pixel}}
    messages: Any = [
        {"role": "user", "content": ADD},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2, "b": 3}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [image]}]},
    ]
    assert text_in(message_of(client, False, messages=messages)).startswith("The tool said:")
