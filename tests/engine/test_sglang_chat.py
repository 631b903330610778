"""Chats with the real SGLang server: our prompt, our parsers, through the openai client.

The model is random, so what it says is forced with grammars; what the server makes of it is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

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
from dsv32_plugin.serving import SglangServer
from dsv32_plugin.tiny import TinySpec

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 600
OPTIONS = [
    "--served-model-name", "tiny",
    "--dtype", "float32",
    "--context-length", "4096",
    "--tool-call-parser", "dsv32",
    "--reasoning-parser", "dsv32",
    "--skip-server-warmup",
]  # fmt: skip
THINK_END_ID = 128799
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def url(checkpoint: Callable[[TinySpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("chat") / "server.log"
    with SglangServer(checkpoint(TinySpec()), OPTIONS, log_path=log_path) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        yield server.url
        server.check_running()


@pytest.fixture(scope="module")
def chat(url: str) -> Callable[..., Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)

    def create(says: str | None = None, thinking: bool = False, **options: Any) -> Any:
        extra: dict[str, Any] = {"chat_template_kwargs": {"thinking": thinking}}
        if says is not None:
            extra["ebnf"] = exactly(says)
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


# SGLang lets a grammar begin after the reasoning only, so these thoughts are the random model's own.
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_unfinished_reasoning_is_all_reasoning(chat: Callable[..., Any], stream: bool) -> None:
    answer = chat(thinking=True, max_tokens=8, stream=stream)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        reasoning = "".join(delta.reasoning_content or "" for delta in deltas)
        assert not any(delta.content for delta in deltas)
    else:
        reasoning = answer.choices[0].message.reasoning_content
        assert not answer.choices[0].message.content
    assert len(reasoning) >= 8


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_after_the_reasoning(chat: Callable[..., Any], stream: bool) -> None:
    text = "I ask." + dsml(("Paris", 2))
    close = {str(THINK_END_ID): 100}
    answer = chat(text, thinking=True, tools=[WEATHER], logit_bias=close, stream=stream)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        content = "".join(delta.content or "" for delta in deltas)
        made = "".join(call.function.arguments or "" for delta in deltas for call in delta.tool_calls or [])
    else:
        content = answer.choices[0].message.content
        made = answer.choices[0].message.tool_calls[0].function.arguments
    assert content == "I ask."
    assert json.loads(made) == {"city": "Paris", "days": 2}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_looks_like_markup_at_the_end_is_not_lost(chat: Callable[..., Any], stream: bool) -> None:
    text = "Compare a <"
    answer = chat(text, tools=[WEATHER], stream=stream)
    if stream:
        content = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        content = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    assert content == text


def test_content_and_two_parallel_calls(chat: Callable[..., Any]) -> None:
    choice = chat("I ask." + dsml(("Hangzhou", 1), ("Paris", 2)), tools=[WEATHER]).choices[0]
    assert choice.message.content == "I ask."
    assert [arguments(call) for call in choice.message.tool_calls] == [
        {"city": "Hangzhou", "days": 1},
        {"city": "Paris", "days": 2},
    ]
    assert choice.finish_reason == "tool_calls"


def test_two_streamed_parallel_calls(chat: Callable[..., Any]) -> None:
    calls: dict[int, str] = {}
    for chunk in chat(dsml(("Hangzhou", 1), ("Paris", 2)), tools=[WEATHER], stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            calls[call.index] = calls.get(call.index, "") + (call.function.arguments or "")
    assert [json.loads(calls[index])["city"] for index in (0, 1)] == ["Hangzhou", "Paris"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_is_made_in_dsml(chat: Callable[..., Any], choice: Any, stream: bool) -> None:
    answer = chat(tools=[BOUNDED_WEATHER], tool_choice=choice, stream=stream, parallel_tool_calls=False)
    if stream:
        name, made = first_call(answer)
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, made = call.function.name, arguments(call)
    assert_bounded_call(name, made)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_tool_choice_none_keeps_the_markup_as_content(chat: Callable[..., Any], stream: bool) -> None:
    text = "See:" + dsml(("Paris", 1))
    answer = chat(text, tools=[WEATHER], tool_choice="none", stream=stream)
    assert content_of(answer, stream) == text


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
def test_the_prompt_of_a_conversation_with_results_is_official(url: str, thinking: bool) -> None:
    official = encode_messages(CONVERSATION, tools=[WEATHER], thinking_mode="thinking" if thinking else "chat")
    kwargs = {"thinking": thinking}
    served = tokens_of(url, messages=CONVERSATION, tools=[WEATHER], chat_template_kwargs=kwargs)
    assert served == tokens_of(url, prompt=official, add_special_tokens=False)


def test_the_official_case(url: str) -> None:
    messages, tools, official = read_golden("")
    served = tokens_of(url, messages=messages, tools=tools, chat_template_kwargs={"enable_thinking": True})
    assert served == tokens_of(url, prompt=official, add_special_tokens=False)


@pytest.mark.parametrize(("messages", "says"), BAD_MESSAGES)
def test_bad_messages_are_a_400_with_our_reason(url: str, messages: list[Any], says: str) -> None:
    message = refused(url, messages)["message"]
    # 0.5.23 looks at the kinds of content itself, and first.
    assert says in message or "unsupported content type 'image_url'" in message


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"input_ids": []}, id="no-prompt"),
        pytest.param({"input_ids": [5] * 4097}, id="longer-than-the-context"),
    ],
)
def test_a_bad_prompt_is_a_400_and_the_server_goes_on(url: str, body: dict[str, Any]) -> None:
    response = httpx.post(f"{url}/generate", json={"sampling_params": {"max_new_tokens": 1}, **body}, timeout=60)
    assert response.status_code == httpx.codes.BAD_REQUEST
    assert httpx.get(f"{url}/health", timeout=60).status_code == httpx.codes.OK
