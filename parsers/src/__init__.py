"""Chat encoding and output parsing for DeepSeek-V3.2: standard library only."""

from .encoding import encode_messages, render_calls, render_tools
from .messages import EncodingError

__all__ = ["EncodingError", "encode_messages", "render_calls", "render_tools"]
