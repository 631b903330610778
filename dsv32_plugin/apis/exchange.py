"""What the gateway is told about one request: what the engine gets, and how the answer is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv32_plugin.parsers import Markup
from dsv32_plugin.parsers.encoding import Variant

from .context import Plan
from .conversation import Conversation
from .refusal import Refusal

JsonObject = dict[str, Any]
_OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_TEXT = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"
)
"""Whole characters and escape sequences inside a JSON string."""


class Answer:
    """How an answer is changed on its way to the client: not at all."""

    changes = False

    def whole(self, answer: JsonObject) -> JsonObject:
        """Of an answer that isn't streamed."""
        return answer

    def event(self, event: JsonObject) -> list[JsonObject]:
        """Of an event of a stream: what is sent for it."""
        return [event]


@dataclass
class Exchange:
    """A request that was read.

    Attributes:
        body: the engine's request.
        conversation: what its encoder hook renders.
        answer: what becomes of the answer.
        is_batch: there are others than this conversation, and the engine renders each from its own request.
    """

    body: JsonObject
    conversation: Conversation
    answer: Answer = field(default_factory=Answer)
    is_batch: bool = False


@dataclass(frozen=True)
class Server:
    """What the APIs must know of the server.

    Attributes:
        default_thinking: whether it thinks where a request doesn't say.
        stores: whether it stores answers of the Responses API.
        hides_unused_tools: whether a prompt is without tools where none may be called.
        ends_prompts: whether the engine is told how a prompt ends. SGLang 0.5.23 refuses that without a template.
        context_tokens: tokens of a prompt and its answer.
        plan: what is done with conversations whose requests don't say.
        variant: of the model.
        count: the tokens of a prompt; None leaves it to the engine's encoder hook to carry plans out.
    """

    default_thinking: bool = False
    stores: bool = True
    hides_unused_tools: bool = False
    ends_prompts: bool = True
    context_tokens: int = 131072
    plan: Plan | None = None
    variant: Variant = "v3.2"
    count: Callable[[Markup], int] | None = None


def openai_error(refusal: Refusal) -> JsonObject:
    error = {"message": str(refusal), "type": "invalid_request_error", "param": refusal.param, "code": refusal.code}
    return {"error": error}


def arguments_of(text: str) -> Mapping[str, Any]:
    """A call's arguments; empty where they are no JSON object."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, Mapping) else {}


def input_of(text: str) -> str:
    """The raw text of a custom tool's call, as far as it came; the arguments themselves where they hold none."""
    value = arguments_of(text).get("input")
    if isinstance(value, str):
        return value
    cut = InputText()
    said = cut.feed(text)
    return said if cut.has_begun else text


class InputText:
    """The raw text of a custom tool's call, as its arguments `{"input": "…"}` arrive.

    An escape sequence waits until it is whole, and half of a surrogate pair for the other half.
    """

    def __init__(self) -> None:
        self._unread = ""
        self.has_begun = False
        self.sent = ""

    def feed(self, fragment: str) -> str:
        """The text that this fragment adds."""
        self._unread += fragment
        if not self.has_begun:
            opening = _OPENING.match(self._unread)
            if opening is None:
                return ""
            self.has_begun, self._unread = True, self._unread[opening.end() :]
        run = _TEXT.match(self._unread)
        assert run is not None
        self._unread = self._unread[run.end() :]
        return self._send(json.loads(f'"{run[0]}"', strict=False))

    def finish(self, arguments: str) -> str:
        """What is missing of the text, once the arguments are whole."""
        text = input_of(arguments)
        return self._send(text[len(self.sent) :]) if text.startswith(self.sent) else ""

    def _send(self, text: str) -> str:
        self.sent += text
        return text
