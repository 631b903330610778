"""Grammars of answers in SGLang: what a request's format and its tools ask for together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from xgrammar import StructuralTag

from dsv32_plugin import apis
from dsv32_plugin.core.chat import call_grammar
from dsv32_plugin.sglang_adapter.arguments import in_effect
from dsv32_plugin.sglang_adapter.names import PARSER_NAME

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import ChatCompletionRequest, ResponsesRequest

logger = logging.getLogger(__name__)
OPTION = "--grammar-backend"
_text_format: ContextVar[Any] = ContextVar("text_format", default=None)
"""What a request of Responses says of its answer, which its inner chat request does not."""
responses_request: ContextVar[ResponsesRequest | None] = ContextVar("responses_request", default=None)
"""The request of Responses that is being served."""


def warn_of_backend(backend: str | None) -> None:
    """Say at the start what a backend that is not the default can't do."""
    if backend not in (None, "xgrammar"):
        logger.warning(
            "dsv32: %s %s: forced calls, strict tools and response_format beside tools will be refused; "
            "they need xgrammar, which is the default",
            OPTION,
            backend,
        )


def process_around(
    original: Callable[..., Any], serving: Any, request: ChatCompletionRequest, *args: Any, **kwargs: Any
) -> Any:
    """The prompt of a chat, and the grammar of its answer: SGLang drops that of the calls where there is another."""
    conversation = apis.current()
    unseen = _text_format.get() if conversation is None else conversation.answer_format or _text_format.get()
    schema = _schema_of(request.response_format) or _schema_of(unseen)
    grammar = _grammar_of_calls(serving, request, schema) if serving.tool_call_parser == PARSER_NAME else None
    result = original(serving, request, *args, **kwargs)
    if grammar is not None:
        result.tool_call_constraint = ("structural_tag", StructuralTag(**grammar.structural_tag))
        request.response_format = request.regex = request.ebnf = None
    elif (
        unseen is not None
        and schema is not None
        and request.response_format is None
        and result.tool_call_constraint is None
    ):
        result.tool_call_constraint = ("json_schema", schema)
    return result


async def create_responses_around(
    original: Callable[..., Any], serving: Any, request: ResponsesRequest, raw_request: Any = None
) -> Any:
    """Keep `text.format` for the grammar; before 0.5.18 SGLang does not know it."""
    body = {} if raw_request is None else await raw_request.json()
    text = body.get("text") if isinstance(body, dict) else None
    token = _text_format.set(text.get("format") if isinstance(text, dict) else None)
    asked = responses_request.set(request)
    try:
        return await original(serving, request, raw_request)
    except ValueError as error:
        return serving.create_error_response(str(error))
    finally:
        _text_format.reset(token)
        responses_request.reset(asked)


def responses_parameters_around(
    original: Callable[..., dict[str, Any]], request: ResponsesRequest, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The grammar of the calls says what `text.format` does; from 0.5.18 on SGLang refuses to have both."""
    if kwargs.get("tool_call_constraint") is not None and getattr(request, "text", None) is not None:
        request = request.model_copy(update={"text": None})
    return original(request, *args, **kwargs)


def _schema_of(response_format: Any) -> Any:
    """The JSON schema of an answer; None where it need not be JSON."""
    if response_format is None:
        return None
    if not isinstance(response_format, dict):
        response_format = response_format.model_dump(by_alias=True)
    if response_format.get("type") == "json_object":
        return {"type": "object"}
    if response_format.get("type") != "json_schema":
        return None
    wanted = response_format.get("json_schema") or response_format
    schema = wanted.get("schema")
    return json.loads(schema) if isinstance(schema, str) else schema


def _grammar_of_calls(serving: Any, request: ChatCompletionRequest, schema: Any) -> Any:
    choice = request.tool_choice if isinstance(request.tool_choice, str) else request.tool_choice.function.name
    tools = [tool.function.model_dump(exclude_none=True) for tool in request.tools or []]
    grammar = call_grammar(tools, choice, parallel=request.parallel_tool_calls is not False, answer=schema)
    if grammar is None:
        return None
    format_type = getattr(request.response_format, "type", None)
    if choice == "auto" and (request.regex or request.ebnf or format_type == "structural_tag"):
        raise ValueError(
            "regex, ebnf, response_format of type structural_tag: expected none beside strict tools, "
            "or a response_format of JSON; both cannot be followed"
        )
    backend = in_effect(serving.tokenizer_manager.server_args).grammar_backend
    if backend != "xgrammar":
        raise ValueError(
            f"tool_choice, strict tools, response_format beside tools: expected {OPTION} xgrammar (the default), "
            f"which alone reads their grammar; this server was started with {backend}"
        )
    return grammar
