"""`--reasoning-parser dsv32` and `--tool-call-parser dsv32`: vLLM's two parser hooks over one state machine.

vLLM hands the stream to the reasoning parser until the reasoning ends, and what follows to the tool parser. Both are
"engine based" in vLLM's words: they keep their own state and are given each delta once, so that time stays linear.
How an answer ended vLLM does not say; `answers.AnswerParser`, which holds both, does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from xgrammar import StructuralTag

from dsv32_plugin.core.chat import call_grammar, feed_reasoning, text_of, thinking_requested
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
from dsv32_plugin.vllm_adapter.grammars import has_other_grammar, wanted_json
from dsv32_plugin.vllm_adapter.upstream import (
    ChatCompletionRequest,
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ReasoningParser,
    ResponsesRequest,
    TokenizerLike,
    Tool,
    ToolCall,
    ToolParser,
    make_tool_call_id,
)

Request: TypeAlias = ChatCompletionRequest | ResponsesRequest


class DsaReasoningParser(ReasoningParser):
    """Everything before `</think>` in answers to prompts that end with `<think>`."""

    engine_based_streaming = True
    ended_by_the_model = False
    """Known before the text, or its last piece, is parsed."""

    def __init__(self, tokenizer: TokenizerLike, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        try:
            self._start_id, self._end_id = self.vocab[THINK_START], self.vocab[THINK_END]
        except KeyError as error:
            raise ValueError(f"--reasoning-parser dsv32: the tokenizer has no token {error}") from error
        self._thinking = thinking_requested(kwargs.get("chat_template_kwargs"))
        self._parser = OutputParser(thinking=True, tool_calls=False)
        self._request: Request | None = None

    @property
    def reasoning_start_str(self) -> str:
        return str(THINK_START)

    @property
    def reasoning_end_str(self) -> str:
        return str(THINK_END)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        for token in reversed(input_ids):
            if token in (self._start_id, self._end_id):
                return token == self._end_id
        return not self._thinking

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        return self._end_id in delta_ids

    def has_engine_confirmed_reasoning_end(self) -> bool:
        return self._parser.reasoning_ended

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        if self._end_id not in input_ids:
            return [] if self._thinking else input_ids
        return input_ids[input_ids.index(self._end_id) + 1 :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        if not self._thinking:
            return 0
        return token_ids.index(self._end_id) if self._end_id in token_ids else len(token_ids)

    def extract_reasoning(self, model_output: str, request: Request) -> tuple[str | None, str | None]:
        if not self._thinking:
            return None, model_output
        parser = OutputParser(thinking=True, tool_calls=False)
        events, rest = feed_reasoning(parser, model_output)
        if not parser.reasoning_ended:
            events += parser.finish(ended=self.ended_by_the_model)
        return text_of(events, ReasoningDelta) or None, text_of(events, ContentDelta) + rest or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        events, rest = feed_reasoning(self._parser, delta_text)
        return _delta_message([*events, ContentDelta(rest)] if rest else events)

    def get_streaming_fallback_content(self, previous_text: str, request: Request) -> None:
        """Keep the request: vLLM names it here, when a stream ends inside the reasoning, just before the flush."""
        self._request = request

    def finish_streaming(self) -> DeltaMessage | None:
        """The stream is over, or the reasoning is: give out what was held back.

        Reasoning that was never closed may end with a whole block of calls, which no tool parser will be given.
        """
        if self._parser.reasoning_ended:
            return None
        events = self._parser.finish(ended=self.ended_by_the_model)
        if self._request is not None and (rest := text_of(events, ContentDelta)):
            calls = _calls_parser(self._request)
            events = [event for event in events if isinstance(event, ReasoningDelta)]
            events += calls.feed(rest) + calls.finish(ended=self.ended_by_the_model)
        return _delta_message(events)


class DsaToolParser(ToolParser):
    """DSML calls in what follows the reasoning. With `tool_choice` none everything stays content."""

    engine_based_streaming = True
    # A forced call is constrained to DSML, the format that the model was trained on, and not to bare JSON: see
    # get_structural_tag, which vLLM asks where structural_tag_model is set.
    structural_tag_model = "dsv32"
    supports_required_and_named = False
    ended_by_the_model = False
    """Known before the text, or its last piece, is parsed."""
    content: str | None = None
    """Of the text parsed last, what is no call."""
    value_is_open = True
    """That text stops inside the value of a parameter."""

    def __init__(self, tokenizer: TokenizerLike, tools: list[Tool] | None = None) -> None:
        super().__init__(tokenizer, tools)
        self._parser: OutputParser | None = None
        self._open_calls: set[int] = set()

    @property
    def call_is_open(self) -> bool:
        """A call has begun and is not complete."""
        return bool(self._open_calls)

    def adjust_request(self, request: Request) -> Request:
        """Keep special tokens in the text, whatever the client says: the mark of a call is one of them in V3.2."""
        request = super().adjust_request(request)
        if request.tools:
            request.skip_special_tokens = False
        return request

    def get_remaining_unstreamed_args(self) -> str:
        return ""

    def get_structural_tag(
        self, request: Request, *, reasoning: bool = False, strict_level: int = 0
    ) -> StructuralTag | None:
        """The grammar of the answer, where there is one; `strict_level` is the server's --tool-strict-level."""
        choice = request.tool_choice
        if choice is not None and not isinstance(choice, str):
            choice = getattr(choice, "name", None) or choice.function.name
        if choice in (None, "auto") and has_other_grammar(request):
            if any(tool.get("strict") or tool.get("function", {}).get("strict") for tool in _functions(request)):
                raise ValueError(
                    "structured_outputs: expected none beside strict tools, or json; both cannot be followed"
                )
            return None
        grammar = call_grammar(
            _functions(request),
            choice,
            parallel=request.parallel_tool_calls is not False,
            answer=wanted_json(request),
            strict=strict_level > 0,
        )
        return None if grammar is None else StructuralTag(**grammar.structural_tag)

    def extract_tool_calls(self, model_output: str, request: Request) -> ExtractedToolCallInformation:
        parser = _calls_parser(request)
        events = parser.feed(model_output) + parser.finish(ended=self.ended_by_the_model)
        self._open_calls = set()
        self._follow(events)
        self.content = text_of(events, ContentDelta) or None
        self.value_is_open = parser.value_is_open
        calls: list[FunctionCall] = []
        for event in events:
            if isinstance(event, ToolCallStart):
                calls.append(FunctionCall(name=event.name, arguments=""))
            elif isinstance(event, ToolCallArguments):
                calls[event.index].arguments += event.fragment
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[ToolCall(function=call) for call in calls],
            content=self.content,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Request,
    ) -> DeltaMessage | None:
        if self._parser is None:
            self._parser = _calls_parser(request)
        return _delta_message(self._follow(self._parser.feed(delta_text)))

    def finish_streaming(self) -> DeltaMessage | None:
        """The stream is over: give out what was held back."""
        if self._parser is None:
            return None
        return _delta_message(self._follow(self._parser.finish(ended=self.ended_by_the_model)))

    def _follow(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, ToolCallStart):
                self._open_calls.add(event.index)
            elif isinstance(event, ToolCallEnd):
                self._open_calls.discard(event.index)
        return events


def _functions(request: Request) -> list[dict[str, Any]]:
    """The request's tools that are functions; Responses knows others, which vLLM runs itself, and a batch has none."""
    tools = [tool.model_dump(exclude_none=True) for tool in getattr(request, "tools", None) or []]
    return [tool for tool in tools if tool["type"] == "function"]


def _calls_parser(request: Request) -> OutputParser:
    """A parser of what follows the reasoning."""
    tools = _functions(request)
    return OutputParser(tools, tool_calls=bool(tools) and request.tool_choice != "none", think_tags=False)


def _delta_message(events: list[Event]) -> DeltaMessage | None:
    """One chunk of the response; None where nothing is certain yet."""
    calls: list[DeltaToolCall] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            function = DeltaFunctionCall(name=event.name, arguments="")
            calls.append(DeltaToolCall(index=event.index, id=make_tool_call_id(), type="function", function=function))
        elif isinstance(event, ToolCallArguments):
            if calls and calls[-1].index == event.index and calls[-1].function is not None:
                calls[-1].function.arguments = (calls[-1].function.arguments or "") + event.fragment
            else:
                calls.append(DeltaToolCall(index=event.index, function=DeltaFunctionCall(arguments=event.fragment)))
    fields: dict[str, Any] = {"reasoning": text_of(events, ReasoningDelta), "content": text_of(events, ContentDelta)}
    fields = {name: value for name, value in fields.items() if value}
    if calls:
        fields["tool_calls"] = calls
    return DeltaMessage(**fields) if fields else None
