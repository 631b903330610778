"""The gateway in SGLang: its classes on what the gateway makes of requests, and what our hooks tell it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from requests_of_clients import CHATS, MESSAGES, RESPONSES
from sglang.srt.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ResponsesRequest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from starlette.requests import Request

from dsv32_plugin import apis
from dsv32_plugin.apis import anthropic, chat, responses
from dsv32_plugin.apis.context import Plan
from dsv32_plugin.apis.conversation import UNSEEN, serve
from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.apis.gateway import Gateway
from dsv32_plugin.parsers.context import DiscardAll
from dsv32_plugin.sglang_adapter import gateway, rendering, requests

pytestmark = pytest.mark.engine
PLAIN = Server()


@pytest.fixture(autouse=True)
def serving() -> Iterator[None]:
    yield
    serve(None)


@pytest.mark.parametrize("body", CHATS)
def test_a_chat_is_one_that_sglang_takes(body: dict[str, Any]) -> None:
    exchange = chat.read(body, PLAIN)
    request = ChatCompletionRequest(**exchange.body)
    names = [tool.function.name for tool in request.tools or []]
    assert names == [function["name"] for function in exchange.conversation.tools]


@pytest.mark.parametrize("body", RESPONSES)
def test_a_request_of_responses_is_one_that_sglang_takes(body: dict[str, Any]) -> None:
    exchange = responses.read(body, PLAIN, responses.Store())
    request = ResponsesRequest(**exchange.body)
    assert request.input == UNSEEN
    assert {tool.name for tool in request.tools} <= {tool["name"] for tool in exchange.conversation.tools}


@pytest.mark.parametrize("body", MESSAGES)
def test_a_request_of_messages_is_one_that_sglang_takes(body: dict[str, Any]) -> None:
    exchange = anthropic.read(body, PLAIN)
    request = AnthropicMessagesRequest(max_tokens=5, **exchange.body)
    serving = AnthropicServing(SimpleNamespace(tokenizer_manager=manager(), supports_inline_system=True))
    converted = serving._convert_to_chat_completion_request(request)
    assert [tool.function.name for tool in converted.tools or []] == [
        tool["name"] for tool in exchange.conversation.tools
    ]
    AnthropicCountTokensRequest(**exchange.body)


def manager(template: str | None = None) -> Any:
    """What our hooks ask of a tokenizer manager that serves V3.2."""
    tokenizer = SimpleNamespace(chat_template=template, encode=lambda text, add_special_tokens: [ord(c) for c in text])
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV32ForCausalLM"]), vocab_size=10)
    return SimpleNamespace(
        tokenizer=tokenizer, model_config=config, model_path="m", served_model_name="m", context_len=8192
    )


def test_the_context_is_what_the_pool_can_hold() -> None:
    """SGLang says how long a prompt may be once its scheduler runs: of 8192, or of a pool of 2048 tokens."""
    for most, expected in ((None, 8192), (8186, 8192), (2042, 2048)):
        serving = manager()
        serving.max_req_input_len = most
        assert gateway._context(serving) == expected


def no_original(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("SGLang's own code is not asked")


def test_the_encoder_renders_what_the_gateway_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV32_TRUST_MARKUP", "1")  # the tokenizer has no control tokens
    of = anthropic.read({"messages": [{"role": "user", "content": "really"}], "thinking": {"type": "adaptive"}}, PLAIN)
    endpoint = SimpleNamespace(tokenizer_manager=manager(), reasoning_parser="dsv32")
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": UNSEEN}])
    serve(of.conversation)
    made = rendering.template_around(no_original, endpoint, request, None, False)
    assert "".join(map(chr, made.prompt_ids)).endswith("<｜User｜>really<｜Assistant｜><think>")
    assert rendering.thinks(request)
    assert gateway.thinking_around(no_original, SimpleNamespace(), SimpleNamespace())
    serve(None)
    assert not rendering.thinks(request)
    assert gateway.thinking_around(lambda *asked: True, SimpleNamespace(), SimpleNamespace())


def test_the_first_reason_of_a_refusal_is_kept() -> None:
    def original(*args: Any) -> Any:
        raise ValueError("what came of it")

    conversation = apis.Conversation([], [])
    serve(conversation)
    with pytest.raises(ValueError, match="what came of it"):
        gateway.convert_around(original, SimpleNamespace(), SimpleNamespace())
    sampling = SimpleNamespace(sampling_params={"stop_token_ids": 5})
    with pytest.raises(ValueError, match="stop_token_ids"):
        requests.validate_around(lambda *checked: None, manager(), sampling, [1])
    assert conversation.refusal == "what came of it"


def test_a_chat_that_is_converted_in_another_thread_keeps_its_conversation() -> None:
    """As SGLang 0.5.23 does it. Chats lost what the engine has no field for, such as `prefix` beside `thinking`."""
    found: list[Any] = []

    def original(serving: Any, request: Any, raw_request: Any) -> None:
        found.append(apis.current())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        thread = asyncio.get_running_loop().run_in_executor
        await thread(None, gateway.convert_around, original, SimpleNamespace(), SimpleNamespace(), Request(scope))
        found.append(await thread(None, apis.current))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(CHATS[3]).encode()}

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    asyncio.run(Gateway(app, server=lambda: PLAIN)(scope, receive, lambda message: asyncio.sleep(0)))
    converted, after = found
    assert converted.continues
    assert after is None


@pytest.mark.parametrize("field", requests.RETURNED)
def test_what_a_server_does_not_keep_is_refused(field: str) -> None:
    """SGLang answers without it."""
    kept = SimpleNamespace(**{f"enable_{name}": name != field for name in requests.RETURNED})
    serving = SimpleNamespace(
        sampling_params_class=SamplingParams, preferred_sampling_params=None, server_args=kept, **vars(manager())
    )
    others = dict.fromkeys(set(requests.RETURNED) - {field}, True)
    requests.validate_around(
        lambda *checked: None, serving, GenerateReqInput(text="a", sampling_params={}, **others), [1]
    )
    asks = GenerateReqInput(text="a", sampling_params={}, **{field: True})
    with pytest.raises(ValueError, match=f"{field}: expected false, got true; start the server with --enable-"):
        requests.validate_around(lambda *checked: None, serving, asks, [1])


def test_the_sampling_parameters_of_a_request_are_looked_at_once() -> None:
    """By the Responses API before its stream begins, and with the other checks of every request."""
    looked_at = []

    class Counted(SamplingParams):
        def verify(self, vocab_size: int) -> None:
            looked_at.append(vocab_size)
            super().verify(vocab_size)

    serving = SimpleNamespace(sampling_params_class=Counted, preferred_sampling_params=None, **vars(manager()))
    request = GenerateReqInput(text="a", sampling_params={"temperature": 0.5})
    requests.check_sampling(serving, request)
    requests.validate_around(lambda *checked: None, serving, request, [1])
    assert looked_at == [10]
    wrong = GenerateReqInput(text="a", sampling_params={"temperature": -1})
    for _ in range(2):
        with pytest.raises(ValueError, match="temperature"):
            requests.check_sampling(serving, wrong)


@pytest.mark.parametrize(("template", "serves"), [(None, True), ("{{ messages }}", False)])
def test_the_gateway_is_innermost_where_our_encoder_renders(
    template: str | None, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.entrypoints import http_server

    monkeypatch.setattr(http_server.app, "user_middleware", list(http_server.app.user_middleware))
    monkeypatch.setenv("SGLANG_DEFAULT_THINKING", "1")
    monkeypatch.setenv("DSV32_CONTEXT", "discard-all")
    ran = gateway.run_server_around(lambda *args, **kwargs: (args, kwargs), "args", manager(template), "rest", key=1)
    assert ran == (("args", *ran[0][1:]), {"key": 1})
    innermost = http_server.app.user_middleware[-1]
    assert (innermost.cls is Gateway) is serves
    if serves:
        server = innermost.kwargs["server"]()
        assert server.default_thinking
        assert server.plan == Plan("discard-all", DiscardAll(6553))
