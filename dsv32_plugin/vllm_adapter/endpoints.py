"""What vLLM's endpoints say of an answer that was cut: hooks on chat completions, Responses and Anthropic messages.

They are put in where a server composes its parser of ours, and change nothing of an answer that ended well. A call is
cut where its arguments are no JSON: that is how `OutputParser` leaves them open.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from openai.types.responses import ResponseIncompleteEvent as OpenAIResponseIncompleteEvent
from openai.types.responses import ResponseOutputItemDoneEvent
from openai.types.responses.response import IncompleteDetails

from dsv32_plugin.core.chat import is_complete
from dsv32_plugin.parsers import ended_parameters
from dsv32_plugin.vllm_adapter import hooks, upstream
from dsv32_plugin.vllm_adapter.answers import cut_reason, finish_text
from dsv32_plugin.vllm_adapter.upstream import (
    AnthropicMessagesResponse,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionOutput,
    ResponseCompletedEvent,
    ResponsesResponse,
)

CUT_SHORT = "max_output_tokens"


def finished_output(original: Callable[..., CompletionOutput], *args: Any, **kwargs: Any) -> CompletionOutput:
    """The engine's output, whose text says how it ended."""
    return finish_text(original(*args, **kwargs))


def labelled_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A piece of a chat completion, as vLLM 0.33 makes it: what the engine says of an answer that was cut stays."""
    step = original(*args, **kwargs)
    reason = cut_reason(step.delta)
    return step if reason is None else step._replace(finish_reason=reason)


async def labelled_chat(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A whole chat completion, as vLLM 0.33 makes it: `tool_calls` only of a choice that was not cut."""
    response = await original(*args, **kwargs)
    for choice in response.choices if isinstance(response, ChatCompletionResponse) else ():
        reasons = [reason for call in choice.message.tool_calls if (reason := cut_reason(call.function)) is not None]
        choice.finish_reason = reasons[0] if reasons else choice.finish_reason
    return response


def labelled_choice(original: Callable[..., Any], choice: Any, request: ChatCompletionRequest) -> Any:
    """A choice of a chat completion, or a piece of one: `tool_calls` only if it was not cut and has calls."""
    streamed = hasattr(choice, "delta")
    parts = [choice.delta] if streamed else [call.function for call in choice.message.tool_calls]
    reasons = [reason for part in parts if (reason := cut_reason(part)) is not None]
    choice = original(choice, request)
    if choice.finish_reason == "tool_calls":
        if reasons:
            choice.finish_reason = reasons[0]
        elif not streamed and not choice.message.tool_calls:
            choice.finish_reason = "stop"
    return choice


async def whole_response(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A response of the Responses API: incomplete where a call of it is."""
    response = await original(*args, **kwargs)
    if isinstance(response, ResponsesResponse):
        _mark_incomplete(response)
    return response


def _mark_incomplete(response: ResponsesResponse) -> None:
    for item in response.output:
        _label_call(item)
    open_calls = [item for item in response.output if _is_open_call(item)]
    if response.status == "completed" and open_calls:
        response.status = "incomplete"
        # OpenAI names two reasons, and this is neither: a stop string, or a model that ended inside a call.
        response.incomplete_details = IncompleteDetails(reason=None)
    elif _is_cut_short(response) and response.output and response.output[-1].type in ("message", "reasoning"):
        response.output[-1].status = "incomplete"


def _is_cut_short(response: ResponsesResponse) -> bool:
    details = response.incomplete_details
    return response.status == "incomplete" and details is not None and details.reason == CUT_SHORT


def _label_call(item: Any) -> None:
    """A call is complete once it is whole, also where vLLM 0.33 goes by the limit."""
    if item.type == "function_call":
        item.status = "incomplete" if _is_open_call(item) else "completed"


def _is_open_call(item: Any) -> bool:
    return item.type == "function_call" and not is_complete(item.arguments)


class ResponseIncompleteEvent(OpenAIResponseIncompleteEvent):
    """As vLLM's own events: the response is vLLM's."""

    response: ResponsesResponse


async def streamed_response(
    original: Callable[..., AsyncIterator[Any]], *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """The events of a response: items that were cut are incomplete, and so is the response at the end.

    vLLM 0.33 has an event for that itself.
    """
    done: Any = None  # the event of an item, held back: it is the last one, or not
    async for event in original(*args, **kwargs):
        ended = event.type in ("response.completed", "response.incomplete")
        if done is not None:
            if ended and _is_cut_short(event.response) and done.item.type in ("message", "reasoning"):
                done.item.status = "incomplete"
            yield done
            done = None
        if isinstance(event, ResponseOutputItemDoneEvent):
            done = event
            _label_call(done.item)
        elif isinstance(event, ResponseCompletedEvent) and event.response.status == "incomplete":
            fields = {"sequence_number": event.sequence_number, "response": event.response}
            yield ResponseIncompleteEvent(type="response.incomplete", **fields)
        else:
            yield event
    if done is not None:
        yield done


async def background_events(
    original: Callable[..., AsyncIterator[Any]], *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """vLLM waits for `response.completed`."""
    async for event in original(*args, **kwargs):
        yield event
        if event.type == "response.incomplete":
            return


def whole_message(
    original: Callable[..., AnthropicMessagesResponse], serving: Any, completion: ChatCompletionResponse
) -> AnthropicMessagesResponse:
    """A message of Anthropic's API. `input` is an object, so that of a call that was cut holds what ended."""
    choice = completion.choices[0]
    is_cut = any(cut_reason(call.function) is not None for call in choice.message.tool_calls)
    for call in choice.message.tool_calls:
        if not is_complete(call.function.arguments):
            value_is_open = getattr(call.function, "_value_is_open", True)
            ended, _ = ended_parameters(call.function.arguments, value_is_open=value_is_open)
            call.function = call.function.model_copy(update={"arguments": json.dumps(ended)})
    message = original(serving, completion)
    # Up to 0.28 vLLM does not say that a stop sequence came; from 0.32 on every call is a use of a tool.
    if choice.finish_reason == "stop" and (is_cut or message.stop_reason == "end_turn"):
        stop_sequence = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        message.stop_reason = "end_turn" if stop_sequence is None else "stop_sequence"
        message.stop_sequence = stop_sequence
    return message


async def streamed_message(
    original: Callable[..., AsyncIterator[str]], serving: Any, completion: AsyncGenerator[Any, None]
) -> AsyncIterator[str]:
    """The events of a message, with the same reasons for its end."""
    stop_sequence: str | None = None
    arguments: str | None = None  # of the last call

    async def chunks() -> AsyncIterator[Any]:
        nonlocal stop_sequence
        async for chunk in completion:
            # 0.33 hands objects on, and says itself that a stop sequence came.
            if isinstance(chunk, str) and '"stop_reason":"' in chunk:
                for choice in json.loads(chunk.removeprefix("data:"))["choices"]:
                    stop_sequence = choice["stop_reason"] if choice["finish_reason"] == "stop" else None
            yield chunk

    async for event in original(serving, chunks()):
        head, _, data = event.partition("data: ")
        if head.startswith("event: content_block_start\n") and '"tool_use"' in data:
            arguments = ""
        elif '"input_json_delta"' in data and arguments is not None:
            arguments += json.loads(data)["delta"]["partial_json"]
        elif head.startswith("event: message_delta\n"):
            content = json.loads(data)
            delta = content["delta"]
            if delta["stop_reason"] == "end_turn" and stop_sequence is not None:
                delta |= {"stop_reason": "stop_sequence", "stop_sequence": stop_sequence}
            elif delta["stop_reason"] == "tool_use" and arguments is not None and not is_complete(arguments):
                delta["stop_reason"] = "end_turn"
            event = f"{head}data: {json.dumps(content, ensure_ascii=False)}\n\n"
        yield event


HOOKS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("RequestState._new_completion_output", finished_output),
    ("OpenAIServingResponses.responses_full_generator", whole_response),
    ("OpenAIServingResponses.responses_stream_generator", streamed_response),
    ("OpenAIServingResponses.responses_background_stream_generator", background_events),
    ("AnthropicServingMessages.messages_full_converter", whole_message),
    ("AnthropicServingMessages.message_stream_converter", streamed_message),
)
"""Where vLLM's own code is left, one of `upstream.PLACES`, and what is called there."""


LABELS: tuple[tuple[str, Callable[..., Any]], ...] = (("maybe_filter_parallel_tool_calls", labelled_choice),)
"""Of chats, up to 0.32."""
ASSEMBLED_LABELS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("ChatStreamProcessor.step", labelled_step),
    ("OpenAIServingChat.chat_completion_full_generator", labelled_chat),
)
"""The same where `upstream.assembles_chats`."""


def hook() -> None:
    """Put the hooks in; raises `hooks.HookError` where vLLM has no such place."""
    for place, around in HOOKS + (ASSEMBLED_LABELS if upstream.assembles_chats() else LABELS):
        hooks.at(place, around)
