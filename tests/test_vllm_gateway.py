"""The gateway in vLLM: its plugin, its classes on what the gateway makes of requests, and Anthropic's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from requests_of_clients import CHATS, MESSAGES, RESPONSES
from vllm import plugins
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.params import ChatParams
from vllm.tool_parsers.utils import iter_response_function_tool_dicts

from dsv32_plugin import apis
from dsv32_plugin.apis import anthropic, chat, responses
from dsv32_plugin.apis.context import Plan
from dsv32_plugin.apis.conversation import UNSEEN, serve
from dsv32_plugin.apis.exchange import Exchange, Server
from dsv32_plugin.parsers.context import DiscardAll
from dsv32_plugin.vllm_adapter import gateway, hooks
from dsv32_plugin.vllm_adapter.rendering import DsaRenderer

pytestmark = pytest.mark.engine
PLAIN = Server()


@pytest.mark.parametrize("body", CHATS)
def test_a_chat_is_one_that_vllm_takes(body: dict[str, Any]) -> None:
    exchange = chat.read(body, PLAIN)
    request = ChatCompletionRequest(**exchange.body)
    names = [tool.function.name for tool in request.tools or []]
    assert names == [function["name"] for function in exchange.conversation.tools]


@pytest.mark.parametrize("body", RESPONSES)
def test_a_request_of_responses_is_one_that_vllm_takes(body: dict[str, Any]) -> None:
    exchange = responses.read(body, PLAIN, responses.Store())
    request = ResponsesRequest(**exchange.body)
    assert request.input == UNSEEN
    functions = iter_response_function_tool_dicts(request.tools)
    assert {function["type"] for function in functions} <= {"function"}
    assert {function["name"] for function in functions} <= {tool["name"] for tool in exchange.conversation.tools}


@pytest.mark.parametrize("body", MESSAGES)
def test_a_request_of_messages_is_one_that_vllm_takes(body: dict[str, Any]) -> None:
    exchange = anthropic.read(body, PLAIN)
    request = AnthropicMessagesRequest(max_tokens=5, **exchange.body)
    # vLLM 0.29 and older call it otherwise.
    convert = getattr(AnthropicServingMessages, "to_chat_completion_request", None)
    converted = (convert or AnthropicServingMessages._convert_anthropic_to_openai_request)(request)
    assert [tool.function.name for tool in converted.tools or []] == [
        tool["name"] for tool in exchange.conversation.tools
    ]
    AnthropicCountTokensRequest(**exchange.body)


class Characters:
    """A tokenizer of one token a character."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "BOS is in the text"
        return [ord(character) for character in text]


@pytest.fixture
def serving() -> Iterator[None]:
    yield
    serve(None)


@pytest.mark.usefixtures("serving")
def test_the_renderer_renders_what_the_gateway_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV32_TRUST_MARKUP", "1")  # the tokenizer has no control tokens
    renderer = DsaRenderer.__new__(DsaRenderer)
    renderer.tokenizer = Characters()  # type: ignore[assignment]
    renderer.variant = "v3.2"
    of: Exchange = responses.read({"input": "really", "reasoning": {"effort": "high"}}, PLAIN, responses.Store())
    engines_own: Any = [{"role": "user", "content": UNSEEN}]
    params = ChatParams(chat_template_kwargs=of.body["chat_template_kwargs"])
    serve(of.conversation)
    _, prompt = renderer.render_messages(engines_own, params)
    assert "".join(map(chr, prompt["prompt_token_ids"])).endswith("<｜User｜>really<｜Assistant｜><think>")
    serve(None)
    with pytest.raises(RuntimeError, match="lost between the gateway and the encoder"):
        renderer.render_messages(engines_own, params)


def test_the_gateway_is_among_vllms_plugins_once() -> None:
    gateway.install()
    gateway.install()
    assert [type(plugin) for plugin in plugins.load_endpoint_plugins(("generate",))] == [gateway.GatewayPlugin]


def test_another_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "load_endpoint_plugins", lambda tasks: [])
    with pytest.raises(
        hooks.HookError, match=r"expected vllm.plugins.load_endpoint_plugins\(supported_tasks, \.\.\.\)"
    ):
        gateway.install()


@pytest.mark.parametrize(("has_template", "serves"), [(False, True), (True, False)])
def test_the_gateway_serves_what_our_encoder_renders(
    has_template: bool, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = DsaRenderer.__new__(DsaRenderer)
    renderer.tokenizer = Characters()  # type: ignore[assignment]
    renderer.model_config = SimpleNamespace(max_model_len=8192)
    renderer.variant = "v3.2"
    monkeypatch.setenv("DSV32_CONTEXT", "discard-all")
    args = SimpleNamespace(
        chat_template="{{ x }}" if has_template else None,
        default_chat_template_kwargs={"enable_thinking": True},
        exclude_tools_when_tool_choice_none=True,
    )
    for found, expected in ((renderer, serves), (object(), False)):
        plugin = gateway.GatewayPlugin()
        state = SimpleNamespace(online_renderer=SimpleNamespace(renderer=found))
        asyncio.run(plugin.init_state(None, state, args))  # type: ignore[arg-type]
        assert (plugin._server is not None) is expected
        if plugin._server is not None:
            assert plugin._server.default_thinking
            assert plugin._server.hides_unused_tools
            assert plugin._server.plan == Plan("discard-all", DiscardAll(6553))


@pytest.mark.parametrize("error", [ValueError("why"), VLLMValidationError("why", parameter="max_tokens")])
def test_what_a_client_did_wrong_is_no_500(error: Exception) -> None:
    async def handler(self: Any, request: Any, raw_request: Any = None) -> Any:
        raise error

    serving = AnthropicServingMessages.__new__(AnthropicServingMessages)
    answer = asyncio.run(gateway._answering(handler, serving, None))
    assert (answer.error.code, "why" in answer.error.message) == (400, True)


def test_nothing_is_current_outside_of_a_request() -> None:
    assert apis.current() is None
