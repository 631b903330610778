"""Chats with the real `vllm serve`: our prompt, our parsers, through the openai client.

The model is random, so what it says is forced with structured outputs; what the server makes of it is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
import openai
from chats import (
    BAD_MESSAGES,
    BOUNDED_WEATHER,
    CITY,
    CONVERSATION,
    USER,
    WEATHER,
    arguments,
    assert_bounded_call,
    content_of,
    dsml,
    exactly,
    first_call,
    refused,
    tokens_of,
)
from goldens import read_golden

from dsv32_plugin.parsers import encode_messages
from dsv32_plugin.serving import VllmServer
from dsv32_plugin.tiny import TinySpec

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 300
OPTIONS = [
    "--served-model-name", "tiny",
    "--dtype", "float32",
    "--max-model-len", "4096",
    "--kv-cache-memory-bytes", "268435456",
    "--enable-auto-tool-choice",
    "--tool-call-parser", "dsv32",
    "--reasoning-parser", "dsv32",
    # Its default lets the first request choose a backend that then refuses another request's kind of grammar.
    "--structured-outputs-config.backend", "xgrammar",
    # The grammar below spells the reasoning too.
    "--structured-outputs-config.enable_in_reasoning", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def url(checkpoint: Callable[[TinySpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("chat") / "server.log"
    with VllmServer(checkpoint(TinySpec()), OPTIONS, log_path=log_path) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        yield server.url
        server.check_running()


@pytest.fixture(scope="module")
def chat(url: str) -> Callable[..., Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)

    def create(says: str | None = None, thinking: bool = False, **options: Any) -> Any:
        extra: dict[str, Any] = {"chat_template_kwargs": {"thinking": thinking}}
        if says is not None:
            extra["structured_outputs"] = {"grammar": exactly(says)}
        body = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 400, "extra_body": extra, **options}
        return client.chat.completions.create(**body)

    return create


def test_a_streamed_call_arrives_in_pieces(chat: Callable[..., Any]) -> None:
    pieces, names, finish = [], [], None
    for chunk in chat(dsml((CITY, 3)), tools=[WEATHER], stream=True):
        delta = chunk.choices[0].delta
        finish = chunk.choices[0].finish_reason or finish
        assert not delta.content
        for call in delta.tool_calls or []:
            names += [call.function.name] if call.function.name else []
            pieces += [call.function.arguments] if call.function.arguments else []
    assert names == ["get_weather"]
    assert json.loads("".join(pieces)) == {"city": CITY, "days": 3}
    assert len(pieces) > 8, "the city alone is more than eight tokens: they are passed on as they come"
    assert finish == "tool_calls"


def test_streamed_reasoning_and_content_are_apart(chat: Callable[..., Any]) -> None:
    reasoning, content = "", ""
    for chunk in chat("I look <b>up</b> the lake.</think>It is sunny.", thinking=True, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning", None) or ""
        content += delta.content or ""
    assert (reasoning, content) == ("I look <b>up</b> the lake.", "It is sunny.")


def test_reasoning_content_and_two_parallel_calls(chat: Callable[..., Any]) -> None:
    text = "Two cities.</think>I ask." + dsml(("Hangzhou", 1), ("Paris", 2))
    choice = chat(text, thinking=True, tools=[WEATHER]).choices[0]
    assert choice.message.reasoning == "Two cities."
    assert choice.message.content == "I ask."
    assert [arguments(call) for call in choice.message.tool_calls] == [
        {"city": "Hangzhou", "days": 1},
        {"city": "Paris", "days": 2},
    ]
    assert choice.finish_reason == "tool_calls"


def test_streamed_reasoning_then_two_parallel_calls(chat: Callable[..., Any]) -> None:
    reasoning, calls = "", {}
    text = "Two.</think>" + dsml(("Hangzhou", 1), ("Paris", 2))
    for chunk in chat(text, thinking=True, tools=[WEATHER], stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning", None) or ""
        for call in delta.tool_calls or []:
            calls[call.index] = calls.get(call.index, "") + (call.function.arguments or "")
    assert reasoning == "Two."
    assert [json.loads(calls[index])["city"] for index in (0, 1)] == ["Hangzhou", "Paris"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_a_forced_call_is_made_in_dsml(chat: Callable[..., Any], choice: Any, stream: bool) -> None:
    answer = chat(tools=[BOUNDED_WEATHER], tool_choice=choice, stream=stream)
    if stream:
        name, made = first_call(answer)
    else:
        call = answer.choices[0].message.tool_calls[0]
        name, made = call.function.name, arguments(call)
    assert_bounded_call(name, made)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_tool_choice_none_keeps_the_markup_as_content(chat: Callable[..., Any], stream: bool) -> None:
    text = "See:" + dsml(("Paris", 1))
    answer = chat(text, tools=[WEATHER], tool_choice="none", stream=stream)
    assert content_of(answer, stream) == text


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
def test_the_prompt_of_a_conversation_with_results_is_official(url: str, thinking: bool) -> None:
    mode = "thinking" if thinking else "chat"
    official = encode_messages(CONVERSATION, tools=[WEATHER], thinking_mode=mode)
    assert official.index("<result>sun") < official.index("<result>rain")
    kwargs = {"thinking": thinking}
    served = tokens_of(url, messages=CONVERSATION, tools=[WEATHER], chat_template_kwargs=kwargs)
    assert served == tokens_of(url, prompt=official, add_special_tokens=False)


def test_the_official_case(url: str) -> None:
    messages, tools, official = read_golden("")
    served = tokens_of(url, messages=messages, tools=tools, chat_template_kwargs={"enable_thinking": True})
    assert served == tokens_of(url, prompt=official, add_special_tokens=False)


@pytest.mark.parametrize(("messages", "says"), BAD_MESSAGES)
def test_bad_messages_are_a_400_with_our_reason(url: str, messages: list[Any], says: str) -> None:
    assert says in refused(url, messages)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"prompt": []}, id="no-prompt"),
        pytest.param({"prompt": ""}, id="empty-prompt"),
        pytest.param({"prompt": [999_999_999]}, id="unknown-token"),
        pytest.param({"prompt": [5] * 4097}, id="longer-than-the-context"),
    ],
)
def test_a_bad_prompt_is_a_400_and_the_server_goes_on(url: str, body: dict[str, Any]) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "max_tokens": 1, **body}, timeout=60)
    assert response.status_code == httpx.codes.BAD_REQUEST
    assert httpx.get(f"{url}/health", timeout=60).status_code == httpx.codes.OK


def test_the_responses_endpoint_returns_the_call(url: str) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    body = {
        "model": "tiny",
        "input": "Weather?",
        "tools": [tool],
        "max_output_tokens": 400,
        "temperature": 0,
        "structured_outputs": {"grammar": exactly(dsml(("Paris", 2)))},
    }
    response = httpx.post(f"{url}/v1/responses", json=body, timeout=300)
    assert response.status_code == httpx.codes.OK, response.text
    calls = [item for item in response.json()["output"] if item["type"] == "function_call"]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("get_weather", {"city": "Paris", "days": 2})
    ]


def test_the_anthropic_endpoint_forces_the_call(url: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Hangzhou", "Paris"]}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    }
    body = {
        "model": "tiny",
        "messages": USER,
        "max_tokens": 400,
        "temperature": 0,
        "tools": [{"name": "get_weather", "description": "The weather.", "input_schema": schema}],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    response = httpx.post(f"{url}/v1/messages", json=body, timeout=300)
    assert response.status_code == httpx.codes.OK, response.text
    call = next(block for block in response.json()["content"] if block["type"] == "tool_use")
    assert call["name"] == "get_weather"
    assert call["input"]["city"] in ("Hangzhou", "Paris")
