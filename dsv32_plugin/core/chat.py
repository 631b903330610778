"""What both engines do with a chat: the request to a prompt, and the parts of an answer to what they return."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from dsv32_plugin import settings
from dsv32_plugin.parsers import ContentDelta, Event, Markup, OutputParser, ReasoningDelta, encode_messages
from dsv32_plugin.parsers.constraint import Grammar, forced_calls, optional_calls, schema_or_calls
from dsv32_plugin.parsers.encoding import Variant

logger = logging.getLogger("vllm.dsv32_plugin")
_LONGEST_LINE = 2000
SPECIALE: Literal["speciale"] = "speciale"
_ENCODER_OPTIONS = ("tools", "response_format", "drop_thinking", "add_generation_prompt", "continue_final_message")
_UP_TO_TAG_END = re.compile(r"[^>]*>?")


def variant(*names: str | None) -> Variant:
    """What the settings say, or else what the model's names do."""
    return settings.variant() or (SPECIALE if any(SPECIALE in (name or "").lower() for name in names) else "v3.2")


def thinking_requested(chat_template_kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a request's `chat_template_kwargs` ask for thinking; off where they don't say.

    Raises:
        ValueError: for what is neither true nor false.
    """
    return template_switch(chat_template_kwargs) or False


def template_switch(chat_template_kwargs: Mapping[str, Any] | None) -> bool | None:
    """`thinking`, or else `enable_thinking`, which vLLM sets for requests with a `reasoning_effort`; None for neither.

    Raises:
        ValueError: for what is neither true nor false.
    """
    switches = {name: (chat_template_kwargs or {}).get(name) for name in ("thinking", "enable_thinking")}
    for name, value in switches.items():
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"chat_template_kwargs: {name}: expected true or false, got {value!r}")
    return switches["enable_thinking"] if switches["thinking"] is None else switches["thinking"]


def render(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], variant: Variant) -> Markup:
    """The prompt of a request. `options` are its `chat_template_kwargs` and what the engine adds to them."""
    if options.get("documents"):
        raise ValueError("documents: expected none, got some; DeepSeek-V3.2 has no place for them, use a message")
    if options.get("context"):
        raise ValueError(
            "context: expected none here, got some; ask for a strategy in a request to the server, or by DSV32_CONTEXT"
        )
    return encode_messages(
        messages,
        thinking_mode="thinking" if thinking_requested(options) else "chat",
        variant=variant,
        allow_developer=settings.allow_developer_role(),
        always_answer=True,
        **{name: options[name] for name in _ENCODER_OPTIONS if options.get(name) is not None},
    )


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str | None,
    *,
    parallel: bool,
    answer: Any = None,
    strict: bool = False,
) -> Grammar | None:
    """The grammar of an answer to a request with tools; None where it is free.

    Nothing but calls where one is forced; else JSON or calls where the request wants JSON; else text in which calls
    are well-formed, where a tool is `strict`.

    Args:
        tools: the request's functions, wrapped or bare.
        choice: "auto" (or None), "none", "required", or the name of the function to call.
        parallel: allow more than one call.
        answer: the JSON schema of what is answered without a call; None for text.
        strict: take every tool as `strict`.

    Raises:
        ValueError: no tool of that name, or what is given as a schema is none.
    """
    if not tools or choice == "none":
        return None
    if choice not in (None, "auto", "required"):
        tools = [tool for tool in tools if (tool.get("function") or tool)["name"] == choice]
        if not tools:
            raise ValueError(f"tool_choice: expected one of the request's tools, got {choice}")
    kind = "optional" if choice in (None, "auto") else "forced"
    strict = strict or any((tool.get("function") or tool).get("strict") for tool in tools)
    if kind == "optional" and answer is None and not strict:
        return None
    return _grammar(kind, *_as_text(tools, answer), parallel)


def json_grammar(schema: Any) -> Grammar:
    """The grammar of an answer that is JSON by a schema."""
    return _grammar("answer", *_as_text([], schema), True)


def _as_text(*values: Any) -> list[str]:
    try:
        return [json.dumps(value) for value in values]
    except RecursionError as error:
        raise ValueError("tools, response_format: expected JSON schemas, got one that is nested too deep") from error


@lru_cache(maxsize=64)
def _grammar(kind: str, tools: str, answer: str, parallel: bool) -> Grammar:
    """Conversations ask for the same one turn by turn."""
    functions, schema = json.loads(tools), json.loads(answer)
    if kind == "forced":
        grammar = forced_calls(functions, parallel=parallel)
    elif kind == "optional" and schema is None:
        grammar = optional_calls(functions, parallel=parallel)
    else:
        grammar = schema_or_calls(schema, functions, parallel=parallel)
    if grammar.left_out:
        logger.warning("dsv32: schemas are enforced but for: %s", "; ".join(grammar.left_out)[:_LONGEST_LINE])
    return grammar


def is_complete(arguments: str) -> bool:
    """Whether a call was parsed to its end: the arguments of one that was cut are no JSON."""
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    return True


def feed_reasoning(parser: OutputParser, text: str) -> tuple[list[Event], str]:
    """Feed text until the reasoning ends; returns its events, and the text after the end untouched."""
    events: list[Event] = []
    # The reasoning ends with a tag: fed tag by tag, the parser never reads past the end.
    position = 0
    while position < len(text) and not parser.reasoning_ended:
        match = _UP_TO_TAG_END.match(text, position)
        assert match is not None
        events += parser.feed(match[0])
        position = match.end()
    return events, text[position:]


def text_of(events: Iterable[Event], kind: type[ReasoningDelta] | type[ContentDelta]) -> str:
    """The reasoning, or the content, in some events."""
    return "".join(event.text for event in events if isinstance(event, kind))
