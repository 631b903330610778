"""Chat requests to prompts: DeepSeek's own encoding wherever SGLang renders a V3.2 conversation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin import apis, chat
from dsv32_plugin.sglang_adapter import PARSER_NAME, gateway

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat


def encode_messages_around(
    original: Callable[..., list[int] | None],
    serving: OpenAIServingChat,
    messages: list[dict[str, Any]],
    request: ChatCompletionRequest,
    thinking_mode: Any,
    **of_other_models: Any,
) -> list[int] | None:
    """SGLang's place for encoders of one's own. A chat template, where the checkpoint brings one, is obeyed.

    V3.2 ships no template. V3.2-Exp ships the older V3.1 template, which is the format it was trained on.
    """
    manager = serving.tokenizer_manager
    if not gateway.renders(manager):
        return original(serving, messages, request, thinking_mode, **of_other_models)
    options = {
        **(request.chat_template_kwargs or {}),
        "thinking": thinks(request),
        "tools": _functions(request),
        "continue_final_message": request.continue_final_message,
    }
    names = (manager.model_path, manager.served_model_name)
    prompt = apis.rendered(apis.current(), messages, options, chat.variant(*names))
    ids: list[int] = manager.tokenizer.encode(prompt, add_special_tokens=False)
    return ids


def _functions(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The request's functions without what SGLang adds to them, in the usual order: the model reads this."""
    functions = []
    for tool in request.tools or []:
        fields = tool.function.model_dump(exclude_defaults=True)
        functions.append({key: fields[key] for key in ("name", "description", "parameters") if key in fields} | fields)
    return functions


def reasoning_around(original: Callable[..., bool], serving: OpenAIServingChat, request: ChatCompletionRequest) -> bool:
    """Whether the answer begins inside the reasoning: for our parser, whenever the prompt was made to."""
    return thinks(request) if serving.reasoning_parser == PARSER_NAME else original(serving, request)


def thinks(request: ChatCompletionRequest) -> bool:
    """Whether the answer begins inside the reasoning: as the gateway read the request, or else by the engine's fields.

    Those are `thinking` or `enable_thinking`; where neither is given, whether it asks for reasoning effort.
    """
    if (conversation := apis.current()) is not None:
        return conversation.answer_thinks
    kwargs = request.chat_template_kwargs or {}
    if kwargs.get("thinking") is None and kwargs.get("enable_thinking") is None:
        return request.reasoning_effort not in (None, "none")
    return chat.thinking_requested(kwargs)
