"""The middle machine of the parser: from text to the names and arguments of tool calls."""

import re

from .arguments import ArgumentWriter
from .events import ContentDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from .lookahead import Lookahead, is_half_mark, is_mark
from .scan import Stops
from .schema import Tools
from .tags import ANY_MARK, CUT, OFFICIAL_MARK, Tag, Word, may_begin, read_tag
from .turn import LEAKED, NEXT_TURN, Turn, special_tokens
from .value import Value

_SPACE = re.compile(r"\s*")


class Block:
    """Reads calls between the tags of a wrapper, or one call without a wrapper.

    It is fed the text after the tag that opens them. It emits the calls, and as content any text between the tags. What
    is inside a parameter it hands to the value. It hands back to the prose (`is_open` is False) after the wrapper's end
    tag, after the end of a call without a wrapper, or after a token that ends the turn.

    Args:
        turn: what all machines share.
        tools: the functions that the request offers.
        repair: recover damaged markup.
        ahead: tells tags that begin something.

    Attributes:
        is_open: the text is inside calls.
        ends_in_value: the output, which is over, ended in the value of a parameter.
    """

    def __init__(self, turn: Turn, tools: Tools, repair: bool, ahead: Lookahead):
        self._turn = turn
        self._tools = tools
        self._repair = repair
        self._ahead = ahead
        self._stops = Stops(ANY_MARK if repair else OFFICIAL_MARK, special_tokens(repair))
        self._value = Value(turn, repair, self._emit)
        self.is_open = False
        self.ends_in_value = False

        self._calls = 0
        self._name = ""  # of the open call
        self._arguments: ArgumentWriter | None = None  # of the open call
        self._wrapped = False  # the open call is inside a wrapper
        self._stray = False  # text came since the last tag
        self._layout = ""  # the white space since the last tag, as much of it as matters
        self._left_as_text = False  # the start tag of a call was taken for text, and its end has not come
        self._parameter_cut = False  # the output ended in the tag of the next parameter

    def open(self, tag: Tag) -> None:
        """Calls begin with `tag`: a wrapper, or a call without one."""
        self.is_open = True
        if tag.word is Word.INVOKE:
            self._begin_call(tag, wrapped=False)
        else:
            self._expect_tag()

    def close(self) -> None:
        """The output is over: close what is complete, leave the rest open."""
        turn = self._turn
        if self._value.is_closed_by_call:
            turn.note("unclosed_parameter", self._name)
            self._value.end()
            turn.ended = True
        if self._between_parameters and turn.ended and not self._parameter_cut:
            turn.note("unclosed_invoke", self._name)
            self._end_call()
        if self._arguments is not None:
            turn.note("unfinished_call", self._name)
            self.ends_in_value = self._arguments.in_value
            self._emit(self._arguments.cut())
            self.is_open = self._wrapped
        if self.is_open:
            turn.note("unclosed_block")

    @property
    def _between_parameters(self) -> bool:
        return self._arguments is not None and not self._value.is_open

    def read(self, text: str, i: int, final: bool) -> int:
        if self._value.is_open:
            return self._value.read(text, i, final)
        turn = self._turn
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
                    return turn.wait(i)
                if body:
                    self._value.begin_body(self._arguments)
                    self._expect_tag()
                    return i
        tag = self._tag_at(text, i)
        if tag == CUT and not final:
            return turn.wait(i)
        turn.position = turn.offset + i
        if isinstance(tag, Tag) and tag.word is Word.INVOKE and not tag.closing:
            in_wrapper = self._arguments is None or self._wrapped
            begins = self._ahead.begins_call(tag, text, final, in_block=in_wrapper, own_line=in_wrapper)
            if begins == CUT and not final:
                return turn.wait(i)
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
            turn.note("truncated_markup", text[i:])
            self._parameter_cut = may_begin(Word.PARAMETER, text, i)
            return len(text)
        return self._read_stray(text, i, final)

    def _tag_at(self, text: str, i: int) -> Tag | str | None:
        """The tag between tags; inside a call it may lack its mark."""
        tag = read_tag(text, i, official_only=not self._repair)
        if tag is None and self._arguments is not None and not self._stray:
            return self._ahead.read_unmarked(text, i, self._name)
        return tag

    def _take(self, tag: Tag, spelling: str) -> bool:
        """Act on a tag; False if it is not markup here."""
        arguments, wrapped = self._arguments, self._wrapped
        if self._left_as_text and tag.closing and tag.word is not Word.CALLS:
            self._left_as_text = tag.word is not Word.INVOKE
            return False
        if tag.word is Word.PARAMETER and not tag.closing and arguments is not None:
            self._check_tag(tag, spelling)
            self._value.begin(arguments, tag)
            self._expect_tag()
        elif tag.word is Word.INVOKE and tag.closing and arguments is not None:
            self._check_tag(tag, spelling)
            self._end_call()
        elif tag.word is Word.CALLS and tag.closing and arguments is None:
            self._check_tag(tag, spelling)
            self._leave()
        elif tag.word is Word.INVOKE and not tag.closing and (arguments is None or self._repair):
            if arguments is not None:
                self._turn.note("unclosed_invoke", self._name)
                self._end_call()
            self._check_tag(tag, spelling)
            self._begin_call(tag, wrapped=arguments is None or wrapped)
        elif tag.word is Word.CALLS and tag.closing and self._repair:
            self._turn.note("unclosed_invoke", self._name)
            self._end_call()
            self._check_tag(tag, spelling)
            self._leave()
        elif self._repair and (tag.closing or tag.word is Word.CALLS):
            self._turn.note("stray_end_tag" if tag.closing else "repeated_start_tag", spelling)
            self._expect_tag()
        else:
            return False
        return True

    def _check_tag(self, tag: Tag, spelling: str) -> None:
        if not tag.official:
            no_type = tag.word is Word.PARAMETER and not tag.closing and tag.is_string is None
            self._turn.note("no_string_attribute" if no_type else "spelling", spelling)
        if not self._repair:
            first_in_call = self._arguments is not None and self._arguments.is_empty
            if self._layout != "\n" and not (first_in_call and self._layout == "\n\n"):
                self._turn.note("layout", spelling)

    def _expect_tag(self) -> None:
        """Only layout is expected before the next tag."""
        self._stray = False
        self._layout = ""

    def _read_stray(self, text: str, i: int, final: bool) -> int:
        """Text and special tokens where only tags belong."""
        stop = self._stops.search(text, i)
        if stop is None or stop.start() > i:
            end = stop.start() if stop else len(text) if final else self._stops.hold(text, i)
            self._say_stray(text[i:end])
            return end if stop else self._turn.wait(end)
        if stop[0] in self._stops.specials:
            self._read_special(stop[0])
            return stop.end()
        self._say_stray(text[i])
        return i + 1

    def _say_stray(self, text: str) -> None:
        """It is content."""
        if text:
            if not self._stray:
                self._turn.note("text_in_calls")
                self._stray = True
            self._turn.events.append(ContentDelta(text))

    def _read_special(self, token: str) -> None:
        turn = self._turn
        if not self._repair:
            self._say_stray(token)
        elif token in LEAKED:
            turn.note("leaked_token", token)
        else:
            if self._arguments is not None:
                turn.note("unclosed_invoke", self._name)
                self._end_call()
            if self.is_open:
                turn.note("unclosed_block")
                self._leave()
            if token in NEXT_TURN:
                turn.note("next_turn", token)
                turn.over = True
            turn.after_eos = True

    def _leave(self) -> None:
        self._left_as_text = False
        self.is_open = False

    def _begin_call(self, tag: Tag, wrapped: bool) -> None:
        self.is_open = True
        self._name = tag.name
        self._wrapped = wrapped
        self._left_as_text = False
        self._arguments = ArgumentWriter(tag.name, self._tools, self._repair, self._turn.note)
        self._turn.events.append(ToolCallStart(self._calls, tag.name))
        if not self._tools.may_call(tag.name):
            self._turn.note("unknown_function", tag.name)
        self._expect_tag()
        if tag.empty:
            self._end_call()

    def _end_call(self) -> None:
        assert self._arguments is not None
        self._emit(self._arguments.finish())
        self._arguments = None
        self._turn.events.append(ToolCallEnd(self._calls))
        self._calls += 1
        if self._wrapped:
            self._expect_tag()
        else:
            self._leave()

    def _emit(self, fragment: str) -> None:
        if fragment:
            self._turn.events.append(ToolCallArguments(self._calls, fragment))
