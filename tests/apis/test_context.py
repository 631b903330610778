"""Contexts that are full: what each API's request asks for, what the model gets, and what the answer says.

The real SDKs ask, an application stands for the engine: it renders as an engine's hook does, and counts characters.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any

import anthropic
import httpx
import long_conversations as long
import openai
import pytest
from anthropic.types.beta import BetaMessage, BetaMessageTokensCount, BetaRawMessageDeltaEvent
from openai import BadRequestError
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from dsv32_plugin import apis
from dsv32_plugin.apis import context
from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.apis.gateway import Gateway
from dsv32_plugin.parsers import Markup
from dsv32_plugin.parsers.context import ContextError, DiscardAll
from dsv32_plugin.parsers.history import CLEARED

LENGTH = 8000
CLEAR = {"type": "clear_tool_uses_20250919"}
THINKING = {"type": "clear_thinking_20251015"}
DISCARD = {"strategy": "discard-all", "trigger_tokens": 4000}


class Engine:
    """An engine that says one word to every prompt; `prompts` has them."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        kwargs = body.get("chat_template_kwargs") or {}
        prompt = str(apis.rendered(apis.current(), [], kwargs, "v3.2", len))
        self.prompts.append(prompt)
        self.bodies.append(body)
        answers = self._answers(scope["path"], body, len(prompt))
        kind = b"text/event-stream" if body.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if body.get("stream"):
            events = [f"event: {answer.get('type')}\ndata: {json.dumps(answer)}\n\n" for answer in answers]
            content = "".join(events) if "type" in answers[0] else "".join(e.split("\n", 1)[1] for e in events)
        else:
            content = json.dumps(answers[-1])
        await send({"type": "http.response.body", "body": content.encode()})

    def _answers(self, path: str, body: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
        """The events of a stream, or the whole answer alone."""
        usage = {"input_tokens": tokens, "output_tokens": 1}
        if path.endswith("/tokenize"):
            return [{"count": tokens, "tokens": [1], "max_model_len": LENGTH}]
        if path.endswith("/count_tokens"):
            return [{"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}]
        if path.endswith("/messages"):
            message = {
                "type": "message", "id": "m", "role": "assistant", "model": "tiny", "stop_reason": "end_turn",
                "content": [{"type": "text", "text": "There."}], "usage": usage,
            }  # fmt: skip
            delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
            start = {"type": "message_start", "message": {**message, "content": []}}
            return [start, delta, {"type": "message_stop"}] if body.get("stream") else [message]
        if path.endswith("/responses"):
            message = {
                "type": "message", "id": "i", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "There.", "annotations": []}],
            }  # fmt: skip
            details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
            response = {
                "object": "response", "id": "resp_1", "created_at": 0, "model": "tiny", "status": "completed",
                "output": [message], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
                "truncation": "disabled", "usage": {**usage, **details, "total_tokens": tokens + 1},
            }  # fmt: skip
            done = {"type": "response.completed", "response": response, "sequence_number": 0}
            return [done] if body.get("stream") else [response]
        answered = {"index": 0, "finish_reason": "stop", "logprobs": None}
        of_chat = {"id": "c", "created": 0, "model": "tiny"}
        counted = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
        if body.get("stream"):
            piece = {**of_chat, "object": "chat.completion.chunk", "choices": [{**answered, "delta": {"content": "A"}}]}
            return [piece, {**piece, "choices": [], "usage": counted}]
        said = {"message": {"role": "assistant", "content": "There."}}
        return [{**of_chat, "object": "chat.completion", "choices": [{**answered, **said}], "usage": counted}]


class Clients:
    """The SDKs, in front of the gateway."""

    def __init__(self, server: Server | None = None) -> None:
        self.engine = Engine()
        gateway = Gateway(self.engine, lambda: server or Server(context_tokens=LENGTH))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://server")
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0}
        self.openai = openai.AsyncOpenAI(
            base_url="http://server/v1", http_client=_over(gateway, openai.DefaultAsyncHttpxClient), **options
        )
        self.anthropic = anthropic.AsyncAnthropic(
            base_url="http://server", http_client=_over(gateway, anthropic.DefaultAsyncHttpxClient), **options
        )

    def run(self, ask: Callable[[Clients], Coroutine[Any, Any, Any]]) -> Any:
        return asyncio.run(ask(self))

    @property
    def prompt(self) -> str:
        return self.engine.prompts[-1]


def _over(app: Any, client: Any) -> Any:
    """An SDK's client; their releases build on httpx or on httpx2."""
    library = import_module(
        next(cls.__module__ for cls in client.__mro__ if cls.__module__.startswith("httpx")).split(".")[0]
    )
    return client(transport=library.ASGITransport(app))


def pages(prompt: str) -> list[int]:
    """The results in a prompt."""
    return [n for n in range(100) if long.result(n) in prompt]


def edited(*edits: Any, **more: Any) -> dict[str, Any]:
    return {**long.messages(12), "context_management": {"edits": list(edits)}, **more}


def test_messages_clear_tool_uses_and_count_them() -> None:
    trigger = {"trigger": {"type": "input_tokens", "value": 3000}, "keep": {"type": "tool_uses", "value": 2}}
    clients = Clients()

    async def ask(of: Clients) -> Any:
        body = edited({**CLEAR, **trigger}, betas=["context-management-2025-06-27"])
        whole = await of.anthropic.beta.messages.create(max_tokens=64, **body)
        counted = await of.anthropic.beta.messages.count_tokens(**body)
        stream = await of.anthropic.beta.messages.create(max_tokens=64, stream=True, **body)
        return whole, counted, [event async for event in stream]

    whole, counted, events = clients.run(ask)
    BetaMessage.model_validate(whole.model_dump())
    BetaMessageTokensCount.model_validate(counted.model_dump())
    (edit,) = whole.context_management.applied_edits
    assert edit.type == CLEAR["type"]
    assert edit.cleared_tool_uses == clients.prompt.count(CLEARED) == 12 - len(pages(clients.prompt)) > 5
    assert counted.input_tokens == whole.usage.input_tokens == len(clients.prompt)
    assert counted.context_management.original_input_tokens == counted.input_tokens + edit.cleared_input_tokens
    (delta,) = [event for event in events if event.type == "message_delta"]
    BetaRawMessageDeltaEvent.model_validate(delta.model_dump())
    assert delta.context_management == whole.context_management
    assert clients.prompt.count('name="n"') == 12, "calls stay"
    assert "context_management" not in clients.engine.bodies[0]


def test_messages_below_the_trigger_say_that_nothing_was_applied() -> None:
    clients = Clients()
    whole = clients.run(
        lambda of: of.anthropic.beta.messages.create(max_tokens=9, **{**edited(CLEAR), **long.messages(2)})
    )
    assert whole.context_management.applied_edits == []
    assert CLEARED not in clients.prompt


def test_the_default_trigger_is_within_the_context() -> None:
    """Anthropic's is 100,000 tokens; this context has 8000."""
    clients = Clients()
    whole = clients.run(lambda of: of.anthropic.beta.messages.create(max_tokens=64, **edited(CLEAR)))
    assert len(pages(clients.prompt)) < 12
    assert whole.usage.input_tokens <= 0.8 * LENGTH


def test_what_claude_code_sends_changes_nothing() -> None:
    clients = Clients()
    keep_all = {**THINKING, "keep": "all"}
    whole = clients.run(lambda of: of.anthropic.beta.messages.create(max_tokens=9, **edited(keep_all)))
    assert whole.context_management.applied_edits == []
    assert pages(clients.prompt) == list(range(12))


def test_thinking_of_earlier_turns_is_counted_as_cleared() -> None:
    body = long.messages(3)
    done = {"role": "assistant", "content": [{"type": "text", "text": "There."}]}
    body["messages"] = [
        *body["messages"],
        done,
        {"role": "user", "content": "Sure?"},
        *long.messages(1)["messages"][1:],
    ]
    body |= {"context_management": {"edits": [THINKING, CLEAR]}, "thinking": {"type": "adaptive"}}
    clients = Clients()
    whole = clients.run(lambda of: of.anthropic.beta.messages.create(max_tokens=9, **body))
    (edit,) = whole.context_management.applied_edits
    assert (edit.type, edit.cleared_thinking_turns, edit.cleared_input_tokens) == (THINKING["type"], 1, 0)
    assert clients.prompt.count("I look at") == 1, "as DeepSeek keeps it"


def test_chat_discards_and_says_so() -> None:
    clients = Clients()

    async def ask(of: Clients) -> Any:
        body = {**long.chat(14), "extra_body": {"chat_template_kwargs": {"context": DISCARD, "thinking": True}}}
        raw = await of.openai.chat.completions.with_raw_response.create(**body)
        options = {"include_usage": True}
        stream = await of.openai.chat.completions.create(stream=True, stream_options=options, **body)
        last = [chunk async for chunk in stream][-1]
        tokenized = await of.http.post("/tokenize", json={**body, **body["extra_body"]})
        return raw, last, tokenized

    raw, last, tokenized = clients.run(ask)
    whole = raw.parse()
    ChatCompletion.model_validate(whole.model_dump())
    report = whole.usage.context_management
    (edit,) = report["applied_edits"]
    left = pages(clients.prompt)
    assert left == list(range(14 - len(left), 14)), "the last ones"
    assert edit["type"] == "discard-all"
    assert edit["cleared_tool_uses"] == 14 - len(left)
    assert edit["cleared_messages"] == 2 * edit["cleared_tool_uses"]
    assert report["original_input_tokens"] == whole.usage.prompt_tokens + edit["cleared_input_tokens"]
    assert last.usage.context_management == report
    assert json.loads(raw.headers["x-dsv32-context"]) == report
    assert tokenized.json()["count"] == whole.usage.prompt_tokens == len(clients.prompt)
    assert json.loads(tokenized.headers["x-dsv32-context"]) == report
    assert long.TASK in clients.prompt
    assert clients.engine.bodies[0]["chat_template_kwargs"] == {"thinking": True}


def test_responses_are_truncated_and_go_on() -> None:
    clients = Clients(Server(context_tokens=4000))

    async def ask(of: Clients) -> Any:
        first = await of.openai.responses.create(truncation="auto", max_output_tokens=100, **long.responses(9))
        said = [event async for event in await of.openai.responses.create(
            truncation="auto", stream=True, previous_response_id=first.id, model="tiny",
            input="And the other?", instructions=long.SYSTEM, tools=long.responses(1)["tools"],
        )]  # fmt: skip
        return first, said[-1].response

    first, then = clients.run(ask)
    Response.model_validate(first.model_dump())
    prompt = clients.engine.prompts[0]
    left = pages(prompt)
    assert left == list(range(9 - len(left), 9))
    assert prompt.index(long.SYSTEM) < prompt.index(long.TASK) < prompt.index(long.result(left[0]))
    assert first.truncation == "auto"
    assert "truncation" not in clients.engine.bodies[0], "an engine would cut the prompt's first tokens off"
    (edit,) = first.usage.context_management["applied_edits"]
    assert (edit["type"], edit["cleared_tool_uses"]) == ("truncation", 9 - len(left))
    assert first.usage.input_tokens == len(prompt) <= 3900
    assert clients.prompt.startswith(prompt.removesuffix("</think>")), "what was left out stays out: a prefix is shared"
    assert then.usage.input_tokens == len(clients.prompt)


@pytest.mark.parametrize("truncation", [None, "disabled"])
def test_responses_are_left_whole(truncation: str | None) -> None:
    clients = Clients()
    asked = {} if truncation is None else {"truncation": truncation}
    response = clients.run(lambda of: of.openai.responses.create(**asked, **long.responses(40)))
    assert pages(clients.prompt) == list(range(40))
    assert response.truncation == "disabled"


def test_the_servers_default_is_for_requests_that_say_nothing() -> None:
    default = context.read_default({"strategy": "discard-75", "trigger_tokens": 3000}, LENGTH)
    clients = Clients(Server(context_tokens=LENGTH, plan=default))

    async def ask(of: Clients) -> None:
        await of.openai.chat.completions.create(**long.chat(14))
        await of.openai.responses.create(**long.responses(14))
        message = await of.anthropic.beta.messages.create(max_tokens=9, **long.messages(14))
        (edit,) = message.context_management.applied_edits
        assert (edit.type, edit.strategy) == (CLEAR["type"], "discard-75"), "a type that its SDK knows"
        await of.anthropic.beta.messages.create(
            max_tokens=9, **{**edited({**THINKING, "keep": "all"}), **long.messages(14)}
        )
        off = {"chat_template_kwargs": {"context": {"strategy": "none"}}}
        await of.openai.chat.completions.create(**long.chat(14), extra_body=off)
        await of.openai.responses.create(truncation="disabled", **long.responses(14))
        await of.anthropic.beta.messages.create(max_tokens=9, **{**edited(), **long.messages(14)})

    clients.run(ask)
    discarded, whole = clients.engine.prompts[:4], clients.engine.prompts[4:]
    assert len(set(discarded)) == 1, "one conversation is one prompt over all three APIs"
    assert len(set(whole)) == 1
    assert pages(whole[0]) == list(range(14))
    assert len(pages(discarded[0])) < 10


def test_a_default_whose_trigger_is_above_the_context_stops_the_start() -> None:
    assert context.read_default(None, LENGTH) is None
    assert context.read_default("none", LENGTH) is None
    plan = context.read_default("discard-all", LENGTH)
    assert plan == context.Plan("discard-all", DiscardAll(6400))
    with pytest.raises(ContextError, match="DSV32_CONTEXT: trigger: expected at most the context of 8000"):
        context.read_default({"strategy": "discard-all", "trigger_tokens": 9000}, LENGTH)


def in_chat(options: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {**long.chat(1), "chat_template_kwargs": {"context": options}}


def in_messages(*edits: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/messages", {**edited(*edits), "max_tokens": 9}


def in_responses(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/responses", {**long.responses(1), **fields}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (in_chat({"strategy": "forget"}), "chat_template_kwargs.context: strategy: expected one of discard-all,"),
        (in_chat("summary"), "which a client carries out"),
        (in_chat(5), "chat_template_kwargs.context: expected"),
        (in_chat({**DISCARD, "trigger_tokens": 9000}), "expected at most the context of 8000 tokens, got 9000 tokens"),
        (in_chat({**DISCARD, "trigger_tokens": -1}), "trigger_tokens: expected a whole number"),
        (in_messages({"type": "compact_20260112"}), "edits[0]: expected clear_tool_uses_20250919 or clear_thinking"),
        (in_messages(CLEAR, CLEAR), "edits[1]: a second clear_tool_uses_20250919"),
        (in_messages(CLEAR, THINKING), "edits[1]: expected clear_thinking_20251015 first"),
        (in_messages({**CLEAR, "placeholder": "x"}), "edits[0]: expected trigger, keep, clear_at_least"),
        (in_messages({**CLEAR, "trigger": {"type": "input_tokens", "value": 9000}}), "8000 tokens, got 9000 tokens"),
        (in_messages({**CLEAR, "trigger": {"type": "pages", "value": 9}}), 'edits[0].trigger: expected {"type":'),
        (in_messages({**CLEAR, "trigger": 9}), "edits[0].trigger: expected"),
        (in_messages({**CLEAR, "keep": {"type": "tool_uses", "value": -1}}), "edits[0].keep: expected"),
        (in_messages({**CLEAR, "keep": {"type": "tool_uses", "value": True}}), "edits[0].keep: expected"),
        (in_messages({**CLEAR, "clear_at_least": {"type": "tool_uses", "value": 1}}), "edits[0].clear_at_least: exp"),
        (in_messages({**CLEAR, "exclude_tools": "look"}), "edits[0].exclude_tools: expected a list of names"),
        (in_messages({**CLEAR, "clear_tool_inputs": 1}), "edits[0].clear_tool_inputs: expected true, false or a list"),
        (in_messages({**THINKING, "keep": {"type": "thinking_turns", "value": 0}}), "N from 1 on"),
        (("/v1/messages", {**edited(), "context_management": []}), 'context_management: expected {"edits": […]}'),
        *(
            (("/v1/messages", {**edited(), "context_management": {"edits": bad}}), "context_management: expected {")
            for bad in ("", 0, False, {}, "x")
        ),
        (in_messages(5), "context_management.edits[0]: expected clear_tool_uses_20250919 or"),
        (in_messages({"type": ["x"]}), "context_management.edits[0]: expected clear_tool_uses_20250919 or"),
        (in_messages({**THINKING, "keep": {"type": "all", "value": 3}}), "edits[0].keep: expected"),
        *((in_responses(context_management=bad), "context_management: expected none") for bad in (5, 0, False, "", {})),
        (in_chat("keep-last-" + "9" * 5000), "chat_template_kwargs.context: strategy: expected one of"),
        (("/v1/messages", {**edited(), "compaction": {"type": "summarize"}}), "compaction: expected none"),
        (in_responses(context_management=[{"type": "compaction"}]), "got compaction; compaction returns an item"),
        (in_responses(truncation="middle"), "truncation: expected auto or disabled, got 'middle'"),
        (
            in_responses(truncation="auto", chat_template_kwargs={"context": DISCARD}),
            "expected one strategy, got truncation and discard-all",
        ),
    ],
)
def test_what_can_not_be_done_is_a_400(asked: tuple[str, dict[str, Any]], reason: str) -> None:
    clients = Clients()
    answer = clients.run(lambda of: of.http.post(asked[0], json=asked[1]))
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
    assert clients.engine.prompts == []


def test_every_option_of_clear_tool_uses_is_read() -> None:
    edit = {
        **CLEAR,
        "trigger": {"type": "tool_uses", "value": 4},
        "keep": {"type": "tool_uses", "value": 1},
        "clear_at_least": {"type": "input_tokens", "value": 10},
        "exclude_tools": ["other"],
        "clear_tool_inputs": ["look"],
    }
    clients = Clients()
    whole = clients.run(lambda of: of.anthropic.beta.messages.create(max_tokens=9, **edited(edit)))
    (applied,) = whole.context_management.applied_edits
    assert applied.cleared_tool_uses == 8, "four at the fifth, and at the ninth again"
    assert clients.prompt.count('name="n"') == 4, "the inputs of those that were cleared are gone"
    for option in ({"exclude_tools": ["look"]}, {"clear_at_least": {"type": "input_tokens", "value": 10**5}}):
        whole = clients.run(
            lambda of, option=option: of.anthropic.beta.messages.create(max_tokens=9, **edited({**edit, **option}))
        )
        assert whole.context_management.applied_edits == []


def test_a_bad_message_has_its_own_number_whatever_is_discarded() -> None:
    body = long.chat(12)
    body["messages"].insert(-1, {"role": "tool", "content": "x"})
    clients = Clients()
    asked = {**body, "chat_template_kwargs": {"context": DISCARD}}
    answer = clients.run(lambda of: of.http.post("/v1/chat/completions", json=asked))
    assert answer.status_code == 400
    assert "messages[26]: tool result without a call" in answer.json()["error"]["message"]


def test_an_answer_that_goes_on_does_so_after_a_discard() -> None:
    body = long.chat(14)
    body["messages"].append({"role": "assistant", "content": "It is", "prefix": True})
    clients = Clients()
    asked = {**body, "chat_template_kwargs": {"context": DISCARD}}
    answer = clients.run(lambda of: of.http.post("/v1/chat/completions", json=asked))
    assert answer.status_code == 200
    assert clients.prompt.endswith("It is")
    assert answer.json()["usage"]["context_management"]["applied_edits"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_too_long_whatever_is_discarded(path: str) -> None:
    body = {"chat": long.chat, "responses": long.responses, "messages": long.messages}[path.split("/")[2]](12)
    tools = json.dumps(body["tools"])
    body |= {"tools": json.loads(tools.replace('"d"', json.dumps("x" * LENGTH)))}
    body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = 9
    body |= {"chat_template_kwargs": {"context": DISCARD}}
    clients = Clients()
    answer = clients.run(lambda of: of.http.post(path, json=body))
    assert answer.status_code == 400
    reason = answer.json()["error"]["message"]
    assert reason.startswith("discard-all: the conversation still has ")
    assert "the context of 8000 has no room" in reason
    if path != "/v1/responses":
        count = "/tokenize" if "chat" in path else "/v1/messages/count_tokens"
        assert clients.run(lambda of: of.http.post(count, json=body)).status_code == 200, (
            "it can be counted all the same"
        )


def test_a_long_history_keeps_nobody_waiting() -> None:
    """A plan is carried out in another thread; what it refuses, the engine never sees."""
    threads = set()

    def slowly(prompt: Markup) -> int:
        threads.add(threading.current_thread())
        return len(prompt)

    clients = Clients(Server(context_tokens=LENGTH, count=slowly))
    body = {**long.chat(14), "extra_body": {"chat_template_kwargs": {"context": DISCARD}}}
    whole = clients.run(lambda of: of.openai.chat.completions.create(**body))
    assert whole.usage.context_management["applied_edits"]
    assert threads
    assert threading.main_thread() not in threads
    here = Clients()
    assert here.run(lambda of: of.openai.chat.completions.create(**body)).usage == whole.usage
    body["messages"][-1] = {**body["messages"][-1], "content": "x" * LENGTH}
    for stream in (False, True):
        asked = {**body, "stream": stream}
        with pytest.raises(BadRequestError, match="the context of 8000 has no room for an answer"):
            clients.run(lambda of, asked=asked: of.openai.chat.completions.create(**asked))
    assert len(clients.engine.prompts) == 1


def test_outside_of_the_gateway_a_strategy_is_refused() -> None:
    """`vllm run-batch` and `LLM.chat` have nobody to tell what was left out."""
    with pytest.raises(ValueError, match="context: expected none here"):
        apis.rendered(None, [{"role": "user", "content": "hi"}], {"context": DISCARD}, "v3.2", len)
