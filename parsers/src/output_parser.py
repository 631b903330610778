"""The output parser: three machines, from the model's text to reasoning, content and tool calls.

`prose` reads reasoning and content, `block` the tags of calls, `value` the text of an argument; each hands over to the
next and takes over again where that ends. docs/parsing.md has the format, the guarantees and the table of damage. The
text is read once, from left to right; what may be the beginning of markup is held back until it is decided, and markup
is short, so little is ever held.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .events import Event, Message, Note, assemble, merge
from .prose import Prose
from .protocol import EOS
from .schema import Tools
from .turn import Turn

Policy = Literal["repair", "strict"]
Phase = Literal["reasoning", "content", "tool_call"]


class OutputParser:
    """Parses what the model writes after the prompt, as it arrives.

    Args:
        tools: the request's tools, wrapped or bare; empty means not known. Their schemas type the arguments whose
            `string` attribute is missing, and tell a damaged call of a real function from a quotation.
        thinking: the prompt ended with `<think>`, so the text begins inside the reasoning.
        policy: "repair" recovers what is unambiguous, "strict" takes damaged markup for text; both leave a note.
        tool_calls: False leaves all DSML in the content (no tools, tool_choice "none", or another parser follows).
        think_tags: False leaves `<think>` and `</think>` in the content (another parser took the reasoning off).
            Not with `thinking`.

    The concatenated events of `feed` and `finish` do not depend on how the text was cut, after `merge`.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        policy: Policy = "repair",
        *,
        tool_calls: bool = True,
        think_tags: bool = True,
    ):
        if policy not in ("repair", "strict"):
            raise ValueError(f"policy must be 'repair' or 'strict', got {policy!r}")
        if thinking and not think_tags:
            raise ValueError("thinking=True needs think_tags=True: reasoning ends at </think>")
        self._repair = policy == "repair"
        self._turn = Turn()
        self._prose = Prose(
            self._turn, Tools(tools), self._repair, thinking=thinking, tool_calls=tool_calls, think_tags=think_tags
        )
        self._held = ""
        self._finished = False

    @classmethod
    def parse(
        cls,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        policy: Policy = "repair",
        *,
        tool_calls: bool = True,
        think_tags: bool = True,
        ended: bool = False,
    ) -> Message:
        """Parse a complete output; same arguments as the constructor and `finish`."""
        parser = cls(tools, thinking, policy, tool_calls=tool_calls, think_tags=think_tags)
        events = parser.feed(text)
        events += parser.finish(ended=ended)
        return assemble(events, parser.notes)

    @property
    def phase(self) -> Phase:
        """What the text read so far ends in."""
        if self._prose.in_reasoning:
            return "reasoning"
        return "tool_call" if self._prose.block.is_open else "content"

    @property
    def reasoning_ended(self) -> bool:
        """The text is past the reasoning, or had none."""
        return self.phase != "reasoning"

    @property
    def value_is_open(self) -> bool:
        """The output, which is over, stops inside the value of a parameter. Of a number its text does not say it."""
        return self._prose.block.ends_in_value

    @property
    def notes(self) -> tuple[Note, ...]:
        """The departures seen so far."""
        return tuple(self._turn.notes)

    def feed(self, delta: str) -> list[Event]:
        """Take more text; returns what is now certain."""
        if self._finished:
            raise RuntimeError("feed() after finish(): use a new OutputParser for each output")
        if not delta:
            return []
        return self._run(self._held + delta if self._held else delta, final=False)

    def finish(self, *, ended: bool = False) -> list[Event]:
        """The text is over; returns the rest.

        A call is complete if its end tag came, or if the model ended its turn after the call's last parameter; any
        other call stays open: no `ToolCallEnd`, and arguments that are visibly unfinished.

        Args:
            ended: the model ended its turn itself, by its EOS. False if it was stopped (a limit, a stop string, an
                abort) or if that isn't known. EOS in the text says the same.
        """
        if self._finished:
            return []
        self._finished = True
        text = self._held
        if self._repair and text.endswith(EOS):
            text = text[: -len(EOS)]
            ended = True
        turn = self._turn
        turn.ended = ended or turn.over
        events = self._run(self._prose.at_end(text), final=True)
        turn.position = turn.offset
        self._prose.close()
        return merge(events + turn.events)

    def _run(self, text: str, final: bool) -> list[Event]:
        turn, read = self._turn, self._prose.read
        turn.waiting = False
        i = 0
        end = len(text) if final else self._before_eos(text)
        now = text if end == len(text) else text[:end]
        while i < end and not turn.waiting and not turn.over:
            i = read(now, i, final)
        self._held = "" if turn.over else text[i:]
        turn.offset += i
        events, turn.events = turn.events, []
        return merge(events) if len(events) > 1 else events

    def _before_eos(self, text: str) -> int:
        """The length of the text without the EOS, whole or begun, that it ends in.

        So EOS at the very end is the same as `finish(ended=True)`, whatever stands before it.
        """
        at = text.rfind("<", max(0, len(text) - len(EOS))) if self._repair else -1
        return at if at >= 0 and EOS.startswith(text[at:]) else len(text)
