"""Answers of Chat and Anthropic: what the parsers are told of an answer's end, and what SGLang says of a cut one."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from dsv32_plugin.core.chat import is_complete
from dsv32_plugin.parsers import ended_parameters
from dsv32_plugin.sglang_adapter import upstream
from dsv32_plugin.sglang_adapter.arguments import in_effect
from dsv32_plugin.sglang_adapter.names import PARSER_NAME
from dsv32_plugin.sglang_adapter.parsers import DsaToolDetector, LastText
from dsv32_plugin.sglang_adapter.upstream import FunctionResponse, ToolCall, ToolCallProcessingResult

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import (
        AnthropicMessagesResponse,
        AnthropicServing,
        ChatCompletionRequest,
        ChatCompletionResponse,
        OpenAIServingChat,
    )


class _Function(FunctionResponse):
    """What is called, and whether its arguments stop inside a value."""

    _value_is_open: bool = PrivateAttr(default=True)


def parses_calls(serving: OpenAIServingChat, request: ChatCompletionRequest) -> bool:
    """Whether our tool detector is given the answer to this request."""
    return serving.tool_call_parser == PARSER_NAME and bool(request.tools) and request.tool_choice != "none"


def parses_reasoning(serving: OpenAIServingChat, request: ChatCompletionRequest) -> bool:
    """Whether our reasoning detector is given the answer to this request."""
    return serving.reasoning_parser == PARSER_NAME and request.separate_reasoning


def keep_special_tokens_around(
    original: Callable[..., None], serving: OpenAIServingChat, request: ChatCompletionRequest
) -> None:
    """The detokenizer leaves special tokens in what a parser of ours reads, the mark of calls among them.

    The parsers take out what is no text. A request's own `skip_special_tokens` is obeyed where it loses no calls.
    """
    original(serving, request)
    chosen = "skip_special_tokens" in request.model_fields_set
    if parses_calls(serving, request) or (parses_reasoning(serving, request) and not chosen):
        request.skip_special_tokens = False


def last_text(serving: OpenAIServingChat, output: Mapping[str, Any]) -> str:
    """The text of an output of the engine, marked if the answer ends with it."""
    finish = output["meta_info"].get("finish_reason")
    return output["text"] if finish is None else LastText(output["text"], ended=_ended_turn(serving, finish))


def _ended_turn(serving: OpenAIServingChat, finish: Mapping[str, Any]) -> bool:
    """The model wrote one of its own end tokens; a stop string is text, a request's stop token another number."""
    manager = serving.tokenizer_manager
    ends = {manager.tokenizer.eos_token_id, *(manager.model_config.hf_eos_token_id or ())}
    return finish["type"] == "stop" and finish.get("matched") in ends


def tag_by_tag(output: dict[str, Any], said: int, *, incremental: bool) -> Iterator[dict[str, Any]]:
    """An output as steps that end with a tag. Of a step SGLang says the content first, and that ends an open call.

    Args:
        output: its text is all that was said so far, or what is new, if `incremental`.
        said: where the new text begins.
    """
    text, start = output["text"], said
    unfinished = {**output["meta_info"], "finish_reason": None}
    for tag_end in re.finditer(">(?=.)", text[said:], re.DOTALL):
        end = said + tag_end.end()
        yield {**output, "text": text[start if incremental else 0 : end], "meta_info": unfinished}
        start = end
    yield {**output, "text": text[start if incremental else 0 :]}


def says_new_text_only(serving: OpenAIServingChat) -> bool:
    """Whether outputs of the engine hold what is new, and not all that was said so far."""
    published = getattr(upstream, "get_serving", None)
    options = published() if published is not None else in_effect(serving.tokenizer_manager.server_args)
    return bool(options.incremental_streaming_output)


async def stream_around(
    original: Callable[..., AsyncIterator[str]], serving: OpenAIServingChat, **step: Any
) -> AsyncIterator[str]:
    """SGLang's chunks of one step of a stream. A call that is cut off is not what the answer finished with."""
    content, request, index = step["content"], step["request"], step["index"]
    outputs = iter([content])
    if parses_calls(serving, request):
        incremental = says_new_text_only(serving)
        said = 0 if incremental else step["stream_offsets"].get(index, 0)
        outputs = tag_by_tag(content, said, incremental=incremental)
    marks = parses_calls(serving, request) or parses_reasoning(serving, request)
    for output in outputs:
        finish = output["meta_info"].get("finish_reason")
        part = {**step, "finish_reason_type": finish["type"] if finish else None}
        part["content"] = {**output, "text": last_text(serving, output)} if marks else output
        async for chunk in original(serving, **part):
            yield chunk
        step["choice_logprobs"] = None
    detector = getattr(step["parser_dict"].get(index), "detector", None)
    if isinstance(detector, DsaToolDetector) and detector.incomplete_tool_call_indices:
        step["has_tool_calls"][index] = False


def decode_around(original: Callable[..., Any], serving: OpenAIServingChat, ret_item: dict[str, Any]) -> Any:
    """The text of a whole answer."""
    text = original(serving, ret_item)
    ours = PARSER_NAME in (serving.reasoning_parser, serving.tool_call_parser)
    return last_text(serving, {**ret_item, "text": text}) if ours and isinstance(text, str) else text


def process_tool_calls_around(
    original: Callable[..., ToolCallProcessingResult],
    serving: OpenAIServingChat,
    text: str,
    tools: list[Any],
    finish_reason: dict[str, Any],
    tool_choice: Any = None,
    history_tool_calls_cnt: int = 0,
    *of_other_parsers: Any,
) -> ToolCallProcessingResult:
    """The content and the calls of a whole answer. It finished with calls only if none of them is cut off."""
    if serving.tool_call_parser != PARSER_NAME:
        return original(serving, text, tools, finish_reason, tool_choice, history_tool_calls_cnt, *of_other_parsers)
    detector = DsaToolDetector()
    result = detector.detect_and_parse(text, tools)
    calls = [
        ToolCall(
            id=serving._process_tool_call_id(call, history_tool_calls_cnt),
            index=call.tool_index,
            function=_Function(name=call.name, arguments=call.parameters),
        )
        for call in result.calls
    ]
    for call in calls:
        call.function._value_is_open = detector.value_is_open
    if calls and finish_reason["type"] == "stop" and not detector.incomplete_tool_call_indices:
        finish_reason.update(type="tool_calls", matched=None)
    return ToolCallProcessingResult(calls or None, result.normal_text, finish_reason)


def convert_around(
    original: Callable[..., AnthropicMessagesResponse], serving: AnthropicServing, response: ChatCompletionResponse
) -> AnthropicMessagesResponse:
    """A whole answer of Anthropic's: the input of a call that is cut off holds the parameters that ended."""
    for choice in response.choices if serving.openai_serving_chat.tool_call_parser == PARSER_NAME else ():
        for call in choice.message.tool_calls or ():
            if not is_complete(call.function.arguments):
                value_is_open = getattr(call.function, "_value_is_open", True)
                parameters, _ = ended_parameters(call.function.arguments, value_is_open=value_is_open)
                call.function.arguments = json.dumps(parameters, ensure_ascii=False)
    return original(serving, response)
