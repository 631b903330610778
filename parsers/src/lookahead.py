"""Reading ahead: what must follow a tag for it to be markup. Never further than a few tags' length."""

import re
from collections.abc import Callable

from .protocol import EOS
from .schema import Tools
from .tags import ANY_MARK, CUT, MARK_PREFIX, MAX_TAG, Tag, Word, may_begin, read_tag
from .turn import NEXT_TURN

MAX_SPACE = 64
"""White space that may stand between two tags that are only recognised together."""

_SPACE = re.compile(r"\s*")
_END_ORDER = {Word.PARAMETER: 1, Word.INVOKE: 2, Word.CALLS: 3}
_KEY = r'"(?:[^"\\]|\\.)*'
_BODY = re.compile(rf'\{{\s*(?:\}}|{_KEY}"\s*:\s*["{{\[\-0-9tfnTFN])')
_BODY_PREFIX = re.compile(rf'\{{\s*(?:{_KEY}(?:\\|"\s*(?::\s*)?)?)?')


class Lookahead:
    """Tells tags that begin something from tags that are only mentioned.

    Every answer may be CUT: what follows decides, and the text ends before. More text never changes another answer.

    Args:
        tools: the functions that the request offers.
        repair: whether damaged markup counts.
    """

    def __init__(self, tools: Tools, repair: bool):
        self._tools = tools
        self._repair = repair

    def first_in_block(self, text: str, i: int) -> Tag | str | None:
        """What follows a wrapper and makes it one: the call it begins with, or its end."""
        return self._first_in_block(text, i, may_repeat=self._repair)

    def begins_call(
        self, tag: Tag, text: str, final: bool, *, in_block: bool = False, own_line: bool = False
    ) -> bool | str:
        """Whether a call's start tag begins one.

        A parameter must follow, or the call's end; in a block the arguments as one JSON object will do; and in one on a
        line of its own the next call, the block's end, the end of the turn, or a parameter after some text.
        """
        if tag.empty or not self._repair:
            return True
        i = _SPACE.match(text, tag.end).end()  # type: ignore[union-attr]
        if i - tag.end > MAX_SPACE:
            return False
        if i == len(text):
            return (final and own_line) or CUT
        if in_block and (body := self.body_follows(text, i)):
            return (final and own_line) or body
        follows = read_tag(text, i) or self.read_unmarked(text, i, tag.name)
        if follows == CUT:
            return (final and (own_line or is_mark(text, i))) or CUT
        if isinstance(follows, Tag):
            if follows.word is Word.INVOKE:
                return follows.closing or own_line
            return own_line if follows.closing and follows.word is Word.CALLS else _opens_parameter(follows)
        if own_line and text.startswith((EOS, *NEXT_TURN), i):
            return True
        return own_line and self._parameter_after_text(text, i, final)

    def body_follows(self, text: str, i: int) -> bool | str:
        """Whether a call's arguments follow as one JSON object, without parameter tags."""
        if not self._repair:
            return False
        if _BODY.match(text, i, i + MAX_TAG):
            return True
        return CUT if len(text) < i + MAX_TAG and _BODY_PREFIX.fullmatch(text, i) else False

    def read_unmarked(self, text: str, i: int, function: str) -> Tag | str | None:
        """The tag at `i`, inside a call of `function`, that lacks its mark: a known parameter, or an end tag."""
        tag = read_tag(text, i, marked=False) if self._repair else None
        if not isinstance(tag, Tag):
            return tag
        known = self._tools.parameters(function)
        known_parameter = tag.word is Word.PARAMETER and (not known or tag.name in known)
        return tag if tag.word is not Word.CALLS and (tag.closing or known_parameter) else None

    def _first_in_block(self, text: str, i: int, *, may_repeat: bool) -> Tag | str | None:
        at = _SPACE.match(text, i).end()  # type: ignore[union-attr]
        if at - i > MAX_SPACE:
            return None
        if at == len(text):
            return CUT
        tag = read_tag(text, at, official_only=not self._repair)
        if not isinstance(tag, Tag):
            return tag
        if tag.word is Word.CALLS and not tag.closing and may_repeat:
            return self._first_in_block(text, tag.end, may_repeat=False)
        return tag if tag.word is (Word.CALLS if tag.closing else Word.INVOKE) else None

    def _parameter_after_text(self, text: str, i: int, final: bool) -> bool | str:
        mark = ANY_MARK.search(text, i, i + MAX_TAG)
        if mark is None:
            return False if final or len(text) >= i + MAX_TAG else CUT
        follows = read_tag(text, mark.start())
        if follows == CUT:
            return may_begin(Word.PARAMETER, text, mark.start()) if final else CUT
        return isinstance(follows, Tag) and _opens_parameter(follows)


def only_end_tags(text: str, i: int, final: bool, ends_value: Callable[[Tag], bool]) -> bool:
    """Nothing but end tags is left, or may be left once more text is there: the value before was never closed.

    `ends_value` tells the end tag that would have closed it. Without its mark one counts before others.
    """
    order = 0
    while i < len(text):
        tag = read_tag(text, i) or (_unmarked_end(text, i) if order == 0 else None)
        if isinstance(tag, str):
            return not final or order > 0 or is_mark(text, i)
        if tag is None or not tag.closing or ends_value(tag) or _END_ORDER[tag.word] <= order:
            return False
        order = _END_ORDER[tag.word]
        i = _SPACE.match(text, tag.end).end()  # type: ignore[union-attr]
        if i - tag.end > MAX_SPACE:
            return False
    return True


def ends_call(text: str, i: int) -> bool:
    """Among the end tags at `i` is a whole one of the call, or of the wrapper, which takes its place."""
    while isinstance(tag := read_tag(text, i) or _unmarked_end(text, i), Tag):
        if tag.word is not Word.PARAMETER:
            return True
        i = _SPACE.match(text, tag.end).end()  # type: ignore[union-attr]
    return False


def _unmarked_end(text: str, i: int) -> Tag | str | None:
    """The end tag of a parameter at `i` that lacks its mark."""
    tag = read_tag(text, i, marked=False)
    return tag if not isinstance(tag, Tag) or (tag.closing and tag.word is Word.PARAMETER) else None


def is_mark(text: str, i: int) -> bool:
    """A whole mark stands at `i`."""
    return ANY_MARK.match(text, i) is not None


def is_begun_mark(text: str) -> bool:
    """The text is the beginning of a mark."""
    return MARK_PREFIX.fullmatch(text) is not None


def is_half_mark(text: str) -> bool:
    """The text is the beginning of a mark, and too much of one to be anything else."""
    return "D" in text and is_begun_mark(text)


def _opens_parameter(tag: Tag) -> bool:
    return tag.word is Word.PARAMETER and not tag.closing
