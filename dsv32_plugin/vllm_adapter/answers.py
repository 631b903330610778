"""How an answer ended: from vLLM's engine to the parsers, and from them to what the answer is labelled.

vLLM hands its parsers a text and not what ended it, and calls whatever holds a call `tool_calls`. So the last piece of
a text says itself how it ended, and what is made of an answer that was cut says so to the endpoints (see `endpoints`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import PrivateAttr

from dsv32_plugin.vllm_adapter.parsers import DsaReasoningParser, DsaToolParser, Request
from dsv32_plugin.vllm_adapter.upstream import (
    CompletionOutput,
    DelegatingParser,
    DeltaMessage,
    FunctionCall,
    ResponsesRequest,
    StructuredOutputsParams,
    TokenizerLike,
)


@dataclass(frozen=True)
class Finish:
    """Why the engine ended an answer."""

    reason: str
    """As vLLM says it: stop, length, abort, ..."""
    stop_reason: int | str | None = None
    """The stop string or stop token that came; None for the tokenizer's EOS."""

    def is_by_the_model(self, request: Request) -> bool:
        """The model ended its turn itself, by its EOS or by another that its generation_config.json names."""
        asked_for = getattr(request, "stop_token_ids", None) or ()
        own = self.stop_reason is None or (isinstance(self.stop_reason, int) and self.stop_reason not in asked_for)
        return self.reason == "stop" and own

    @classmethod
    def from_tokens(cls, token_ids: Sequence[int], request: Request, tokenizer: TokenizerLike) -> Finish:
        """Of a text that says nothing: that of a beam search, or one that another server generated."""
        eos = tokenizer.eos_token_id
        ended = bool(token_ids) and token_ids[-1] == eos and not getattr(request, "ignore_eos", False)
        return cls("stop" if ended else "length")


class FinishedText(str):
    """The text of an answer that is over, or its last piece."""

    finish: Finish

    def __new__(cls, text: str, finish: Finish) -> FinishedText:
        made = super().__new__(cls, text)
        made.finish = finish
        return made

    def __radd__(self, earlier: str) -> FinishedText:
        """vLLM joins the pieces of a text: it ends as the last one does."""
        return FinishedText(str.__add__(earlier, self), self.finish)


def finish_text(output: CompletionOutput) -> CompletionOutput:
    """Make the text of an output say how it ended, if it has."""
    if output.finish_reason is not None:
        output.text = FinishedText(output.text, Finish(output.finish_reason, output.stop_reason))
    return output


class CutDelta(DeltaMessage):
    """The last piece of an answer that was cut."""

    _reason: str = PrivateAttr()


class CutCall(FunctionCall):
    """A call of an answer that was cut; it may be whole itself."""

    _reason: str = PrivateAttr()
    _value_is_open: bool = PrivateAttr()


def cut_reason(part: Any) -> str | None:
    """The engine's finish reason, of a part that was made of a cut answer."""
    return part._reason if isinstance(part, CutDelta | CutCall) else None


class AnswerParser(DelegatingParser):
    """Mixed into the parser that vLLM makes of its two hooks: tells both how the answer ended."""

    def parse(
        self,
        model_output: str,
        request: Request,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[FunctionCall] | None]:
        finish = self._hear(model_output, model_output_token_ids, request)
        reasoning, content, calls = super().parse(model_output, request, enable_auto_tools, model_output_token_ids)
        if calls and self._is_cut(finish):
            calls = [_marked(CutCall, call, finish) for call in calls]
            for call in calls:
                call._value_is_open = self._tool_parser.value_is_open
        return reasoning, content, calls

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Request,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        finish = self._hear(delta_text, delta_token_ids, request) if finished else None
        delta = super().parse_delta(delta_text, delta_token_ids, request, prompt_token_ids, finished=finished)
        if finish is None or not self._is_cut(finish):
            return delta
        return _marked(CutDelta, delta or DeltaMessage(), finish)

    def _extract_tool_calls(
        self, content: str | None, request: Request, enable_auto_tools: bool = False
    ) -> tuple[list[FunctionCall] | None, str | None]:
        """vLLM returns the raw text where there is no call; the parser may have taken markup off it."""
        if not isinstance(self._tool_parser, DsaToolParser):
            return super()._extract_tool_calls(content, request, enable_auto_tools)
        self._tool_parser.content = content
        calls, rest = super()._extract_tool_calls(content, request, enable_auto_tools)
        return calls, rest if calls else self._tool_parser.content

    def _apply_structural_tag(self, request: Request) -> Request:
        """The parser's grammar says it all. vLLM 0.31 and later add response_format, or ask for none at all."""
        parser, choice = self._tool_parser, request.tool_choice
        if not isinstance(parser, DsaToolParser):
            return super()._apply_structural_tag(request)
        is_named = hasattr(choice, "name") or hasattr(choice, "function")
        if not request.tools or not (is_named or choice in ("auto", "required")):
            return request
        strict_level = getattr(self, "tool_strict_level", None) or 0
        tag = parser.get_structural_tag(request, strict_level=strict_level)
        if tag is None:
            return request
        request.structured_outputs = StructuredOutputsParams(structural_tag=json.dumps(tag.model_dump()))
        if isinstance(request, ResponsesRequest):
            request.text = None
        else:
            request.response_format = None
        return request

    def _hear(self, text: str, token_ids: Sequence[int], request: Request) -> Finish:
        if isinstance(text, FinishedText):
            finish = text.finish
        else:
            finish = Finish.from_tokens(token_ids, request, self.model_tokenizer)
        for parser in (self._reasoning_parser, self._tool_parser):
            if isinstance(parser, DsaReasoningParser | DsaToolParser):
                parser.ended_by_the_model = finish.is_by_the_model(request)
        return finish

    def _is_cut(self, finish: Finish) -> bool:
        """Whether the answer must not look finished."""
        return isinstance(self._tool_parser, DsaToolParser) and (
            finish.reason != "stop" or self._tool_parser.call_is_open
        )


def _marked(kind: Any, part: Any, finish: Finish) -> Any:
    made = kind(**{name: getattr(part, name) for name in part.model_fields_set})
    made._reason = finish.reason
    return made
