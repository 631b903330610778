"""The outermost machine of the parser: reasoning and content, and where calls begin in them."""

from enum import Enum

from .block import Block
from .events import ContentDelta, ReasoningDelta
from .lookahead import MAX_SPACE, Lookahead, is_begun_mark, is_half_mark
from .protocol import CALLS_END, CALLS_START, EOS, THINK_END, THINK_START
from .scan import Preceding, Stops
from .schema import Tools
from .tags import ANY_MARK, CUT, OFFICIAL_MARK, Tag, Word, read_tag
from .turn import LEAKED, NEXT_TURN, Turn, special_tokens

_QUOTED_STOPS = Stops(None, (THINK_END, CALLS_END, *NEXT_TURN))


class State(Enum):
    REASONING = "reasoning"
    QUOTED = "quoted"  # inside a calls block inside the reasoning, until it is known what that is
    CONTENT = "content"


class Prose:
    """Reads reasoning and content.

    It is fed the output from its beginning. It emits reasoning and content. It hands over to the block after a tag that
    begins calls, which must not look like a quotation; whatever else looks like markup is text. What a block is fed
    goes through here, and what follows it is content.

    Args:
        turn: what all machines share.
        tools: the functions that the request offers.
        repair: recover damaged markup.
        thinking: the output begins inside the reasoning.
        tool_calls: False leaves all DSML in the content.
        think_tags: False leaves think tags in the content.
    """

    def __init__(self, turn: Turn, tools: Tools, repair: bool, *, thinking: bool, tool_calls: bool, think_tags: bool):
        self._turn = turn
        self._tools = tools
        self._repair = repair
        self._ahead = Lookahead(tools, repair)
        self.block = Block(turn, tools, repair, self._ahead)
        specials = (*((THINK_START, THINK_END) if think_tags else ()), *special_tokens(repair))
        mark = ANY_MARK if repair else OFFICIAL_MARK
        self._content_stops = Stops(mark if tool_calls else None, specials, (0, 2))
        self._reasoning_stops = Stops(OFFICIAL_MARK if repair else None, specials, (0, 2))
        self._state = State.REASONING if thinking else State.CONTENT
        self._preceding = Preceding()  # of the reasoning or content since it last began
        self._quoting = False  # a wrapper was taken for text, and its end has not come
        self._after_call = False  # only white space came since the last call
        self._quoted: list[str] = []

    @property
    def in_reasoning(self) -> bool:
        return self._state is not State.CONTENT

    def read(self, text: str, i: int, final: bool) -> int:
        """Read on from `i`.

        Returns where to go on: always further, or with another machine or state, or the turn is `waiting` for more text
        (never when the text is `final`).
        """
        if self.block.is_open:
            i = self.block.read(text, i, final)
            self._resume()
            return i
        if self._state is State.CONTENT:
            return self._read_content(text, i, final)
        if self._state is State.REASONING:
            return self._read_reasoning(text, i, final)
        return self._read_quoted(text, i, final)

    def close(self) -> None:
        """The output is over."""
        if self._state is State.QUOTED:
            self._unquote()
        self.block.close()
        if self._state is State.REASONING:
            self._turn.note("unclosed_reasoning")

    def _resume(self) -> None:
        """After calls there is content."""
        if not self.block.is_open:
            self._begin(State.CONTENT)
            self._after_call = True

    def _begin(self, state: State) -> None:
        """Reasoning or content begins."""
        self._state = state
        self._preceding = Preceding()
        self._quoting = False

    def _say(self, text: str) -> None:
        """Reasoning or content, as the state says."""
        if not text:
            return
        turn = self._turn
        if self._state is State.REASONING:
            turn.events.append(ReasoningDelta(text))
        else:
            if turn.after_eos:
                turn.note("text_after_eos")
                turn.after_eos = False
            if self._after_call and not (self._repair and text.isspace()):
                turn.note("text_after_calls")
                self._after_call = False
            turn.events.append(ContentDelta(text))
        self._preceding.add(text)

    def _read_special(self, token: str, text: str, at: int, final: bool) -> int:
        """A special token in reasoning or content."""
        turn, end = self._turn, at + len(token)
        in_reasoning = self._state is State.REASONING
        turn.position = turn.offset + at
        if token == THINK_END and in_reasoning:
            self._begin(State.CONTENT)
        elif token == EOS and (self._repair or end == len(text)):
            if not self._repair and not final:
                return turn.wait(at)
            turn.after_eos = True
        elif token in LEAKED:
            turn.note("leaked_token", token)
        elif token in NEXT_TURN and not self._preceding.is_quotation(0):
            turn.note("next_turn", token)
            turn.over = True
        elif token in (THINK_START, THINK_END) and self._repair and self._preceding.blank:
            turn.note("repeated_think_tag", token)
            self._begin(State.REASONING if token == THINK_START else State.CONTENT)
        else:
            self._say(token)
        return end

    # Content

    def _read_content(self, text: str, i: int, final: bool) -> int:
        turn, stop = self._turn, self._content_stops.search(text, i)
        if stop is None:
            end = self._content_stops.hold(text, i)
            self._say(text[i:end])
            return self._cut_off(text, end) if final else turn.wait(end)
        start = stop.start()
        self._say(text[i:start])
        at = text.index("<", start)
        line_breaks = at - start
        if stop[0] in self._content_stops.specials:
            return self._read_special(stop[0], text, at, final)
        tag = read_tag(text, at, official_only=not self._repair)
        accepted = self._accept(tag, text, line_breaks, final) if isinstance(tag, Tag) else tag
        if accepted == CUT and not final:
            return turn.wait(start)
        turn.position = turn.offset + at
        if isinstance(accepted, Tag):
            self._enter_calls(accepted, text[at : accepted.end])
            return accepted.end
        if accepted == CUT and self._is_cut_markup(line_breaks) and not (turn.ended and _is_bare_call(tag)):
            turn.note("truncated_markup", text[at:])
            return len(text)
        if isinstance(tag, Tag):
            turn.note("markup_as_text", text[at : tag.end])
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
            self._turn.position = self._turn.offset + text.index("<", start)
            self._turn.note("truncated_markup", mark)
        else:
            self._say(rest)
        return len(text)

    def _is_cut_mark(self, mark: str, line_breaks: int) -> bool:
        """The text ends in half a mark. One just begun counts where the model was stopped after a blank line."""
        return is_half_mark(mark) or (line_breaks == 2 and not self._turn.ended and is_begun_mark(mark))

    def _is_cut_markup(self, line_breaks: int) -> bool:
        """A tag that the text ends in is markup, not a quotation."""
        return self._repair and (line_breaks == 2 or not self._preceding.is_quotation(line_breaks))

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
                own_line = line_breaks > 0 or self._preceding.at_line_start
                begins = self._ahead.begins_call(begins, text, final, in_block=True, own_line=own_line)
        else:
            known = tag.word is Word.INVOKE and self._tools.may_call(tag.name)
            begins = known and not self._is_quoted(line_breaks) and self._ahead.begins_call(tag, text, final)
        return begins if begins == CUT else tag if begins else None

    def _is_quoted(self, line_breaks: int) -> bool:
        return not self._repair or self._quoting or self._preceding.is_quotation(line_breaks)

    def _begins_block(self, tag: Tag, text: str, line_breaks: int) -> Tag | str | None:
        """The tag that shows that the wrapper is one, CUT if that isn't decided, None if it is a quotation."""
        if not (line_breaks == 2 and tag.official) and self._is_quoted(line_breaks):
            return None
        first = self._ahead.first_in_block(text, tag.end)
        own_line = line_breaks > 0 or self._preceding.at_line_start
        if isinstance(first, Tag) and not (own_line or self._tools.may_call(first.name)):
            return None
        return first

    def _enter_calls(self, tag: Tag, spelling: str) -> None:
        if tag.closing:
            self._turn.note("stray_end_tag", spelling)
            return
        if not tag.official:
            self._turn.note("spelling", spelling)
        if tag.word is Word.INVOKE:
            self._turn.note("bare_invoke", tag.name)
        self.block.open(tag)
        self._resume()

    # Reasoning

    def _read_reasoning(self, text: str, i: int, final: bool) -> int:
        turn, stop = self._turn, self._reasoning_stops.search(text, i)
        if stop is None:
            end = len(text) if final else self._reasoning_stops.hold(text, i)
            self._say(text[i:end])
            return turn.wait(end)
        start = stop.start()
        self._say(text[i:start])
        at = text.index("<", start)
        if stop[0] in self._reasoning_stops.specials:
            return self._read_special(stop[0], text, at, final)
        tag = read_tag(text, at, official_only=True)
        if isinstance(tag, Tag):
            is_start = tag.word is Word.CALLS and not tag.closing and self._may_be_calls(at - start)
            tag = self._ahead.first_in_block(text, tag.end) if is_start else None
        if isinstance(tag, Tag):
            calls = not tag.closing and self._tools.may_call(tag.name)
            begins = calls and self._ahead.begins_call(tag, text, final, in_block=True, own_line=True)
            tag = begins if isinstance(begins, str) else tag if begins else None
        if tag == CUT and not final:
            return turn.wait(start)
        if isinstance(tag, Tag):
            self._state = State.QUOTED
            self._quoted = [text[start : tag.end]]
            return tag.end
        self._say(text[start : at + 1])
        return at + 1

    def _may_be_calls(self, line_breaks: int) -> bool:
        """A wrapper in the reasoning is on a line of its own, and not in a block of code unless after a blank line."""
        own_line = line_breaks > 0 or self._preceding.at_line_start
        return line_breaks == 2 or (own_line and not self._preceding.is_quotation(line_breaks))

    def _read_quoted(self, text: str, i: int, final: bool) -> int:
        """Calls blocks in the reasoning: calls if the output ends right after them, else a quotation."""
        stop = _QUOTED_STOPS.search(text, i)
        end = stop.start() if stop else len(text) if final else _QUOTED_STOPS.hold(text, i)
        self._quoted.append(text[i:end])
        if stop is None or (stop[0] == CALLS_END and not final and _may_be_over(text, stop.end(), final)):
            return self._turn.wait(end)
        if stop[0] == CALLS_END:
            self._quoted.append(CALLS_END)
            end = stop.end()
            if text[end : end + MAX_SPACE + len(CALLS_START)].lstrip().startswith(CALLS_START):
                return end  # the next block
        self._unquote()
        return end

    def _unquote(self) -> None:
        """The block was a quotation: it is reasoning."""
        self._state = State.REASONING
        self._say("".join(self._quoted))
        self._quoted = []

    def at_end(self, text: str) -> str:
        """The output ends in `text`: what to read to its end.

        That is more where the reasoning was never closed and the output ends with a calls block: it is calls.
        """
        stop = _QUOTED_STOPS.search(text) if self._state is State.QUOTED else None
        if stop is None or stop[0] != CALLS_END or not _may_be_over(text, stop.end(), final=True):
            return text
        quoted = "".join(self._quoted)
        self._quoted = []
        self._turn.offset -= len(quoted)
        self._turn.position = self._turn.offset
        self._turn.note("unclosed_reasoning")
        self._begin(State.CONTENT)
        return quoted + text


def _may_be_over(text: str, i: int, final: bool) -> bool:
    """Nothing but white space and EOS is left, or the text before its end may go on so, or with another block."""
    rest = text[i : i + MAX_SPACE + max(len(EOS), len(CALLS_START))]
    if i + len(rest) < len(text):
        return False
    rest = rest.strip()
    return rest in ("", EOS) or (not final and (EOS.startswith(rest) or CALLS_START.startswith(rest)))


def _is_bare_call(tag: Tag | str | None) -> bool:
    return isinstance(tag, Tag) and tag.word is Word.INVOKE
