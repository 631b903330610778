"""What the parser says: events while the text arrives, and the message they add up to."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """Call number `index` (from 0) of the function `name` begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of call `index`.

    The fragments of a call concatenate to one JSON object; those of a call without a `ToolCallEnd` to the beginning of
    one, which lacks at least the last brace.
    """

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """Call `index` is complete. A call that the output stops in has no such event."""

    index: int


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass(frozen=True, slots=True)
class Note:
    """One departure from the well-formed text: its class (see docs/parsing.md), where, and the text concerned.

    Attributes:
        code: the class of damage.
        offset: index of the character of the output it was seen at.
        detail: the markup, name or text concerned.
    """

    code: str
    offset: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call: the function's name and its arguments.

    Attributes:
        name: the function.
        arguments: the text of one JSON object, or of its beginning (at least `{`) where the call is not complete.
        complete: the model finished the call; False where the output stops inside it.
    """

    name: str
    arguments: str
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Message:
    """An assistant message, taken apart."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    notes: tuple[Note, ...] = field(default=(), compare=False)

    def to_openai(self) -> dict[str, Any]:
        """The message as DeepSeek's own parser returns it; feed it back to `encode_messages` as it is."""
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ],
        }


def merge(events: Iterable[Event]) -> list[Event]:
    """Join adjacent deltas of one kind (and one call): what is left does not depend on how the text was cut."""
    merged: list[Event] = []
    run: list[str] = []  # texts of the deltas that will become one
    last: Event | None = None
    for event in events:
        text = _delta_text(event)
        if run and not (text is not None and last is not None and _same_stream(last, event)):
            merged.append(_with_text(last, "".join(run)))
            run = []
        if text is None:
            merged.append(event)
        else:
            run.append(text)
        last = event
    if run:
        merged.append(_with_text(last, "".join(run)))
    return merged


def assemble(events: Iterable[Event], notes: Iterable[Note] = ()) -> Message:
    """The message that a complete list of events describes."""
    reasoning: list[str] = []
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    complete: set[int] = set()
    for event in events:
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ToolCallStart):
            names.append(event.name)
            arguments.append([])
        elif isinstance(event, ToolCallArguments):
            arguments[event.index].append(event.fragment)
        else:
            complete.add(event.index)
    calls = tuple(ToolCall(name, "".join(arguments[i]), i in complete) for i, name in enumerate(names))
    return Message("".join(reasoning), "".join(content), calls, tuple(notes))


def _delta_text(event: Event) -> str | None:
    if isinstance(event, ToolCallArguments):
        return event.fragment
    return event.text if isinstance(event, (ReasoningDelta, ContentDelta)) else None


def _same_stream(a: Event, b: Event) -> bool:
    if type(a) is not type(b):
        return False
    return not isinstance(a, ToolCallArguments) or a.index == b.index  # type: ignore[union-attr]


def _with_text(event: Event | None, text: str) -> Event:
    if isinstance(event, ToolCallArguments):
        return ToolCallArguments(event.index, text)
    return ReasoningDelta(text) if isinstance(event, ReasoningDelta) else ContentDelta(text)
