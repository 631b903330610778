"""`--reasoning-parser dsv32` and `--tool-call-parser dsv32`: SGLang's two parser hooks over one state machine.

SGLang hands the stream to the reasoning detector, and what that returns as normal text to the tool detector. That the
stream is over it says by `finish`; 0.5.15 does not, and `streaming` sets `ending`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.function_call.base_format_detector import BaseFormatDetector
from sglang.srt.function_call.core_types import StreamingParseResult as ToolResult
from sglang.srt.function_call.core_types import ToolCallItem
from sglang.srt.parser.reasoning_parser import BaseReasoningFormatDetector
from sglang.srt.parser.reasoning_parser import StreamingParseResult as ReasoningResult

from dsv32_plugin.chat import feed_reasoning, text_of
from dsv32_plugin.parsers import (
    ContentDelta,
    Event,
    OutputParser,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from dsv32_plugin.parsers.protocol import THINK_END, THINK_START
from dsv32_plugin.parsers.tags import ANY_MARK

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice


class DsaReasoningDetector(BaseReasoningFormatDetector):
    """Everything before `</think>` in answers to prompts that end with `<think>`."""

    def __init__(
        self,
        stream_reasoning: bool = True,
        force_reasoning: bool = False,
        continue_final_message: bool = False,
        previous_content: str | None = None,
    ) -> None:
        super().__init__(
            THINK_START,
            THINK_END,
            force_reasoning=force_reasoning,
            stream_reasoning=stream_reasoning,
            continue_final_message=continue_final_message,
            previous_content=previous_content or "",
            reasoning_default="explicit_thinking",
        )
        # A final message that is continued is past its reasoning once it has content.
        thinking = force_reasoning and not previous_content
        self._parser = OutputParser(thinking=thinking, tool_calls=False, think_tags=thinking)
        self._unsaid = ""
        self.ending = False
        """The text that comes next is the last."""

    def detect_and_parse(self, text: str) -> ReasoningResult:
        self.ending = True
        return self._parse(text)

    def parse_streaming_increment(self, new_text: str) -> ReasoningResult:
        result = self._parse(new_text)
        if self.stream_reasoning:
            return result
        # The reasoning is said at once, when it is whole.
        self._unsaid += result.reasoning_text
        if not (self.ending or self._parser.reasoning_ended):
            return ReasoningResult()
        reasoning, self._unsaid = self._unsaid, ""
        return ReasoningResult(reasoning_text=reasoning, normal_text=result.normal_text)

    def finish(self) -> ReasoningResult:
        """The stream is over: what was held back."""
        self.ending = True
        return self.parse_streaming_increment("")

    def _parse(self, text: str) -> ReasoningResult:
        events, rest = feed_reasoning(self._parser, text)
        if self.ending and not self._parser.reasoning_ended:
            events += self._parser.finish()
        return ReasoningResult(
            reasoning_text=text_of(events, ReasoningDelta), normal_text=text_of(events, ContentDelta) + rest
        )


class DsaToolDetector(BaseFormatDetector):
    """DSML calls in what follows the reasoning."""

    def __init__(self) -> None:
        super().__init__()
        self._parser: OutputParser | None = None
        self.ending = False
        """The text that comes next is the last."""

    def has_tool_call(self, text: str) -> bool:
        return ANY_MARK.search(text) is not None

    def detect_and_parse(self, text: str, tools: list[Tool]) -> ToolResult:
        self.ending = True
        result = self.parse_streaming_increment(text, tools)
        if not result.calls:
            # SGLang has announced calls by now, on the word of has_tool_call; an error makes it take that back.
            raise ValueError("the answer mentions the markup of calls but holds none; it is passed on as it is")
        return result

    def parse_streaming_increment(self, new_text: str, tools: list[Tool]) -> ToolResult:
        if self._parser is None:
            self._parser = OutputParser(_functions(tools), think_tags=False)
        events = self._parser.feed(new_text)
        if self.ending:
            events += self._parser.finish()
        return _tool_result(events)

    def finish(self, tools: list[Tool]) -> ToolResult:
        """The stream is over: what was held back."""
        self.ending = True
        return self.parse_streaming_increment("", tools)

    def supports_structural_tag(self) -> bool:
        """A forced call is constrained to DSML, the format that the model was trained on, and not to bare JSON."""
        return True

    def structure_info(self) -> Any:
        raise NotImplementedError("dsv32 calls have a grammar of their own: see constraint_around")


def constraint_around(
    original: Any,
    function_parser: Any,
    tool_choice: ToolChoice | str,
    parallel_tool_calls: bool = True,
    thinking_mode: bool = False,
) -> Any:
    """Whether there is a grammar of calls; `grammars.process_around`, which knows the whole request, puts it in.

    SGLang's own way to it knows nothing of `parallel_tool_calls` and drops errors.
    """
    if not isinstance(function_parser.detector, DsaToolDetector):
        return original(function_parser, tool_choice, parallel_tool_calls, thinking_mode)
    return None if tool_choice in ("auto", "none") else ("structural_tag", None)


def _functions(tools: list[Tool]) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in tools]


def _tool_result(events: list[Event]) -> ToolResult:
    """One chunk of the response; fragments of one call are joined."""
    calls: list[ToolCallItem] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            calls.append(ToolCallItem(tool_index=event.index, name=event.name, parameters=""))
        elif isinstance(event, ToolCallArguments):
            if calls and calls[-1].tool_index == event.index:
                calls[-1].parameters += event.fragment
            else:
                calls.append(ToolCallItem(tool_index=event.index, parameters=event.fragment))
    return ToolResult(normal_text=text_of(events, ContentDelta), calls=calls)
