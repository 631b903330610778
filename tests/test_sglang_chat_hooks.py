"""The chat hooks of the SGLang adapter without a server: every cut of a stream gives the same answer."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.entrypoints.openai import serving_chat
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.platforms import current_platform

from dsv32_plugin.parsers.protocol import THINK_END
from dsv32_plugin.sglang_adapter import PARSER_NAME, compat, parsers, registration, rendering, streaming

pytestmark = pytest.mark.engine

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="true">a < b</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)
# Text, whether it was asked to think, and what must come of it: reasoning, content, calls.
ANSWERS = [
    pytest.param("Plain <b>.", False, ("", "Plain <b>.", []), id="content"),
    pytest.param(f"I think.{THINK_END}So.", True, ("I think.", "So.", []), id="reasoning"),
    pytest.param("I think <", True, ("I think <", "", []), id="cut-off-reasoning"),
    pytest.param(f"Hm.{THINK_END}Ask:{CALL}", True, ("Hm.", "Ask:", ['{"x": "a < b"}']), id="reasoning-and-call"),
    pytest.param(f"Hm.{CALL}", True, ("Hm.", "", ['{"x": "a < b"}']), id="call-in-unclosed-reasoning"),
    pytest.param(CALL + CALL, False, ("", "", ['{"x": "a < b"}'] * 2), id="two-blocks"),
    pytest.param("It is a <", False, ("", "It is a <", []), id="what-looks-like-markup"),
    pytest.param(CALL[: CALL.index(" b<")], False, ("", "", ['{"x": "a <"}']), id="truncated-call"),
]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the plugin does in a server, undone after the test. Another test may have loaded it in this process."""
    registration._register_parsers()
    original = inspect.unwrap(OpenAIServingChat._get_reasoning_from_request)
    stream = inspect.unwrap(OpenAIServingChat._generate_stream_content)
    monkeypatch.setattr(
        OpenAIServingChat,
        "_get_reasoning_from_request",
        lambda self, request: rendering.reasoning_around(original, self, request),
    )
    if not compat.ends_streams():
        monkeypatch.setattr(
            OpenAIServingChat,
            "_generate_stream_content",
            lambda self, **step: streaming.generate_around(stream, self, **step),
        )
    # Where options are published, the endpoint asks them.
    published = SimpleNamespace(incremental_streaming_output=False, enable_cache_report=False)
    monkeypatch.setattr(serving_chat, "get_serving", lambda: published, raising=False)
    return


def make_serving() -> Any:
    """The parts of SGLang's chat endpoint that turn text into an answer."""
    serving: Any = object.__new__(OpenAIServingChat)
    server_args = SimpleNamespace(incremental_streaming_output=False, enable_cache_report=False)
    serving.tokenizer_manager = SimpleNamespace(tokenizer=None, server_args=server_args)
    serving.template_manager = SimpleNamespace(force_reasoning=False)
    serving.reasoning_parser = serving.tool_call_parser = PARSER_NAME
    serving._encoding_adapter = None
    return serving


def make_request(thinking: bool, **options: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "tools": [TOOL], **options}
    return ChatCompletionRequest(**body, chat_template_kwargs={"thinking": thinking})


def streamed(text: str, cuts: list[int], request: ChatCompletionRequest) -> tuple[str, str, list[str]]:
    """Reasoning, content and the arguments of each call in the chunks of one stream."""

    async def chunks() -> AsyncIterator[str]:
        serving, state = make_serving(), {name: {} for name in ("offsets", "reasoning", "calls", "has")}
        taken = inspect.signature(inspect.unwrap(OpenAIServingChat._generate_stream_content)).parameters
        created = {"created": 0} if "created" in taken else {}
        for end in cuts:
            content = {"text": text[:end], "meta_info": {"id": "1"}}
            async for chunk in serving._generate_stream_content(
                content=content,
                index=0,
                request=request,
                stream_offsets=state["offsets"],
                reasoning_parser_dict=state["reasoning"],
                parser_dict=state["calls"],
                has_tool_calls=state["has"],
                choice_logprobs=None,
                finish_reason_type="stop" if end == cuts[-1] else None,
                continuous_usage_stats=False,
                prompt_tokens={},
                reasoning_tokens={},
                completion_tokens={},
                **created,
            ):
                yield chunk

    async def collect() -> list[dict[str, Any]]:
        return [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] async for chunk in chunks()]

    deltas = asyncio.run(collect())
    calls: dict[int, str] = {}
    for delta in deltas:
        for call in delta.get("tool_calls") or []:
            calls[call["index"]] = calls.get(call["index"], "") + (call["function"]["arguments"] or "")
    reasoning = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    return reasoning, "".join(delta.get("content") or "" for delta in deltas), [calls[i] for i in sorted(calls)]


@pytest.mark.parametrize(("text", "thinking", "expected"), ANSWERS)
def test_every_cut_of_a_stream(text: str, thinking: bool, expected: tuple[str, str, list[str]]) -> None:
    request = make_request(thinking)
    everywhere = list(range(1, len(text) + 1))
    assert streamed(text, everywhere, request) == expected
    assert streamed(text, [len(text)], request) == expected
    for cut in everywhere[:-1]:
        assert streamed(text, [cut, len(text)], request) == expected, f"cut at {cut}"


def test_reasoning_can_be_said_at_once() -> None:
    text = f"I think.{THINK_END}So."
    everywhere = list(range(1, len(text) + 1))
    assert streamed(text, everywhere, make_request(True, stream_reasoning=False)) == ("I think.", "So.", [])


@pytest.mark.parametrize(("text", "thinking", "expected"), ANSWERS)
def test_a_whole_answer(text: str, thinking: bool, expected: tuple[str, str, list[str]]) -> None:
    serving, request = make_serving(), make_request(thinking)
    reasoning = serving._get_reasoning_from_request(request)
    detector = parsers.DsaReasoningDetector(force_reasoning=reasoning)
    parsed = detector.detect_and_parse(text)
    finish = {"type": "stop"}
    calls, content, finish = serving._process_tool_calls(parsed.normal_text, request.tools, finish, "auto")
    assert (parsed.reasoning_text, content) == expected[:2]
    assert [call.function.arguments for call in calls or []] == expected[2]
    assert finish["type"] == ("tool_calls" if expected[2] else "stop")


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False}}, False),
    ],
)
def test_who_thinks(options: dict[str, Any], thinks: bool) -> None:
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}], **options)
    assert make_serving()._get_reasoning_from_request(request) is thinks


def test_the_page_of_patches_names_every_hook() -> None:
    """For the release that is installed here."""
    page = (Path(__file__).parent.parent / "docs" / "patches.md").read_text(encoding="utf-8")
    if not current_platform.is_out_of_tree():
        page = page.partition("Only without a GPU")[0]
    release = compat.installed_version().partition(".post")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| `")]
    rows = {target.strip("`") for _, target, releases, *_ in cells if releases in ("both", release)}
    wanted = [*registration.hooks(), *registration.draft_hooks()]
    assert {hook.target.removeprefix("sglang.") for hook in wanted} == rows
