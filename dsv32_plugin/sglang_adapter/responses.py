"""Answers of the Responses API: what the parsers are told, and a cut answer that says so.

0.5.23 has a status for calls and answers that are cut off. From 0.5.18 on an answer that reached its limit has one;
before, every answer is completed.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Literal

from dsv32_plugin.core.chat import is_complete
from dsv32_plugin.sglang_adapter import requests, upstream
from dsv32_plugin.sglang_adapter.answers import last_text, says_new_text_only, tag_by_tag
from dsv32_plugin.sglang_adapter.grammars import responses_request
from dsv32_plugin.sglang_adapter.names import PARSER_NAME
from dsv32_plugin.sglang_adapter.upstream import ResponsesResponse

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import GenerateReqInput, OpenAIServingResponses, ResponsesRequest

INCOMPLETE: Literal["incomplete"] = "incomplete"
MARKED = ("response.output_item.done", "response.completed", "response.incomplete", "response.failed")
"""Events that tell of an end. From 0.5.20 on the last one says by its name how the answer ended."""


class CutResponse(ResponsesResponse):
    """Before 0.5.18 there is no such status."""

    status: Literal["incomplete"]


def history_around(
    original: Callable[..., list[Any]],
    serving: OpenAIServingResponses,
    request: ResponsesRequest,
    *args: Any,
    **options: Any,
) -> list[Any]:
    """The messages of a request. Arguments that do not end stay as they are: SGLang makes `{}` of them."""
    messages = original(serving, request, *args, **options)
    if serving.tool_call_parser != PARSER_NAME:
        return messages
    said = {}
    for item in _history(serving, request):
        fields = item if isinstance(item, dict) else item.model_dump()
        if fields.get("type") == "function_call" and isinstance(fields.get("arguments"), str):
            said[fields.get("call_id") or fields.get("id")] = fields["arguments"]
    for message in messages:
        for call in (message.get("tool_calls") or ()) if isinstance(message, dict) else ():
            arguments = said.get(call["id"])
            if arguments and not is_complete(arguments):
                call["function"]["arguments"] = arguments
    return messages


def _history(serving: OpenAIServingResponses, request: ResponsesRequest) -> list[Any]:
    stored = getattr(serving, "_response_input_history", None)
    if stored is not None:
        return list(stored(request))
    return [] if isinstance(request.input, str) else list(request.input)


def outputs_around(
    original: Callable[..., AsyncIterator[Any]],
    serving: OpenAIServingResponses,
    request_id: str,
    request_prompt: Any,
    adapted_request: GenerateReqInput,
    *args: Any,
    **options: Any,
) -> AsyncIterator[Any]:
    """What the engine says, the last text marked. What it would refuse inside the stream is refused before."""
    if PARSER_NAME not in (serving.reasoning_parser, serving.tool_call_parser):
        return original(serving, request_id, request_prompt, adapted_request, *args, **options)
    requests.check_sampling(serving.tokenizer_manager, adapted_request)
    if not upstream.keeps_special_tokens():
        adapted_request.sampling_params["skip_special_tokens"] = False
    if not upstream.defers_grammars_of_responses():
        # Else the grammar of the answer would hold for the thoughts before it.
        adapted_request.require_reasoning = serving._is_thinking_enabled_for_request(responses_request.get())
    contexts = original(serving, request_id, request_prompt, adapted_request, *args, **options)
    return _marked(contexts, serving, adapted_request)


async def _marked(
    contexts: AsyncIterator[Any], serving: OpenAIServingResponses, adapted_request: GenerateReqInput
) -> AsyncIterator[Any]:
    said = 0
    async for context in contexts:
        output = getattr(context, "last_output", None)
        if not isinstance(output, dict):
            yield context
        elif upstream.knows_cut_answers() or not adapted_request.stream:
            context.last_output = {**output, "text": last_text(serving, output)}
            yield context
        else:
            incremental = says_new_text_only(serving)
            for step in tag_by_tag(output, 0 if incremental else said, incremental=incremental):
                context.last_output = {**step, "text": last_text(serving, step)}
                yield context
            said = len(output["text"])


def build_around(
    original: Callable[..., ResponsesResponse],
    request: ResponsesRequest,
    sampling_params: Any,
    *,
    output: list[Any],
    status: str,
    **options: Any,
) -> ResponsesResponse:
    """An answer of 0.5.23 with a call that is cut off is not completed, also where no limit was reached."""
    cut = status == "completed" and any(getattr(item, "status", None) == INCOMPLETE for item in output)
    response = original(request, sampling_params, output=output, status=INCOMPLETE if cut else status, **options)
    if cut:
        # SGLang knows but one reason, the limit.
        response.incomplete_details = None
    return response


async def whole_around(
    original: Callable[..., Any],
    serving: OpenAIServingResponses,
    request: ResponsesRequest,
    sampling_params: Any,
    result_generator: Any,
    context: Any,
    *args: Any,
    **options: Any,
) -> Any:
    """A whole answer of a release before 0.5.23, which says so if it is cut."""
    response = await original(serving, request, sampling_params, result_generator, context, *args, **options)
    if serving.tool_call_parser != PARSER_NAME or not isinstance(response, ResponsesResponse):
        return response
    return await _stored_as_cut(serving, response, context.last_output["meta_info"].get("finish_reason"))


async def stream_around(
    original: Callable[..., AsyncIterator[str]],
    serving: OpenAIServingResponses,
    request: ResponsesRequest,
    sampling_params: Any,
    result_generator: AsyncIterator[Any],
    *args: Any,
    **options: Any,
) -> AsyncIterator[str]:
    """The events of a release before 0.5.23; the last ones say so if the answer is cut."""
    finish: dict[str, Any] | None = None

    async def outputs() -> AsyncIterator[Any]:
        nonlocal finish
        async for context in result_generator:
            finish = context.last_output["meta_info"].get("finish_reason")
            yield context

    async for event in original(serving, request, sampling_params, outputs(), *args, **options):
        name, _, data = event.partition("\ndata: ")
        kind = name.removeprefix("event: ")
        if serving.tool_call_parser != PARSER_NAME or kind not in MARKED:
            yield event
            continue
        fields = json.loads(data)
        if kind == "response.output_item.done":
            _mark(fields["item"])
        else:
            response = fields["response"]
            said = _said_of(response["output"], finish, response["status"])
            response |= said
            fields["type"] = kind = "response.incomplete" if said else kind
            if stored := serving.response_store.get(request.request_id):
                await _stored_as_cut(serving, stored, finish)
        yield f"event: {kind}\ndata: {json.dumps(fields, ensure_ascii=False)}\n\n"


async def _stored_as_cut(
    serving: OpenAIServingResponses, response: ResponsesResponse, finish: dict[str, Any] | None
) -> ResponsesResponse:
    """The response, or in its place one that says that it is cut."""
    items = [item.model_dump() for item in response.output]
    said = _said_of(items, finish, response.status)
    for item, fields in zip(response.output, items, strict=True):
        if fields.get("status") == INCOMPLETE:
            item.status = INCOMPLETE
    if not said:
        return response
    cut = CutResponse.model_construct(**{**dict(response), **said})
    async with serving.response_store_lock:
        if serving.response_store.get(response.id) is response:
            serving.response_store[response.id] = cut
    return cut


def _said_of(items: list[dict[str, Any]], finish: dict[str, Any] | None, status: str) -> dict[str, Any]:
    """What a response says of itself that is cut, nothing of others and of one that failed; cut calls are marked."""
    marked = [_mark(item) for item in items]
    limited = finish is not None and finish["type"] == "length"
    if status == "failed" or not (limited or any(marked)):
        return {}
    return {"status": INCOMPLETE, "incomplete_details": {"reason": "max_output_tokens"} if limited else None}


def _mark(item: dict[str, Any]) -> bool:
    """Whether the item is a call that is cut off, which it says from now on."""
    cut = item["type"] == "function_call" and not is_complete(item["arguments"])
    if cut:
        item["status"] = INCOMPLETE
    return cut
