"""What both engines do with a chat: the request to a prompt, and the parts of an answer to what they return."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dsv32_plugin import settings
from dsv32_plugin.parsers import ContentDelta, Event, Markup, OutputParser, ReasoningDelta, encode_messages
from dsv32_plugin.parsers.constraint import Format, forced_calls, optional_calls
from dsv32_plugin.parsers.encoding import Variant

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
    return encode_messages(
        messages,
        thinking_mode="thinking" if thinking_requested(options) else "chat",
        variant=variant,
        allow_developer=settings.allow_developer_role(),
        always_answer=True,
        **{name: options[name] for name in _ENCODER_OPTIONS if options.get(name) is not None},
    )


def call_grammar(tools: Sequence[Mapping[str, Any]], choice: str | None, *, parallel: bool) -> Format | None:
    """The grammar of the answer: calls only where one is forced, well-formed calls where a tool is `strict`.

    Args:
        tools: the request's functions, wrapped or bare.
        choice: "auto" (or None), "none", "required", or the name of the function to call.
        parallel: allow more than one call.
    """
    if not tools or choice == "none":
        return None
    if choice in (None, "auto"):
        strict = any((tool.get("function") or tool).get("strict") for tool in tools)
        return optional_calls(tools, parallel=parallel) if strict else None
    if choice != "required":
        tools = [tool for tool in tools if (tool.get("function") or tool)["name"] == choice]
        if not tools:
            raise ValueError(f"tool_choice: expected one of the request's tools, got {choice}")
    return forced_calls(tools, parallel=parallel)


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
