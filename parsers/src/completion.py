"""DeepSeek's strict reading of a complete output, on top of `OutputParser`."""

from typing import Any, Literal

from .output_parser import OutputParser
from .protocol import BOS, CALLS_END, DSML, EOS, THINK_END, THINK_START

_ABOUT_VALUES = frozenset(
    {
        "not_json",
        "unbalanced_json",
        "raw_control_character",
        "stray_backslash",
        "half_surrogate_pair",
        "trailing_comma",
        "python_literal",
    }
)
"""Notes about what a value holds, which DeepSeek's function does not look at."""


class DecodingError(ValueError):
    """The text is not a well-formed assistant message; names the reason and where it was seen."""


def parse_message_from_completion_text(text: str, thinking_mode: Literal["thinking", "chat"]) -> dict[str, Any]:
    """Parse a complete, well-formed output as DeepSeek's function of this name does.

    Args:
        text: what the model wrote after the prompt, with its EOS (which may be missing after tool calls).
        thinking_mode: the mode of the prompt.

    Returns:
        `{"role": "assistant", "content", "reasoning_content", "tool_calls"}`, each call in OpenAI's shape.

    Raises:
        DecodingError: the text is not exactly what `encode_messages` would render for a message. Use `OutputParser`
            to recover what can be recovered.
    """
    if thinking_mode not in ("thinking", "chat"):
        raise ValueError(f"thinking_mode must be 'thinking' or 'chat', got {thinking_mode!r}")
    message = OutputParser.parse(text, thinking=thinking_mode == "thinking", policy="strict")
    for note in message.notes:
        if note.code not in _ABOUT_VALUES:
            raise DecodingError(f"{note.code} at character {note.offset}: {note.detail}")
    if not text.endswith(EOS) and not text.endswith(CALLS_END):
        raise DecodingError(f"the text must end with {EOS}")
    for token in (BOS, EOS, THINK_START, THINK_END, DSML):
        if token in message.content or token in message.reasoning:
            raise DecodingError(f"special token {token} in the text")
    if any(f"/{DSML}parameter" in call.arguments for call in message.tool_calls):
        raise DecodingError("a value holds the end tag of a parameter")
    return message.to_openai()
