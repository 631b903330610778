"""Chat requests to prompts: DeepSeek's own encoding wherever SGLang renders a V3.2 conversation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dsv32_plugin import apis
from dsv32_plugin.core import chat, prompt_tokens
from dsv32_plugin.sglang_adapter import gateway
from dsv32_plugin.sglang_adapter.names import PARSER_NAME
from dsv32_plugin.sglang_adapter.upstream import MessageProcessingResult

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import (
        AnthropicMessage,
        AnthropicMessagesRequest,
        AnthropicServing,
        ChatCompletionRequest,
        OpenAIServingChat,
    )


def template_around(
    original: Callable[..., MessageProcessingResult],
    serving: OpenAIServingChat,
    request: ChatCompletionRequest,
    tools: Any,
    is_multimodal: bool,
) -> MessageProcessingResult:
    """The prompt of a chat. A chat template, where the checkpoint brings one, is obeyed.

    V3.2 ships no template. V3.2-Exp ships the older V3.1 template, which is the format it was trained on.
    """
    if not encodes(serving):
        return original(serving, request, tools, is_multimodal)
    manager = serving.tokenizer_manager
    messages = [message.model_dump() for message in request.messages]
    options = {
        **(request.chat_template_kwargs or {}),
        "thinking": thinks(request),
        "tools": _functions(request),
        "continue_final_message": request.continue_final_message,
    }
    names = (manager.model_path, manager.served_model_name)
    count = partial(prompt_tokens.count, manager.tokenizer)
    prompt = apis.rendered(apis.current(), messages, options, chat.variant(*names), count)
    return MessageProcessingResult(
        prompt="",
        prompt_ids=prompt_tokens.encode(manager.tokenizer, prompt),
        image_data=None,
        video_data=None,
        audio_data=None,
        modalities=[],
        stop=request.stop,
    )


def encodes(serving: OpenAIServingChat) -> bool:
    """Whether the prompts of this server are ours."""
    return gateway.renders(serving.tokenizer_manager)


def history_around(
    original: Callable[..., ChatCompletionRequest], serving: AnthropicServing, request: AnthropicMessagesRequest
) -> ChatCompletionRequest:
    """Anthropic's conversation as Chat's, past thoughts as reasoning. Before 0.5.19 they become text."""
    if not encodes(serving.openai_serving_chat):
        return original(serving, request)
    answers = [message for message in request.messages if message.role == "assistant"]
    thoughts = ["\n".join(_thoughts(message)) for message in answers]
    messages = [_without_thoughts(message) for message in request.messages]
    chat_request = original(serving, request.model_copy(update={"messages": messages}))
    said = [message for message in chat_request.messages if message.role == "assistant"]
    for answer, thought in zip(said, thoughts, strict=True):
        answer.reasoning_content = thought or None
    return chat_request


def _thoughts(message: AnthropicMessage) -> list[str]:
    blocks = [] if isinstance(message.content, str) else message.content
    return [block.thinking for block in blocks if block.type == "thinking"]


def _without_thoughts(message: AnthropicMessage) -> AnthropicMessage:
    if message.role != "assistant" or isinstance(message.content, str):
        return message
    return message.model_copy(update={"content": [block for block in message.content if block.type != "thinking"]})


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
