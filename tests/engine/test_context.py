"""Conversations that outgrow the context, with the real server of the installed engine and the real SDKs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import long_conversations as long
import openai
import pytest
from anthropic.types.beta import BetaMessage, BetaMessageTokensCount
from chats import CHAT_ENGINES, tokens_of
from engines import VLLM, installed
from openai.types.responses import Response

from dsv32_plugin.tools.tiny import TinySpec

CONTEXT = 4096
DEFAULT_TRIGGER = int(0.8 * CONTEXT)
OPTIONS = (
    *CHAT_ENGINES[installed().name].options,
    *("--tool-call-parser", "dsv32", "--reasoning-parser", "dsv32"),
    *(() if installed() is VLLM else ("--enable-cache-report",)),
)
TRIGGER = 1500
CLEAR = {"type": "clear_tool_uses_20250919", "trigger": {"type": "input_tokens", "value": TRIGGER}}

pytestmark = pytest.mark.engine
STEPS = 40


@pytest.fixture(scope="module")
def url(checkpoint: Callable[[TinySpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("context") / "server.log"
    env = {"DSV32_CONTEXT": "discard-75"}
    with installed().serve(checkpoint(TinySpec()), log_path, *OPTIONS, env=env) as url:
        yield url


@pytest.fixture(scope="module")
def chats(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", timeout=300, max_retries=0)


def discarding(strategy: str, **options: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": {"context": {"strategy": strategy, **options}}}


def prompt_tokens_of(message: BetaMessage) -> int:
    usage = message.usage
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


@pytest.mark.parametrize("strategy", ["discard-all", "discard-75", "keep-last-n"])
def test_a_chat_as_long_as_it_likes(url: str, chats: openai.OpenAI, strategy: str) -> None:
    extra = discarding(strategy, trigger_tokens=TRIGGER)
    body = long.chat(STEPS)
    raw = chats.chat.completions.with_raw_response.create(max_tokens=4, extra_body=extra, **body)
    usage = raw.parse().usage
    assert usage is not None
    report = usage.context_management  # type: ignore[attr-defined]
    (edit,) = report["applied_edits"]
    assert edit["type"] == strategy
    assert usage.prompt_tokens == len(tokens_of(url, **body, **extra))
    assert usage.prompt_tokens + edit["cleared_input_tokens"] == report["original_input_tokens"] > CONTEXT
    if strategy != "keep-last-n":
        assert usage.prompt_tokens <= TRIGGER
    assert json.loads(raw.headers["x-dsv32-context"]) == report
    stream = chats.chat.completions.create(
        max_tokens=4, extra_body=extra, stream=True, stream_options={"include_usage": True}, **body
    )
    assert list(stream)[-1].usage.context_management == report


def test_messages_are_cleared_and_counted(claude: anthropic.Anthropic) -> None:
    body = {**long.messages(STEPS), "context_management": {"edits": [{**CLEAR, "clear_tool_inputs": True}]}}
    message = claude.beta.messages.create(max_tokens=4, **body)
    counted = claude.beta.messages.count_tokens(**body)
    with claude.beta.messages.stream(max_tokens=4, **body) as stream:
        streamed = stream.get_final_message()
    BetaMessage.model_validate(message.model_dump())
    BetaMessageTokensCount.model_validate(counted.model_dump())
    (edit,) = message.context_management.applied_edits
    assert STEPS - 8 <= edit.cleared_tool_uses <= STEPS - 3
    assert counted.input_tokens == prompt_tokens_of(message)
    assert counted.context_management.original_input_tokens == counted.input_tokens + edit.cleared_input_tokens
    assert streamed.context_management == message.context_management


def test_responses_are_truncated(chats: openai.OpenAI) -> None:
    body = long.responses(STEPS)
    response = chats.responses.create(truncation="auto", max_output_tokens=16, **body)
    Response.model_validate(response.model_dump())
    assert response.truncation == "auto"
    assert response.usage.input_tokens <= CONTEXT - 16
    (edit,) = response.usage.context_management["applied_edits"]
    assert edit["type"] == "truncation"
    stream = chats.responses.create(truncation="auto", max_output_tokens=16, stream=True, **body)
    done = list(stream)[-1].response
    assert done.usage.context_management == response.usage.context_management


def test_the_servers_default(chats: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    chat = chats.chat.completions.create(max_tokens=4, **long.chat(STEPS))
    response = chats.responses.create(max_output_tokens=16, **long.responses(STEPS))
    message = claude.messages.create(max_tokens=4, **long.messages(STEPS))
    assert chat.usage.prompt_tokens == response.usage.input_tokens == prompt_tokens_of(message) <= DEFAULT_TRIGGER
    assert chat.usage.context_management["applied_edits"][0]["type"] == "discard-75"


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_too_long_whatever_is_discarded(url: str, path: str, stream: bool) -> None:
    """Both numbers are named: how many there are, and how many there may be."""
    forms = {"chat/completions": long.chat(8), "responses": long.responses(8), "messages": long.messages(8)}
    body = {**forms[path], "stream": stream, **discarding("discard-all", trigger_tokens=2000)}
    last = body["input" if path == "responses" else "messages"][-1]
    if path == "messages":
        body["max_tokens"] = 4
        last["content"][0]["content"] = "a b c d " * 2000
    else:
        last["output" if path == "responses" else "content"] = "a b c d " * 2000
    answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=300)
    assert answer.status_code == httpx.codes.BAD_REQUEST, answer.text
    error = answer.json()
    reason = error.get("error", error)["message"]
    assert str(CONTEXT) in reason, reason
    numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in reason).split()]
    assert any(number > 8000 for number in numbers), reason


def test_a_trigger_above_the_context(url: str) -> None:
    body = {**long.chat(2), **discarding("discard-all", trigger_tokens=5000)}
    for path in ("v1/chat/completions", "tokenize"):
        answer = httpx.post(f"{url}/{path}", json=body, timeout=60)
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert "4096 tokens, got 5000 tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("strategy", ["discard-all", "discard-75", "keep-last-n"])
def test_between_discards_a_prompt_is_in_the_cache(chats: openai.OpenAI, strategy: str) -> None:
    """Turn by turn; a page of the cache is 64 tokens, on a CPU of vLLM's 128 at most."""
    extra = discarding(strategy, trigger_tokens=TRIGGER)
    before, discards, reused = 0, 0, 0
    read = from_cache = 0
    tool = f"look_{strategy.replace('-', '_')}"
    for steps in range(1, 31):
        body = long.chat(steps, tool)
        usage = chats.chat.completions.create(max_tokens=1, extra_body=extra, **body).usage
        edits = usage.context_management["applied_edits"]
        cleared = edits[0]["cleared_tool_uses"] if edits else 0
        cached = (usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens) or 0
        read, from_cache = read + usage.prompt_tokens, from_cache + cached
        if cleared != discards:
            discards = cleared
        elif before:
            reused += 1
            assert cached > before - 2 * 128, f"of {before} tokens of the turn before only {cached} are in the cache"
        before = usage.prompt_tokens
    print(f"{installed().name}, {strategy}: {from_cache} of {read} tokens from the cache, {from_cache / read:.0%}")
    assert discards
    assert reused > 8


def test_every_api_says_what_of_a_discarded_prompt_was_in_the_cache(
    chats: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    """The engine's own figures, of the second of two equal requests."""
    extra = discarding("discard-all", trigger_tokens=TRIGGER)
    for _ in range(2):
        chat = chats.chat.completions.create(max_tokens=1, extra_body=extra, **long.chat(25)).usage
        response = chats.responses.create(max_output_tokens=16, extra_body=extra, **long.responses(25)).usage
        message = claude.messages.create(max_tokens=1, extra_body=extra, **long.messages(25))
    assert chat.context_management["applied_edits"]
    cached = {
        "chat": chat.prompt_tokens_details.cached_tokens,
        "responses": response.input_tokens_details.cached_tokens,
        "messages": message.usage.cache_read_input_tokens,
    }
    print(f"{installed().name}: of {chat.prompt_tokens} tokens in the cache: {cached}")
    assert all((tokens or 0) > chat.prompt_tokens - 2 * 128 for tokens in cached.values()), cached
