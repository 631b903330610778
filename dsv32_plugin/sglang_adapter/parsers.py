"""`--reasoning-parser dsv32` and `--tool-call-parser dsv32`: SGLang's two parser hooks over one state machine.

SGLang hands the stream to the reasoning detector, and what that returns as normal text to the tool detector. How the
answer ended it tells neither: that rides on the text itself, see `LastText`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin.core.chat import feed_reasoning, text_of
from dsv32_plugin.parsers import (
    ContentDelta,
    Event,
    OutputParser,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from dsv32_plugin.parsers.protocol import THINK_END, THINK_START
from dsv32_plugin.sglang_adapter import arguments
from dsv32_plugin.sglang_adapter.upstream import (
    BaseFormatDetector,
    BaseReasoningFormatDetector,
    ReasoningResult,
    ToolCallItem,
    ToolResult,
)

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import FunctionCallParser


class LastText(str):
    """The last text of an answer: nothing follows it. SGLang hands its parsers text and no more.

    It is true even where it is empty, since SGLang passes over a step that brings no text.
    """

    __slots__ = ("ended",)
    ended: bool
    """The model ended its turn itself: it was not cut off, nor stopped."""

    def __new__(cls, text: str, *, ended: bool) -> LastText:
        self = super().__new__(cls, text)
        self.ended = ended
        return self

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, place: Any) -> LastText:
        """What SGLang has not yet read of it is the last text, too."""
        return LastText(super().__getitem__(place), ended=self.ended)


class DsaReasoningDetector(BaseReasoningFormatDetector):
    """Everything before `</think>` in answers to prompts that end with `<think>`.

    Args, beside SGLang's own:
        force_reasoning: the prompt ended with `<think>`; None where only the text can tell.
        tool_call_parser_active: what follows the reasoning goes to the tool detector, which must see it as it is.
    """

    def __init__(
        self,
        stream_reasoning: bool = True,
        force_reasoning: bool | None = None,
        continue_final_message: bool = False,
        previous_content: str | None = None,
        tool_call_parser_active: bool = False,
    ) -> None:
        super().__init__(
            THINK_START,
            THINK_END,
            force_reasoning=bool(force_reasoning),
            stream_reasoning=stream_reasoning,
            continue_final_message=continue_final_message,
            previous_content=previous_content or "",
            reasoning_default="explicit_thinking",
        )
        self.tool_call_parser_active = tool_call_parser_active
        self._told = force_reasoning is not None
        # A final message that is continued is past its reasoning once it has content.
        thinking = bool(force_reasoning) and not previous_content
        self._parser = OutputParser(thinking=thinking, tool_calls=False, think_tags=thinking)
        self._content: OutputParser | None = None
        self._unsaid = ""

    def detect_and_parse(self, text: str) -> ReasoningResult:
        if not self._told and (THINK_END in text or text.startswith(THINK_START)):
            self._parser = OutputParser(thinking=True, tool_calls=False)
        return self._parse(text if isinstance(text, LastText) else LastText(text, ended=False))

    def parse_streaming_increment(self, new_text: str) -> ReasoningResult:
        result = self._parse(new_text)
        if self.stream_reasoning:
            return result
        # The reasoning is said at once, when it is whole.
        self._unsaid += result.reasoning_text
        if not (isinstance(new_text, LastText) or self._parser.reasoning_ended):
            return ReasoningResult()
        result.reasoning_text, self._unsaid = self._unsaid, ""
        return result

    def finish(self) -> ReasoningResult:
        """The stream is over: what was held back. Nothing where the last text has been seen."""
        result = self.parse_streaming_increment(LastText("", ended=False))
        # From 0.5.18 on SGLang adds what is true to the last text, whose sum would not say how the answer ended.
        result.normal_text = str(result.normal_text)
        return result

    def _parse(self, text: str) -> ReasoningResult:
        events, rest = feed_reasoning(self._parser, str(text))
        last = isinstance(text, LastText)
        if last and not self._parser.reasoning_ended:
            events += self._parser.finish()
        result = ReasoningResult(reasoning_text=text_of(events, ReasoningDelta))
        content = text_of(events, ContentDelta) + rest
        if not self.tool_call_parser_active:
            result.normal_text = self._say(content, last)
        else:
            result.normal_text = LastText(content, ended=text.ended) if isinstance(text, LastText) else content
        return result

    def _say(self, content: str, last: bool) -> str:
        """Content that no other parser takes special tokens out of."""
        if self._content is None:
            self._content = OutputParser(tool_calls=False, think_tags=False)
        events = self._content.feed(content) if content else []
        if last:
            events += self._content.finish()
        return text_of(events, ContentDelta)


class DsaToolDetector(BaseFormatDetector):
    """DSML calls in what follows the reasoning."""

    def __init__(self) -> None:
        super().__init__()
        self._parser: OutputParser | None = None
        self.incomplete_tool_call_indices: set[int] = set()
        """Calls that the end of the text has cut off; empty before the end. 0.5.23 asks for it by this name."""
        self._open: set[int] = set()

    @property
    def value_is_open(self) -> bool:
        """The text, which is over, stops inside the value of a parameter."""
        return self._parser is None or self._parser.value_is_open

    def has_tool_call(self, text: str) -> bool:
        """SGLang asks before it parses. Every text is parsed: it may hold special tokens, which are taken out."""
        return True

    def detect_and_parse(self, text: str, tools: list[Any]) -> ToolResult:
        return self.parse_streaming_increment(
            text if isinstance(text, LastText) else LastText(text, ended=False), tools
        )

    def parse_streaming_increment(self, new_text: str, tools: list[Any]) -> ToolResult:
        """`tools` are the request's, in any of SGLang's forms."""
        if self._parser is None:
            self._parser = OutputParser(_functions(tools), think_tags=False)
        events = self._parser.feed(str(new_text)) if str(new_text) else []
        if isinstance(new_text, LastText):
            events += self._parser.finish(ended=new_text.ended)
        self._open |= {event.index for event in events if isinstance(event, ToolCallStart)}
        self._open -= {event.index for event in events if isinstance(event, ToolCallEnd)}
        if isinstance(new_text, LastText):
            self.incomplete_tool_call_indices |= self._open
        return _tool_result(events)

    def finish(self, tools: list[Any]) -> ToolResult:
        """The stream is over: what was held back. Nothing where the last text has been seen."""
        return self.parse_streaming_increment(LastText("", ended=False), tools)

    def supports_structural_tag(self) -> bool:
        """A forced call is constrained to DSML, the format that the model was trained on, and not to bare JSON."""
        return True

    def structure_info(self) -> Any:
        raise NotImplementedError("dsv32 calls have a grammar of their own: see constraint_around")


def reasoning_parser_around(
    original: Callable[..., None],
    parser: Any,
    model_type: str | None = None,
    stream_reasoning: bool = True,
    force_reasoning: bool | None = None,
    request: Any = None,
    **options: Any,
) -> None:
    """Tell the detector whether a tool detector follows, as 0.5.18 does."""
    original(parser, model_type, stream_reasoning, force_reasoning, request, **options)
    if isinstance(parser.detector, DsaReasoningDetector) and getattr(request, "tools", None):
        follows = request.tool_choice != "none" and arguments.of_process().tool_call_parser is not None
        parser.detector.tool_call_parser_active = follows


def parse_around(
    original: Callable[..., tuple[str, list[ToolCallItem]]], function_parser: FunctionCallParser, full_text: str
) -> tuple[str, list[ToolCallItem]]:
    """What the detector makes of a whole text, also where that is no call: SGLang returns it unread then."""
    if not isinstance(function_parser.detector, DsaToolDetector):
        return original(function_parser, full_text)
    result = function_parser.detector.detect_and_parse(full_text, function_parser.tools)
    return result.normal_text, result.calls


def constraint_around(
    original: Any,
    function_parser: Any,
    tool_choice: Any,
    parallel_tool_calls: bool = True,
    thinking_mode: bool = False,
) -> Any:
    """Whether there is a grammar of calls; `grammars.process_around`, which knows the whole request, puts it in.

    SGLang's own way to it knows nothing of `parallel_tool_calls` and drops errors.
    """
    if not isinstance(function_parser.detector, DsaToolDetector):
        return original(function_parser, tool_choice, parallel_tool_calls, thinking_mode)
    return None if tool_choice in ("auto", "none") else ("structural_tag", None)


def _functions(tools: list[Any]) -> list[dict[str, Any]]:
    """Chat's tools are pydantic models, those of `/parse_function_call` msgspec structs."""
    fields = ("name", "description", "parameters", "strict")
    functions = [{name: getattr(tool.function, name, None) for name in fields} for tool in tools]
    return [{name: value for name, value in function.items() if value is not None} for function in functions]


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
