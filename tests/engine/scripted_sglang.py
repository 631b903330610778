"""SGLang's own HTTP endpoints with our hooks, in this process, in front of an engine that says what a test wants."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import pkgutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai import serving_base, serving_chat, serving_responses
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingTokenize
from sglang.srt.sampling.sampling_params import SamplingParams

from dsv32_plugin.parsers.protocol import BOS, DSML, EOS
from dsv32_plugin.sglang_adapter import arguments, hooks, registration
from dsv32_plugin.sglang_adapter.names import PARSER_NAME

ENDED = {"type": "stop", "matched": 1}
"""The model ended its turn: 1 is the tokenizer's EOS."""
LIMIT = {"type": "length", "length": 7}
TIMEOUT = 60


def stopped(by: str | int) -> dict[str, Any]:
    """A stop string, or one of the request's stop tokens."""
    return {"type": "stop", "matched": by}


def put_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plugin does to the chat endpoints of a server, until the test is over."""
    registration._register_parsers()
    for hook in hooks._chat_hooks():
        path, _, name = hook.target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        found = inspect.getattr_static(owner, name)
        static = isinstance(found, staticmethod)
        # Another test may have loaded the plugin in this process.
        original = inspect.unwrap(found.__func__ if static else found)
        around = functools.wraps(original)(functools.partial(hook.code, original))
        method = _as_function(around)
        monkeypatch.setattr(owner, name, staticmethod(method) if static else method)


def _as_function(around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(around)
    def call(*args: Any, **options: Any) -> Any:
        return around(*args, **options)

    return call


@dataclass
class Engine:
    """What stands in for the model and the detokenizer."""

    texts: list[str]
    """Of each answer to a request; what the model writes, its special tokens spelled out."""
    finish: list[dict[str, Any]]
    cuts: list[list[int]] | None = None
    """Where the streams are cut; None for after every character."""
    mark_is_special: bool = True
    incremental: bool = False
    """Each output holds the new text only."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """The last request's."""
    prompt: str = ""

    async def generate_request(self, request: Any, _raw: Any = None) -> AsyncIterator[Any]:
        self.sampling = request.sampling_params
        self.prompt = "".join(map(chr, request.input_ids))
        texts = [self._decode(text) for text in self.texts]
        if not request.stream:
            outputs = [self._output(text, index, last=True) for index, text in enumerate(texts)]
            yield outputs if len(outputs) > 1 else outputs[0]
            return
        for step in itertools.zip_longest(*(self._stream(text, index) for index, text in enumerate(texts))):
            for output in step:
                if output is not None:
                    yield output

    def _stream(self, text: str, index: int) -> Iterator[dict[str, Any]]:
        """The last output brings no text, as where the model ends its turn, unless `cuts` says otherwise."""
        ends = [*range(1, len(text) + 1), len(text)] if self.cuts is None else [*self.cuts[index], len(text)]
        for number, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            said = text[start:end] if self.incremental else text[:end]
            yield self._output(said, index, last=number == len(ends) - 1)

    def _decode(self, text: str) -> str:
        special = (BOS, EOS, *((DSML,) if self.mark_is_special else ()))
        if self.sampling.get("skip_special_tokens", True):
            for token in special:
                text = text.replace(token, "")
        return text

    def _output(self, text: str, index: int, *, last: bool) -> dict[str, Any]:
        counts = {"prompt_tokens": 5, "completion_tokens": 7, "cached_tokens": 0, "reasoning_tokens": 0}
        finish = dict(self.finish[index]) if last else None
        meta = {"id": "1", "weight_version": "0", "finish_reason": finish, **counts}
        return {"text": text, "index": index, "meta_info": meta, "output_ids": []}


class Endpoints:
    """The server, asked as a client asks it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        parsers: tuple[str | None, str | None] = (PARSER_NAME,) * 2,
        tokenizer: Any = None,
    ):
        if tokenizer is None:
            # One that makes a token of every letter, and has no control tokens.
            monkeypatch.setenv("DSV32_TRUST_MARKUP", "1")
            tokenizer = SimpleNamespace(
                eos_token_id=1,
                bos_token_id=0,
                chat_template=None,
                encode=lambda text, **_: [ord(letter) for letter in text],
                decode=lambda ids, **_: "".join(map(chr, ids)),
            )
        self.engine = Engine([""], [ENDED])
        reasoning, calls = parsers
        options = SimpleNamespace(
            tool_call_parser=calls,
            reasoning_parser=reasoning,
            incremental_streaming_output=False,
            enable_cache_report=False,
            stream_response_default_include_usage=False,
            default_chat_template_kwargs=None,
            return_input_ids=False,
            return_output_ids=False,
            allow_auto_truncate=False,
            context_length=None,
            enable_response_store=True,
            trust_request_chat_template=False,
            tokenizer_metrics_allowed_custom_labels=None,
            tokenizer_metrics_custom_labels_header=None,
            disaggregation_mode="null",
            grammar_backend="xgrammar",
            revision=None,
        )
        self.options = options
        # 0.5.23 publishes the options by their subjects; 0.5.15 has these names nowhere.
        for module in (serving_base, serving_chat, serving_responses):
            for name in ("get_serving", "get_model", "get_observability", "get_disagg"):
                monkeypatch.setattr(module, name, lambda: options, raising=False)
        monkeypatch.setattr(arguments, "of_process", lambda: options)
        manager = SimpleNamespace(
            generate_request=lambda *request: self.engine.generate_request(*request),
            create_abort_task=lambda request: None,
            server_args=options,
            config_value=lambda name: getattr(options, name),
            served_model_name="m",
            model_path="deepseek-ai/DeepSeek-V3.2",
            num_reserved_tokens=0,
            request_logger=SimpleNamespace(log_received_openai_request=lambda *_: None, log_requests=False),
            tokenizer=tokenizer,
            model_config=SimpleNamespace(
                hf_config=SimpleNamespace(architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32"),
                hf_eos_token_id={1},
                is_multimodal=False,
                context_len=1 << 20,
                get_default_sampling_params=dict,
                vocab_size=129280,
            ),
            sampling_params_class=SamplingParams,
            preferred_sampling_params=None,
        )
        template = SimpleNamespace(
            force_reasoning=False,
            reasoning_config=None,
            chat_template_name=None,
            jinja_template_content_format="string",
            jinja_template_may_reorder_tool_results=False,
        )
        self.tokenize = OpenAIServingTokenize(manager, template)
        self.chat = OpenAIServingChat(manager, template)
        self.responses = OpenAIServingResponses(manager, template)
        state = http_server.app.state
        monkeypatch.setattr(state, "openai_serving_chat", self.chat, raising=False)
        monkeypatch.setattr(state, "openai_serving_responses", self.responses, raising=False)
        monkeypatch.setattr(state, "anthropic_serving", AnthropicServing(self.chat), raising=False)
        monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))

    def ask(self, path: str, body: dict[str, Any], *says: tuple[str, dict[str, Any]], **engine: Any) -> Any:
        """The body of a whole answer, or the events of a streamed one, when the model says these and ends so."""
        self.engine = Engine([text for text, _ in says], [finish for _, finish in says], **engine)
        self.options.incremental_streaming_output = self.engine.incremental
        response = asyncio.run(_post(path, {"model": "m", **body}))
        assert response.status_code == httpx.codes.OK, response.text
        return list(_events(response.text)) if body.get("stream") else response.json()

    def status(self, path: str, body: dict[str, Any]) -> int:
        """How a request is answered."""
        self.engine = Engine(["So."], [ENDED])
        return asyncio.run(_post(path, {"model": "m", **body})).status_code


async def _post(path: str, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(app=http_server.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://sglang", timeout=TIMEOUT) as client:
        return await client.post(path, json=body)


def _events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        data = line.removeprefix("data: ")
        if data not in (line, "[DONE]"):
            yield json.loads(data)


@dataclass
class Said:
    """An answer, whichever endpoint gave it, and however."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Name and arguments."""
    finish: str | None = None
    statuses: list[str] = field(default_factory=list)
    """Of the calls, where the endpoint has such."""

    def add_call(self, index: int, name: str | None, arguments: str | None) -> None:
        if index == len(self.calls):
            assert name
            self.calls.append((name, ""))
        else:
            assert not name
        self.calls[index] = (self.calls[index][0], self.calls[index][1] + (arguments or ""))


@dataclass(frozen=True)
class Api:
    """An endpoint: how it is asked, and what its answers are in common words."""

    path: str
    body: Callable[[list[dict[str, Any]], str | dict[str, Any]], dict[str, Any]]
    """Of the request with these functions and this `tool_choice` of Chat's."""
    whole: Callable[[dict[str, Any]], Said]
    streamed: Callable[[list[dict[str, Any]]], Said]
    finishes: dict[str, str]
    """What Chat's words are here."""

    def said(self, endpoints: Endpoints, body: dict[str, Any], *says: Any, **engine: Any) -> Said:
        answer = endpoints.ask(self.path, body, *says, **engine)
        return self.streamed(answer) if body.get("stream") else self.whole(answer)


def _chat_body(functions: list[dict[str, Any]], choice: str | dict[str, Any]) -> dict[str, Any]:
    tools = [{"type": "function", "function": function} for function in functions]
    return {"messages": [{"role": "user", "content": "?"}], "tools": tools, "tool_choice": choice}


def _responses_body(functions: list[dict[str, Any]], choice: str | dict[str, Any]) -> dict[str, Any]:
    tools = [{"type": "function", **function} for function in functions]
    named = choice if isinstance(choice, str) else {"type": "function", "name": choice["function"]["name"]}
    return {"input": "?", "tools": tools, "tool_choice": named}


def _anthropic_body(functions: list[dict[str, Any]], choice: str | dict[str, Any]) -> dict[str, Any]:
    tools = [{"name": function["name"], "input_schema": function["parameters"]} for function in functions]
    if isinstance(choice, str):
        chosen = {"type": {"auto": "auto", "required": "any", "none": "none"}[choice]}
    else:
        chosen = {"type": "tool", "name": choice["function"]["name"]}
    messages = [{"role": "user", "content": "?"}]
    return {"messages": messages, "max_tokens": 1000, "tools": tools, "tool_choice": chosen}


def chat_whole(answer: dict[str, Any], index: int = 0) -> Said:
    """One of the choices."""
    choice = answer["choices"][index]
    message = choice["message"]  # 0.5.23 leaves out what is not there
    said = Said(message.get("reasoning_content") or "", message.get("content") or "", finish=choice["finish_reason"])
    for number, call in enumerate(message.get("tool_calls") or []):
        said.add_call(number, call["function"]["name"], call["function"]["arguments"])
    return said


def chat_streamed(events: list[dict[str, Any]], index: int = 0) -> Said:
    """One of the choices."""
    said = Said()
    for choice in (choice for event in events for choice in event["choices"] if choice["index"] == index):
        said.reasoning += choice["delta"].get("reasoning_content") or ""
        said.content += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls") or []:
            said.add_call(call["index"], call["function"]["name"], call["function"]["arguments"])
        said.finish = choice["finish_reason"] or said.finish
    return said


def _responses_whole(answer: dict[str, Any]) -> Said:
    said = Said(finish=answer["status"])
    for item in answer["output"]:
        if item["type"] == "reasoning":
            said.reasoning += item["content"][0]["text"]
        elif item["type"] == "message":
            said.content += item["content"][0]["text"]
        else:
            said.add_call(len(said.calls), item["name"], item["arguments"])
            said.statuses.append(item["status"])
    return said


def _responses_streamed(events: list[dict[str, Any]]) -> Said:
    """What the pieces add up to, which the last event must say, too."""
    said, added = Said(), {}
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "reasoning_text.delta":
            said.reasoning += event["delta"]
        elif kind == "output_text.delta":
            said.content += event["delta"]
        elif kind == "output_item.added" and event["item"]["type"] == "function_call":
            added[event["item"]["id"]] = len(said.calls)
            said.add_call(len(said.calls), event["item"]["name"], "")
        elif kind == "function_call_arguments.delta":
            said.add_call(added[event["item_id"]], None, event["delta"])
        elif kind == "output_item.done" and event["item"]["type"] == "function_call":
            said.statuses.append(event["item"]["status"])
    said.finish = events[-1]["type"].removeprefix("response.")
    assert _responses_whole(events[-1]["response"]) == said
    return said


def _anthropic_whole(answer: dict[str, Any]) -> Said:
    said = Said(finish=answer["stop_reason"])
    for block in answer["content"]:
        if block["type"] == "thinking":
            said.reasoning += block["thinking"]
        elif block["type"] == "text":
            said.content += block["text"]
        else:
            said.add_call(len(said.calls), block["name"], json.dumps(block["input"]))
    return said


def _anthropic_streamed(events: list[dict[str, Any]]) -> Said:
    said = Said()
    for event in events:
        block, delta = event.get("content_block") or {}, event.get("delta") or {}
        if block.get("type") == "tool_use":
            said.add_call(len(said.calls), block["name"], "")
        said.reasoning += delta.get("thinking", "")
        said.content += delta.get("text", "")
        if "partial_json" in delta:
            said.add_call(len(said.calls) - 1, None, delta["partial_json"])
        said.finish = delta.get("stop_reason") or said.finish
    return said


CHAT = Api(
    "/v1/chat/completions",
    _chat_body,
    chat_whole,
    chat_streamed,
    {word: word for word in ("stop", "length", "tool_calls")},
)
RESPONSES = Api(
    "/v1/responses",
    _responses_body,
    _responses_whole,
    _responses_streamed,
    {"stop": "completed", "length": "incomplete", "tool_calls": "completed"},
)
ANTHROPIC = Api(
    "/v1/messages",
    _anthropic_body,
    _anthropic_whole,
    _anthropic_streamed,
    {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"},
)
APIS = {"chat": CHAT, "responses": RESPONSES, "anthropic": ANTHROPIC}
