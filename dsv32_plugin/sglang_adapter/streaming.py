"""The end of a stream: SGLang does not tell its parsers, and ours hold back what may be the beginning of markup."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin.sglang_adapter import PARSER_NAME

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat


async def generate_around(
    original: Callable[..., AsyncIterator[str]], serving: OpenAIServingChat, **step: Any
) -> AsyncIterator[str]:
    """SGLang's chunks of one step of a stream; at the last step the parsers know that it is."""
    if step["finish_reason_type"] is not None:
        await _announce_end(serving, step)
    async for chunk in original(serving, **step):
        yield chunk


async def _announce_end(serving: OpenAIServingChat, step: dict[str, Any]) -> None:
    """Set `ending` in this answer's parsers, which SGLang makes when they are first given text."""
    index, content, request = step["index"], step["content"], step["request"]
    if serving.reasoning_parser == PARSER_NAME and request.separate_reasoning:
        parsers = step["reasoning_parser_dict"]
        serving._process_reasoning_stream(index, "", parsers, content, request)
        parsers[index].detector.ending = True
    if serving.tool_call_parser == PARSER_NAME and request.tools and request.tool_choice != "none":
        parsers = step["parser_dict"]
        async for _ in serving._process_tool_call_stream(
            index, "", parsers, content, request, step["has_tool_calls"], step["continuous_usage_stats"]
        ):
            pass
        parsers[index].detector.ending = True
