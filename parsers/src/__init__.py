"""Chat encoding and output parsing for DeepSeek-V3.2: standard library only.

    prompt = encode_messages(messages, tools=tools)
    message = OutputParser.parse(text, tools=tools, thinking=True)

docs/parsing.md has the format, the guarantees and what happens to damaged output.
"""

from .completion import DecodingError, parse_message_from_completion_text
from .encoding import encode_messages, render_calls, render_tools
from .events import (
    ContentDelta,
    Event,
    Message,
    Note,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    assemble,
    merge,
)
from .markup import Markup
from .messages import EncodingError
from .output_parser import OutputParser
from .unfinished import ended_parameters

__all__ = [
    "ContentDelta",
    "DecodingError",
    "EncodingError",
    "Event",
    "Markup",
    "Message",
    "Note",
    "OutputParser",
    "ReasoningDelta",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "assemble",
    "encode_messages",
    "ended_parameters",
    "merge",
    "parse_message_from_completion_text",
    "render_calls",
    "render_tools",
]
