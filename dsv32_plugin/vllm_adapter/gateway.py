"""The gateway in vLLM's server, and Anthropic's errors.

vLLM has plugins for its server but loads only those that `VLLM_PLUGINS` names. Ours is added to what it loads.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dsv32_plugin import settings
from dsv32_plugin.apis.context import read_default, warn_without_effect
from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.apis.gateway import Gateway
from dsv32_plugin.vllm_adapter import hooks, upstream

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

    from dsv32_plugin.vllm_adapter.upstream import EngineClient


def install() -> None:
    """Add the gateway to the plugins of vLLM's server. May be called more than once.

    Raises:
        hooks.HookError: vLLM has no such plugins.
    """
    hooks.at("load_endpoint_plugins", _with_ours)


def _with_ours(load: Callable[..., list[Any]], *args: Any, **kwargs: Any) -> list[Any]:
    return [*load(*args, **kwargs), GatewayPlugin()]


class GatewayPlugin:
    """A `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = "dsv32"
    required_tasks = None

    def __init__(self) -> None:
        self._server: Server | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(Gateway, server=lambda: self._server)
        _answer_anthropic_errors()

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Serve where conversations are rendered by our encoder, and not by a template."""
        from dsv32_plugin.core import prompt_tokens
        from dsv32_plugin.core.chat import thinking_requested
        from dsv32_plugin.vllm_adapter.rendering import DsaRenderer

        renderer = state.online_renderer.renderer
        if isinstance(renderer, DsaRenderer) and not renderer.has_template(args.chat_template):
            length = renderer.model_config.max_model_len
            self._server = Server(
                default_thinking=thinking_requested(args.default_chat_template_kwargs),
                stores=upstream.VLLM_ENABLE_RESPONSES_API_STORE,
                hides_unused_tools=args.exclude_tools_when_tool_choice_none,
                context_tokens=length,
                plan=read_default(settings.context(), length),
                variant=renderer.variant,
                count=partial(prompt_tokens.count, renderer.get_tokenizer()),
            )
        else:
            warn_without_effect(settings.context())


def _answer_anthropic_errors() -> None:
    """vLLM's router makes a 500 of every error of the Messages API: let the handler answer, as that of chats does."""
    for name in ("create_messages", "count_tokens"):
        hooks.at(f"AnthropicServingMessages.{name}", _answering)


async def _answering(handler: Callable[..., Awaitable[Any]], serving: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return await handler(serving, *args, **kwargs)
    except (upstream.ClientError, ValueError, TypeError, OverflowError, NotImplementedError) as error:
        return serving.create_error_response(error)
