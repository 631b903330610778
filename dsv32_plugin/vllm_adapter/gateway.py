"""The gateway in vLLM's server, and Anthropic's errors.

vLLM has plugins for its server but loads only those that `VLLM_PLUGINS` names. Ours is added to what it loads.
"""

from __future__ import annotations

import functools
import inspect
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.apis.gateway import Gateway

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

LOADER = "load_endpoint_plugins"


class HookError(RuntimeError):
    """A place to hook into is gone, or takes other parameters."""


def install() -> None:
    """Add the gateway to the plugins of vLLM's server. May be called more than once.

    Raises:
        HookError: vLLM has no such plugins.
    """
    from vllm import plugins

    load = _checked(plugins, LOADER, "supported_tasks")
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_with_ours(*args: Any, **kwargs: Any) -> list[Any]:
        return [*load(*args, **kwargs), GatewayPlugin()]

    setattr(plugins, LOADER, load_with_ours)


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
        from vllm import envs

        from dsv32_plugin.chat import thinking_requested
        from dsv32_plugin.vllm_adapter.rendering import DsaRenderer

        renderer = state.online_renderer.renderer
        if isinstance(renderer, DsaRenderer) and not renderer.has_template(args.chat_template):
            self._server = Server(
                default_thinking=thinking_requested(args.default_chat_template_kwargs),
                stores=envs.VLLM_ENABLE_RESPONSES_API_STORE,
                hides_unused_tools=args.exclude_tools_when_tool_choice_none,
            )


def _answer_anthropic_errors() -> None:
    """vLLM's router makes a 500 of every error of the Messages API: let the handler answer, as that of chats does."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    for name in ("create_messages", "count_tokens"):
        handler = _checked(AnthropicServingMessages, name, "self", "request", "raw_request")
        if not hasattr(handler, "__wrapped__"):
            setattr(AnthropicServingMessages, name, _answering(handler))


def _answering(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await handler(self, *args, **kwargs)
        except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
            return self.create_error_response(error)

    return answer


def _checked(owner: Any, name: str, *parameters: str) -> Callable[..., Any]:
    """The function of that name, which takes these parameters first."""
    found = getattr(owner, name, None)
    names = tuple(inspect.signature(found).parameters) if callable(found) else None
    if found is None or names is None or names[: len(parameters)] != parameters:
        shown = "nothing" if names is None else f"({', '.join(names)})"
        from vllm import __version__

        raise HookError(
            f"vllm {__version__}: expected {owner.__name__}.{name}({', '.join(parameters)}) to hook into, found "
            f"{shown}; install a release that dsv32-plugin is written for, or set DSV32_PLUGIN=0"
        )
    return found
