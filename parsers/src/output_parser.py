"""The output parser: a state machine from the model's text to reasoning, content and tool calls.

docs/parsing.md has the format, the guarantees and the table of damage. The text is read once, from left to right; what
may be the beginning of markup is held back until it is decided, and markup is short, so little is ever held.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .calls import LEAKED, CallReader, State
from .events import ContentDelta, Event, Message, Note, ReasoningDelta, assemble, merge
from .lookahead import MAX_SPACE, NEXT_TURN, is_begun_mark, is_half_mark
from .protocol import CALLS_END, EOS, THINK_END, THINK_START
from .scan import Prose, Stops
from .schema import Tools
from .tags import CUT, OFFICIAL_MARK, Tag, Word, read_tag

Policy = Literal["repair", "strict"]
Phase = Literal["reasoning", "content", "tool_call"]

_QUOTED_STOPS = Stops(None, (THINK_END, CALLS_END, *NEXT_TURN))


class OutputParser(CallReader):
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
        super().__init__(Tools(tools), policy == "repair")
        think = (THINK_START, THINK_END) if think_tags else ()
        self._content_stops = Stops(self._mark if tool_calls else None, (*think, *self._tokens), (0, 2))
        self._reasoning_stops = Stops(OFFICIAL_MARK if self._repair else None, (*think, *self._tokens), (2, 2))
        self._held = ""
        self._finished = False
        self._prose = Prose()  # of the reasoning or content since it last began
        self._quoting = False  # a wrapper was taken for text, and its end has not come
        self._quoted: list[str] = []
        self._quoted_offset = 0
        if thinking:
            self._state = State.REASONING

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
        if self._state in (State.REASONING, State.QUOTED):
            return "reasoning"
        return "content" if self._state is State.CONTENT else "tool_call"

    @property
    def reasoning_ended(self) -> bool:
        """The text is past the reasoning, or had none."""
        return self.phase != "reasoning"

    @property
    def value_is_open(self) -> bool:
        """The output, which is over, stops inside the value of a parameter. Of a number its text does not say it."""
        return self._value_is_open

    @property
    def notes(self) -> tuple[Note, ...]:
        """The departures seen so far."""
        return tuple(self._notes)

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
        self._ended = ended or self._over
        events = self._run(text, final=True)
        self._close_at_end()
        events += self._events
        return merge(events)

    def _run(self, text: str, final: bool) -> list[Event]:
        self._waiting = False
        i = 0
        end = len(text) if final else self._before_eos(text)
        now = text if end == len(text) else text[:end]
        while i < end and not self._waiting and not self._over:
            i = self._step(now, i, final)
        self._held = "" if self._over else text[i:]
        self._offset += i
        events, self._events = self._events, []
        return merge(events) if len(events) > 1 else events

    def _before_eos(self, text: str) -> int:
        """The length of the text without the EOS, whole or begun, that it ends in.

        So EOS at the very end is the same as `finish(ended=True)`, whatever stands before it.
        """
        at = text.rfind("<", max(0, len(text) - len(EOS))) if self._repair else -1
        return at if at >= 0 and EOS.startswith(text[at:]) else len(text)

    def _step(self, text: str, i: int, final: bool) -> int:
        """Read on from `i` in the present state.

        Returns where to go on: always further, or in another state, or `_waiting` is set to ask for more text (never
        when the text is `final`).
        """
        state = self._state
        if state is State.VALUE:
            return self._read_value(text, i, final)
        if state is State.CONTENT:
            return self._read_content(text, i, final)
        if state is State.REASONING:
            return self._read_reasoning(text, i, final)
        if state is State.QUOTED:
            return self._read_quoted(text, i, final)
        return self._read_markup(text, i, final)

    def _close_at_end(self) -> None:
        self._position = self._offset
        if self._state is State.QUOTED:
            self._unquote()
        self._close_calls()
        if self._state is State.REASONING:
            self._note("unclosed_reasoning")

    # Reasoning and content

    def _say(self, text: str) -> None:
        """Reasoning or content, as the state says."""
        if not text:
            return
        if self._state is State.REASONING:
            self._events.append(ReasoningDelta(text))
        else:
            if self._after_eos:
                self._note("text_after_eos")
                self._after_eos = False
            if self._after_call and not (self._repair and text.isspace()):
                self._note("text_after_calls")
                self._after_call = False
            self._events.append(ContentDelta(text))
        self._prose.add(text)

    def _begin(self, state: State) -> None:
        super()._begin(state)
        self._prose = Prose()
        self._quoting = False

    def _read_content(self, text: str, i: int, final: bool) -> int:
        stop = self._content_stops.search(text, i)
        if stop is None:
            end = self._content_stops.hold(text, i)
            self._say(text[i:end])
            return self._cut_off(text, end) if final else self._wait(end)
        start = stop.start()
        self._say(text[i:start])
        at = text.index("<", start)
        line_breaks = at - start
        if stop[0] in self._content_stops.specials:
            return self._read_special(stop[0], text, at, final)
        tag = read_tag(text, at, official_only=not self._repair)
        accepted = self._accept(tag, text, line_breaks, final) if isinstance(tag, Tag) else tag
        if accepted == CUT and not final:
            return self._wait(start)
        self._position = self._offset + at
        if isinstance(accepted, Tag):
            self._enter_calls(accepted, text[at : accepted.end])
            return accepted.end
        if accepted == CUT and self._is_cut_markup(line_breaks) and not (self._ended and _is_bare_call(tag)):
            self._note("truncated_markup", text[at:])
            return len(text)
        if isinstance(tag, Tag):
            self._note("markup_as_text", text[at : tag.end])
            if tag.word is Word.CALLS:
                self._quoting = not tag.closing and not self._begins_block(tag, text, line_breaks)
        self._say(text[start : at + 1])
        return at + 1

    def _cut_off(self, text: str, start: int) -> int:
        """The text ends in `text[start:]`, which may begin a stop: content, unless it is half a mark."""
        rest = text[start:]
        mark = rest.lstrip("\n")
        line_breaks = len(rest) - len(mark)
        if self._content_stops.has_mark and self._is_cut_markup(line_breaks) and self._is_cut_mark(mark, line_breaks):
            self._position = self._offset + text.index("<", start)
            self._note("truncated_markup", mark)
        else:
            self._say(rest)
        return len(text)

    def _is_cut_mark(self, mark: str, line_breaks: int) -> bool:
        """The text ends in half a mark. One just begun counts where the model was stopped after a blank line."""
        return is_half_mark(mark) or (line_breaks == 2 and not self._ended and is_begun_mark(mark))

    def _is_cut_markup(self, line_breaks: int) -> bool:
        """A tag that the text ends in is markup, not a quotation."""
        return self._repair and (line_breaks == 2 or not self._prose.is_quotation(line_breaks))

    def _accept(self, tag: Tag, text: str, line_breaks: int, final: bool) -> Tag | str | None:
        """The tag if it is markup here in the content, CUT if what follows decides that, None if it is text.

        Officially calls begin with a blank line and the wrapper. Whatever else looks like calls must not look like a
        quotation, and must call a known function unless it stands in a wrapper on a line of its own.
        """
        if tag.closing:
            return tag if self._repair and self._after_call else None
        begins: Tag | bool | str | None
        if tag.word is Word.CALLS:
            begins = self._begins_block(tag, text, line_breaks)
            if isinstance(begins, Tag) and not begins.closing:
                own_line = line_breaks > 0 or self._prose.at_line_start
                begins = self._ahead.begins_call(begins, text, final, in_block=True, own_line=own_line)
        else:
            known = tag.word is Word.INVOKE and self._tools.may_call(tag.name)
            begins = known and not self._is_quoted(line_breaks) and self._ahead.begins_call(tag, text, final)
        return begins if begins == CUT else tag if begins else None

    def _is_quoted(self, line_breaks: int) -> bool:
        return not self._repair or self._quoting or self._prose.is_quotation(line_breaks)

    def _begins_block(self, tag: Tag, text: str, line_breaks: int) -> Tag | str | None:
        """The tag that shows that the wrapper is one, CUT if that isn't decided, None if it is a quotation."""
        if not (line_breaks == 2 and tag.official) and self._is_quoted(line_breaks):
            return None
        first = self._ahead.first_in_block(text, tag.end)
        own_line = line_breaks > 0 or self._prose.at_line_start
        if isinstance(first, Tag) and not (own_line or self._tools.may_call(first.name)):
            return None
        return first

    def _enter_calls(self, tag: Tag, spelling: str) -> None:
        if tag.closing:
            self._note("stray_end_tag", spelling)
            return
        if not tag.official:
            self._note("spelling", spelling)
        if tag.word is Word.INVOKE:
            self._note("bare_invoke", tag.name)
            self._begin_call(tag, wrapped=False)
        else:
            self._enter(State.BLOCK)

    def _read_special(self, token: str, text: str, at: int, final: bool) -> int:
        """A special token in reasoning or content."""
        end = at + len(token)
        in_reasoning = self._state is State.REASONING
        self._position = self._offset + at
        if token == THINK_END and in_reasoning:
            self._begin(State.CONTENT)
        elif token == EOS and (self._repair or end == len(text)):
            if not self._repair and not final:
                return self._wait(at)
            self._after_eos = True
        elif token in LEAKED:
            self._note("leaked_token", token)
        elif token in NEXT_TURN and not self._prose.is_quotation(0):
            self._note("next_turn", token)
            self._over = True
        elif token in (THINK_START, THINK_END) and self._repair and self._prose.blank:
            self._note("repeated_think_tag", token)
            self._begin(State.REASONING if token == THINK_START else State.CONTENT)
        else:
            self._say(token)
        return end

    def _read_reasoning(self, text: str, i: int, final: bool) -> int:
        stop = self._reasoning_stops.search(text, i)
        if stop is None:
            end = len(text) if final else self._reasoning_stops.hold(text, i)
            self._say(text[i:end])
            return self._wait(end)
        start = stop.start()
        self._say(text[i:start])
        at = text.index("<", start)
        if at == start:
            return self._read_special(stop[0], text, at, final)
        tag = read_tag(text, at, official_only=True)
        if isinstance(tag, Tag):
            is_start = tag.word is Word.CALLS and not tag.closing
            tag = self._ahead.first_in_block(text, tag.end) if is_start else None
        if isinstance(tag, Tag):
            calls = not tag.closing and self._tools.may_call(tag.name)
            begins = calls and self._ahead.begins_call(tag, text, final, in_block=True, own_line=True)
            tag = begins if isinstance(begins, str) else tag if begins else None
        if tag == CUT and not final:
            return self._wait(start)
        if isinstance(tag, Tag):
            self._state = State.QUOTED
            self._quoted_offset = self._offset + start
            self._quoted = [text[start : tag.end]]
            return tag.end
        self._say(text[start : at + 1])
        return at + 1

    def _read_quoted(self, text: str, i: int, final: bool) -> int:
        """A calls block in the reasoning: calls if the output ends right after it, else a quotation."""
        stop = _QUOTED_STOPS.search(text, i)
        end = stop.start() if stop else len(text) if final else _QUOTED_STOPS.hold(text, i)
        self._quoted.append(text[i:end])
        if stop is None:
            return self._wait(end)
        if stop[0] == CALLS_END:
            if self._only_eos(text, stop.end(), final):
                return self._replay(text, end) if final else self._wait(end)
            self._quoted.append(CALLS_END)
            end = stop.end()
        self._unquote()
        return end

    def _only_eos(self, text: str, i: int, final: bool) -> bool:
        """Nothing but white space and EOS is left, or may be left once more text is there."""
        rest = text[i : i + MAX_SPACE + len(EOS)]
        if i + len(rest) < len(text):
            return False
        rest = rest.strip()
        return rest in ("", EOS) or (not final and EOS.startswith(rest))

    def _unquote(self) -> None:
        """The block was a quotation: it is reasoning."""
        self._state = State.REASONING
        self._say("".join(self._quoted))
        self._quoted = []

    def _replay(self, text: str, i: int) -> int:
        """The reasoning was never closed and the output ends with a calls block: read that as calls."""
        block = "".join(self._quoted) + text[i:]
        self._quoted = []
        self._offset = self._position = self._quoted_offset
        self._note("unclosed_reasoning")
        self._begin(State.CONTENT)
        position = 0
        while position < len(block):
            position = self._step(block, position, final=True)
        return len(text)


def _is_bare_call(tag: Tag | str | None) -> bool:
    return isinstance(tag, Tag) and tag.word is Word.INVOKE
