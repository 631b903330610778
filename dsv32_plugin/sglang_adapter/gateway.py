"""The gateway in SGLang's server, and what its own classes can't tell each other about a request."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from dsv32_plugin import apis, settings
from dsv32_plugin.apis.context import read_default, warn_without_effect
from dsv32_plugin.apis.conversation import IN_SCOPE, serve
from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.apis.gateway import Gateway
from dsv32_plugin.core.config import ENCODED
from dsv32_plugin.sglang_adapter import arguments
from dsv32_plugin.sglang_adapter.names import MODELS

if TYPE_CHECKING:
    from starlette.requests import Request

    from dsv32_plugin.sglang_adapter.upstream import (
        ChatCompletionRequest,
        OpenAIServingChat,
        OpenAIServingResponses,
        ResponsesRequest,
    )


def run_server_around(
    original: Callable[..., Any], server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any
) -> Any:
    """SGLang is about to serve: put the gateway in front, where conversations are rendered by our encoder."""
    if renders(tokenizer_manager):
        from dsv32_plugin.core import chat, prompt_tokens
        from dsv32_plugin.sglang_adapter.upstream import app, envs

        if given := getattr(arguments.in_effect(server_args), "default_chat_template_kwargs", None):
            raise NotImplementedError(
                f"--default-chat-template-kwargs: expected nothing for a model without a chat template, got {given}; "
                "leave it out; with SGLANG_DEFAULT_THINKING=1 a request that says nothing is thought about"
            )
        length = _context(tokenizer_manager)
        server = Server(
            default_thinking=bool(envs.SGLANG_DEFAULT_THINKING.get()),
            ends_prompts=False,
            context_tokens=length,
            plan=read_default(settings.context(), length),
            variant=chat.variant(tokenizer_manager.model_path, tokenizer_manager.served_model_name),
            count=partial(prompt_tokens.count, tokenizer_manager.tokenizer),
        )
        # Innermost: what others decompress or refuse comes before.
        app.user_middleware.append(_middleware(server))
    elif tokenizer_manager is not None and arguments.architecture(tokenizer_manager.model_config) in MODELS:
        warn_without_effect(settings.context())
    return original(server_args, tokenizer_manager, *args, **kwargs)


def renders(manager: Any) -> bool:
    """Whether our encoder renders this model's conversations, and not a template."""
    return bool(
        manager is not None
        and arguments.architecture(manager.model_config) in ENCODED
        and not getattr(manager.tokenizer, "chat_template", None)
    )


def _context(manager: Any) -> int:
    """Tokens of a prompt and its answer. The pool may hold fewer than the context; SGLang keeps six of either back."""
    most = getattr(manager, "max_req_input_len", None)
    return int(manager.context_len if most is None else min(manager.context_len, most + 6))


def _middleware(server: Server) -> Any:
    from starlette.middleware import Middleware

    return Middleware(Gateway, server=lambda: server)


def convert_around(
    original: Callable[..., Any],
    serving: OpenAIServingChat,
    request: ChatCompletionRequest,
    raw_request: Request | None = None,
) -> Any:
    """Chats and Anthropic's messages to the model's request. The latter's errors would be a 500 without a reason.

    SGLang 0.5.23 converts chats in another thread, without the context of the task that serves the request.
    """

    def convert() -> Any:
        try:
            return original(serving, request, raw_request)
        except ValueError as error:
            refuse(error)
            raise

    conversation = None if raw_request is None else raw_request.scope.get(IN_SCOPE)
    if apis.current() is conversation or conversation is None:
        return convert()
    context = copy_context()
    context.run(serve, conversation)
    return context.run(convert)


def thinking_around(original: Callable[..., bool], serving: OpenAIServingResponses, request: ResponsesRequest) -> bool:
    """Whether the answer of the Responses API begins inside the reasoning."""
    conversation = apis.current()
    return original(serving, request) if conversation is None else conversation.answer_thinks


def refuse(error: Exception) -> None:
    """Keep the reason of a refusal for the gateway, unless there is one: the first is the cause."""
    conversation = apis.current()
    if conversation is not None and conversation.refusal is None:
        conversation.refuse(error)
