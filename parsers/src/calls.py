"""Inside calls: from text to the names and arguments of tool calls."""

import re
from enum import Enum

from .arguments import ArgumentWriter
from .events import ContentDelta, Event, Note, ToolCallArguments, ToolCallEnd, ToolCallStart
from .lookahead import NEXT_TURN, Lookahead, ends_call, is_half_mark, is_mark, only_end_tags
from .protocol import BOS, EOS, PAD
from .scan import Stops
from .schema import Tools
from .tags import ANY_END_MARK, ANY_MARK, CUT, OFFICIAL_END_MARK, OFFICIAL_MARK, Tag, Word, may_begin, read_tag

LEAKED = (BOS, PAD)
"""Tokens that say nothing in an answer."""
_UNMARKED_END = "</parameter"
_SPACE = re.compile(r"\s*")


class State(Enum):
    REASONING = "reasoning"
    QUOTED = "quoted"  # inside a calls block inside the reasoning, until it is known what that is
    CONTENT = "content"
    BLOCK = "block"  # inside a calls block, between the calls
    INVOKE = "invoke"  # inside a call, between the parameters
    VALUE = "value"  # inside a parameter


class CallReader:
    """The part of `OutputParser` that reads blocks, calls and values, with the state that both share.

    Args:
        tools: the functions that the request offers.
        repair: recover damaged markup.
    """

    def __init__(self, tools: Tools, repair: bool):
        self._tools = tools
        self._repair = repair
        self._ahead = Lookahead(tools, repair)
        self._mark = ANY_MARK if repair else OFFICIAL_MARK
        self._tokens = (EOS, *LEAKED, *NEXT_TURN) if repair else (EOS,)
        self._markup_stops = Stops(self._mark, self._tokens)
        self._value_stops = Stops(ANY_END_MARK, (), (0, 1)) if repair else Stops(OFFICIAL_END_MARK, ())
        self._unmarked_value_stops = Stops(ANY_END_MARK, (_UNMARKED_END,), (0, 1))

        self._state = State.CONTENT
        self._offset = 0  # of the first held character
        self._waiting = False
        self._ended = False  # the model ended the turn
        self._over = False  # the model went on with another turn: nothing that follows counts
        self._after_eos = False
        self._after_call = False  # only white space came since the last call
        self._events: list[Event] = []
        self._notes: list[Note] = []
        self._position = 0  # where the markup was seen that notes are about
        self._calls = 0

        # Inside a block or call:
        self._stray = False  # text came since the last tag
        self._layout = ""  # the white space since the last tag, as much of it as matters
        self._wrapped = False  # the open call is inside a block
        self._name = ""  # of the open call
        self._arguments: ArgumentWriter | None = None  # of the open call
        self._value_end = Word.PARAMETER
        self._value_official = True
        self._value_unmarked = False
        self._left_as_text = False  # the start tag of a call was taken for text, and its end has not come
        self._value_ended = False  # the text ended in the end tags of the call, without that of the value
        self._value_is_open = False  # the text ended in a value
        self._parameter_cut = False  # the text ended in the tag of the next parameter

    def _wait(self, i: int) -> int:
        """Ask for more text."""
        self._waiting = True
        return i

    def _note(self, code: str, detail: str = "") -> None:
        self._notes.append(Note(code, self._position, detail))

    def _begin(self, state: State) -> None:
        """Reasoning or content begins."""
        self._state = state

    def _close_calls(self) -> None:
        """The text is over: close what is complete, leave the rest open."""
        if self._state is State.VALUE and self._value_ended:
            self._note("unclosed_parameter", self._name)
            self._end_value()
            self._ended = True
        if self._state is State.INVOKE and self._ended and not self._parameter_cut:
            self._note("unclosed_invoke", self._name)
            self._end_call()
        if self._arguments is not None:
            self._note("unfinished_call", self._name)
            self._value_is_open = self._arguments.in_value
            self._emit(self._arguments.cut())
            self._state = State.BLOCK if self._wrapped else State.CONTENT
        if self._state is State.BLOCK:
            self._note("unclosed_block")

    def _enter(self, state: State) -> None:
        """A tag was read: only layout is expected before the next one."""
        self._state = state
        self._stray = False
        self._layout = ""

    def _read_markup(self, text: str, i: int, final: bool) -> int:
        """Between the tags of a block or call."""
        if not self._stray:
            end = _SPACE.match(text, i).end()  # type: ignore[union-attr]
            if end > i:
                self._layout = (self._layout + text[i : min(end, i + 3)])[:3]
            if end == len(text):
                return end
            i = end
            if text[i] == "{" and self._arguments is not None and self._arguments.is_empty:
                body = self._ahead.body_follows(text, i)
                if body == CUT and not final:
                    return self._wait(i)
                if body:
                    self._begin_body()
                    return i
        tag = self._tag_at(text, i)
        if tag == CUT and not final:
            return self._wait(i)
        self._position = self._offset + i
        if isinstance(tag, Tag) and tag.word is Word.INVOKE and not tag.closing:
            in_block = self._state is State.BLOCK or self._wrapped
            begins = self._ahead.begins_call(tag, text, final, in_block=in_block, own_line=in_block)
            if begins == CUT and not final:
                return self._wait(i)
            if begins is False:
                self._left_as_text = True
                self._say_stray(text[i : tag.end])
                return tag.end
            tag = CUT if begins == CUT else tag
        if isinstance(tag, Tag):
            if not self._take(tag, text[i : tag.end]):
                self._say_stray(text[i : tag.end])
            return tag.end
        if tag == CUT and self._repair and (not self._stray or is_half_mark(text[i:]) or is_mark(text, i)):
            self._note("truncated_markup", text[i:])
            self._parameter_cut = may_begin(Word.PARAMETER, text, i)
            return len(text)
        stop = self._markup_stops.search(text, i)
        if stop is None or stop.start() > i:
            end = stop.start() if stop else len(text) if final else self._markup_stops.hold(text, i)
            self._say_stray(text[i:end])
            return end if stop else self._wait(end)
        if stop[0] in self._markup_stops.specials:
            return self._read_special_in_markup(stop[0], i)
        self._say_stray(text[i])
        return i + 1

    def _tag_at(self, text: str, i: int) -> Tag | str | None:
        """The tag between tags; inside a call it may lack its mark."""
        tag = read_tag(text, i, official_only=not self._repair)
        if tag is None and self._state is State.INVOKE and not self._stray:
            return self._ahead.read_unmarked(text, i, self._name)
        return tag

    def _take(self, tag: Tag, spelling: str) -> bool:
        """Act on a tag inside a block or call; False if it is not markup here."""
        in_call = self._state is State.INVOKE
        if self._left_as_text and tag.closing and tag.word is not Word.CALLS:
            self._left_as_text = tag.word is not Word.INVOKE
            return False
        if tag.word is Word.PARAMETER and not tag.closing and in_call:
            self._check_tag(tag, spelling)
            self._begin_value(tag)
        elif tag.word is Word.INVOKE and tag.closing and in_call:
            self._check_tag(tag, spelling)
            self._end_call()
        elif tag.word is Word.CALLS and tag.closing and not in_call:
            self._check_tag(tag, spelling)
            self._leave_calls()
        elif tag.word is Word.INVOKE and not tag.closing and (not in_call or self._repair):
            if in_call:
                self._note("unclosed_invoke", self._name)
                self._end_call()
            self._check_tag(tag, spelling)
            self._begin_call(tag, wrapped=not in_call or self._wrapped)
        elif tag.word is Word.CALLS and tag.closing and self._repair:
            self._note("unclosed_invoke", self._name)
            self._end_call()
            self._check_tag(tag, spelling)
            self._leave_calls()
        elif self._repair and (tag.closing or tag.word is Word.CALLS):
            self._note("stray_end_tag" if tag.closing else "repeated_start_tag", spelling)
            self._enter(self._state)
        else:
            return False
        return True

    def _check_tag(self, tag: Tag, spelling: str) -> None:
        if not tag.official:
            no_type = tag.word is Word.PARAMETER and not tag.closing and tag.is_string is None
            self._note("no_string_attribute" if no_type else "spelling", spelling)
        if not self._repair:
            first_in_call = self._arguments is not None and self._arguments.is_empty
            if self._layout != "\n" and not (first_in_call and self._layout == "\n\n"):
                self._note("layout", spelling)

    def _say_stray(self, text: str) -> None:
        """Text where only tags belong: it is content."""
        if text:
            if not self._stray:
                self._note("text_in_calls")
                self._stray = True
            self._events.append(ContentDelta(text))

    def _read_special_in_markup(self, token: str, i: int) -> int:
        if not self._repair:
            self._say_stray(token)
        elif token in LEAKED:
            self._note("leaked_token", token)
        else:
            if self._state is State.INVOKE:
                self._note("unclosed_invoke", self._name)
                self._end_call()
            if self._state is State.BLOCK:
                self._note("unclosed_block")
                self._leave_calls()
            if token in NEXT_TURN:
                self._note("next_turn", token)
                self._over = True
            self._after_eos = True
        return i + len(token)

    def _leave_calls(self) -> None:
        self._left_as_text = False
        self._begin(State.CONTENT)
        self._after_call = True

    def _begin_call(self, tag: Tag, wrapped: bool) -> None:
        self._name = tag.name
        self._wrapped = wrapped
        self._left_as_text = False
        self._arguments = ArgumentWriter(tag.name, self._tools, self._repair, self._note)
        self._events.append(ToolCallStart(self._calls, tag.name))
        if not self._tools.may_call(tag.name):
            self._note("unknown_function", tag.name)
        self._enter(State.INVOKE)
        if tag.empty:
            self._end_call()

    def _end_call(self) -> None:
        assert self._arguments is not None
        self._emit(self._arguments.finish())
        self._arguments = None
        self._events.append(ToolCallEnd(self._calls))
        self._calls += 1
        if self._wrapped:
            self._enter(State.BLOCK)
        else:
            self._leave_calls()

    def _emit(self, fragment: str) -> None:
        if fragment:
            self._events.append(ToolCallArguments(self._calls, fragment))

    def _begin_value(self, tag: Tag) -> None:
        assert self._arguments is not None
        self._emit(self._arguments.begin(tag.name, tag.is_string))
        self._value_end = Word.PARAMETER
        self._value_official = tag.official_mark
        self._value_unmarked = not tag.marked
        self._state = State.VALUE
        if tag.empty:
            self._end_value()

    def _begin_body(self) -> None:
        assert self._arguments is not None
        self._emit(self._arguments.begin_body())
        self._value_end = Word.INVOKE
        self._value_official = True
        self._value_unmarked = False
        self._state = State.VALUE

    def _end_value(self) -> None:
        assert self._arguments is not None
        self._emit(self._arguments.end())
        self._enter(State.INVOKE)

    def _read_value(self, text: str, i: int, final: bool) -> int:
        stops = self._unmarked_value_stops if self._value_unmarked else self._value_stops
        stop = stops.search(text, i)
        if stop is None:
            end = stops.hold(text, i)
            if not final:
                after = self._write(text, i, end)
                return self._wait(end) if after is None else after
            mark = text[end:].lstrip("\n")
            # What may be an end tag that was cut is no part of the value: what is out then begins what would have come.
            half = self._repair and mark.startswith("<")
            after = self._write(text, i, end if half else len(text))
            if after is None and half:
                self._position = self._offset + len(text) - len(mark)
                self._note("truncated_markup", mark)
            return len(text) if after is None else after
        at = text.index("<", stop.start())
        tag = read_tag(text, at, official_only=not self._repair)
        if tag is None and self._value_unmarked:
            tag = read_tag(text, at, marked=False)
        if isinstance(tag, Tag) and self._ends_value(tag):
            after = self._write(text, i, at)
            if after is not None:
                return after
            self._position = self._offset + at
            self._end_value()
            if tag.word is Word.INVOKE:
                return at  # the end tag of the call is read there
            if not tag.official:
                self._note("spelling", text[at : tag.end])
            return tag.end
        closes = self._repair and only_end_tags(text, at, final, self._ends_value)
        waits = not final and (closes or tag == CUT)
        after = self._write(text, i, stop.start() if closes or waits else at + 1)
        if after is not None:
            return after
        if waits:
            return self._wait(stop.start())
        if not closes:
            return at + 1
        self._position = self._offset + at
        self._value_ended = ends_call(text, at)
        if not self._value_ended:
            self._note("truncated_markup", text[at:])
        return len(text)

    def _write(self, text: str, i: int, end: int) -> int | None:
        """Write `text[i:end]` to the value; where to go on if the value ended inside it: a body ends with its brace."""
        assert self._arguments is not None
        if end > i:
            self._emit(self._arguments.write(text[i:end]))
        unread = self._arguments.unread
        if unread is None:
            return None
        self._end_value()
        return end - unread

    def _ends_value(self, tag: Tag) -> bool:
        """A value ends at its end tag, in the mark it was opened with; one with an unofficial mark at any."""
        return tag.closing and tag.word is self._value_end and (tag.official_mark or not self._value_official)
