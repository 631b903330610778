"""Fields of a request: what they must be, and those that belong to another API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .refusal import Refusal

CHAT: Mapping[str, str] = {
    "functions": "tools, which have taken its place",
    "function_call": "tool_choice, which has taken its place",
    "reasoning": 'reasoning_effort, or thinking: {"type": "enabled" or "disabled"}',
    "enable_thinking": 'chat_template_kwargs: {"enable_thinking": true or false}',
    "system": "a message of role system",
    "instructions": "a message of role system",
    "audio": "nothing: the model writes text only",
    "max_output_tokens": "max_completion_tokens",
}
RESPONSES: Mapping[str, str] = {
    "conversation": "input with the whole conversation, or previous_response_id; no conversation is kept by an id here",
    "prompt": "instructions and input; no prompt is kept by an id here",
    "system": "instructions",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": 'reasoning: {"effort": …}',
    "enable_thinking": 'reasoning: {"effort": "none"}, or chat_template_kwargs: {"enable_thinking": true or false}',
    "response_format": 'text: {"format": …}',
}
MESSAGES: Mapping[str, str] = {
    "instructions": "system",
    "reasoning_effort": 'thinking: {"type": "enabled" or "disabled"}',
    "reasoning": 'thinking: {"type": "enabled" or "disabled"}',
    "enable_thinking": 'thinking: {"type": "enabled" or "disabled"}',
    "response_format": 'output_config: {"format": …}',
}
"""By name: what to send in its place."""


def refuse_foreign(body: Mapping[str, Any], foreign: Mapping[str, str]) -> None:
    """Raises Refusal for a field that this API has not, or not here: nobody would read it."""
    for name, instead in foreign.items():
        if body.get(name) not in (None, [], ""):
            raise Refusal(f"{name}: not a field of this API as it is served here; send {instead}", param=name)


def flag(body: Mapping[str, Any], name: str) -> bool | None:
    """A field that is true, false or absent."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"{name}: expected true or false, got {value!r}", param=name)
    return value


def listed(value: Any, name: str) -> list[Any]:
    """A list; empty where there is none."""
    if value is not None and not isinstance(value, list):
        raise Refusal(f"{name}: expected a list, got {type(value).__name__}", param=name.partition(".")[0])
    return value or []
