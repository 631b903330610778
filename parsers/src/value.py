"""The innermost machine of the parser: the text of one argument."""

from collections.abc import Callable

from .arguments import ArgumentWriter
from .lookahead import ends_call, only_end_tags
from .scan import Stops
from .tags import ANY_END_MARK, CUT, OFFICIAL_END_MARK, Tag, Word, read_tag
from .turn import Turn

_UNMARKED_END = "</parameter"


class Value:
    """Reads a parameter between its tags, or the one JSON object that stands in the place of all parameters.

    It is fed the text after the start tag. It emits fragments of the call's arguments. It hands back to the block
    (`is_open` is False) after the parameter's end tag, before the call's, or after the object's brace; whatever else
    stands there, markup included, is part of the value.

    Args:
        turn: what all machines share.
        repair: recover damaged markup.
        emit: takes each fragment.

    Attributes:
        is_open: the text is inside a value.
        is_closed_by_call: the output ended in the end tags of the call, without that of the value.
    """

    def __init__(self, turn: Turn, repair: bool, emit: Callable[[str], None]):
        self._turn = turn
        self._repair = repair
        self._emit = emit
        self._stops = Stops(ANY_END_MARK, (_UNMARKED_END,), (0, 1)) if repair else Stops(OFFICIAL_END_MARK, ())
        self.is_open = False
        self.is_closed_by_call = False

    def begin(self, arguments: ArgumentWriter, tag: Tag) -> None:
        """A parameter begins with `tag`."""
        self._emit(arguments.begin(tag.name, tag.is_string))
        self._open(arguments, Word.PARAMETER, official=tag.official_mark, unmarked=not tag.marked)
        if tag.empty:
            self.end()

    def begin_body(self, arguments: ArgumentWriter) -> None:
        """The arguments follow as one JSON object."""
        self._emit(arguments.begin_body())
        self._open(arguments, Word.INVOKE, official=True, unmarked=False)

    def _open(self, arguments: ArgumentWriter, end: Word, *, official: bool, unmarked: bool) -> None:
        self._arguments = arguments
        self._end = end
        self._official = official
        self._unmarked = unmarked
        self.is_open = True

    def end(self) -> None:
        """The value is over."""
        self._emit(self._arguments.end())
        self.is_open = False

    def read(self, text: str, i: int, final: bool) -> int:
        stops, turn = self._stops, self._turn
        stop = stops.search(text, i)
        if stop is None:
            end = stops.hold(text, i)
            if final:
                return self._read_rest(text, i, end)
            after = self._write(text, i, end)
            return turn.wait(end) if after is None else after
        at = text.index("<", stop.start())
        tag = read_tag(text, at, official_only=not self._repair)
        if tag is None and self._unmarked:
            tag = read_tag(text, at, marked=False)
        if isinstance(tag, Tag) and self._ends_value(tag):
            after = self._write(text, i, at)
            return self._take_end(tag, text, at) if after is None else after
        closes = self._repair and only_end_tags(text, at, final, self._ends_value)
        waits = not final and (closes or tag == CUT)
        after = self._write(text, i, stop.start() if closes or waits else at + 1)
        if after is not None:
            return after
        if waits:
            return turn.wait(stop.start())
        if not closes:
            return at + 1
        turn.position = turn.offset + at
        self.is_closed_by_call = ends_call(text, at)
        if not self.is_closed_by_call:
            turn.note("truncated_markup", text[at:])
        return len(text)

    def _read_rest(self, text: str, i: int, end: int) -> int:
        """The output ends in the value, and `text[end:]` may be the beginning of a stop.

        What may be an end tag that was cut is no part of the value: what is out then begins what would have come.
        """
        mark = text[end:].lstrip("\n")
        half = self._repair and mark.startswith("<")
        after = self._write(text, i, end if half else len(text))
        if after is not None:
            return after
        if half:
            self._turn.position = self._turn.offset + len(text) - len(mark)
            self._turn.note("truncated_markup", mark)
        return len(text)

    def _take_end(self, tag: Tag, text: str, at: int) -> int:
        self._turn.position = self._turn.offset + at
        self.end()
        if tag.word is Word.INVOKE:
            return at  # the block reads the end tag of the call
        if not tag.official:
            self._turn.note("spelling", text[at : tag.end])
        return tag.end

    def _write(self, text: str, i: int, end: int) -> int | None:
        """Write `text[i:end]` to the value; where to go on if the value ended inside it: a body ends with its brace."""
        if end > i:
            self._emit(self._arguments.write(text[i:end]))
        unread = self._arguments.unread
        if unread is None:
            return None
        self.end()
        return end - unread

    def _ends_value(self, tag: Tag) -> bool:
        """A value ends at its end tag, in the mark it was opened with; one with an unofficial mark at any."""
        return tag.closing and tag.word is self._end and (tag.official_mark or not self._official)
