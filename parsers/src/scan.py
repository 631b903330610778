"""Finding the places where markup may begin, and how much of the text's end must wait for more."""

import re

from .tags import LONGEST_MARK, MARK_PREFIX


class Stops:
    """The strings a state stops at: a DSML mark and the line breaks that belong to it, and special tokens.

    Args:
        mark: the mark to stop at, None for none.
        specials: special tokens to stop at.
        line_breaks: least and most line breaks that belong to the mark after them.

    Attributes:
        search: searches a text from an index on.
        has_mark: there is a mark to stop at.
        specials: as given.
    """

    def __init__(self, mark: re.Pattern[str] | None, specials: tuple[str, ...], line_breaks: tuple[int, int] = (0, 0)):
        patterns = [re.escape(special) for special in specials]
        if mark is not None:
            patterns.append(f"\n{{{line_breaks[0]},{line_breaks[1]}}}(?:{mark.pattern})")
        self.search = re.compile("|".join(patterns)).search
        self.has_mark = mark is not None
        self.specials = specials
        self._line_breaks = line_breaks[1]
        self._longest = max([LONGEST_MARK, *map(len, specials)])

    def hold(self, text: str, start: int) -> int:
        """The index from which the text's end may be the beginning of a stop (its length if it is none)."""
        at = text.rfind("<", max(start, len(text) - self._longest))
        if at < 0 or not self._may_begin(text, at):
            at = len(text)
        least = max(start, at - self._line_breaks)
        while at > least and text[at - 1] == "\n":
            at -= 1
        return at

    def _may_begin(self, text: str, at: int) -> bool:
        if self.has_mark and MARK_PREFIX.fullmatch(text, at):
            return True
        tail = text[at:]
        return any(special.startswith(tail) for special in self.specials)


class Preceding:
    """What precedes a point in the answer, as far as it matters to what may begin there."""

    _QUOTES = frozenset("`\"'“‘«„‟「『([（【*")
    _FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)
    _FENCE_LENGTH = 6

    def __init__(self) -> None:
        self.blank = True
        self._in_fence = False
        self.at_line_start = True
        self._line = ""  # the beginning of the current line, long enough to tell a fence
        self._last = ""

    def add(self, text: str) -> None:
        """The answer goes on with `text`, which is not empty."""
        self.blank = self.blank and text.isspace()
        self._last = text[-1]
        line_end = text.find("\n")
        if line_end < 0:
            self.at_line_start = self.at_line_start and text.isspace()
            if len(self._line) < self._FENCE_LENGTH:
                self._line = (self._line + text)[: self._FENCE_LENGTH]
            return
        last_line = text.rfind("\n") + 1
        fences = len(self._FENCE.findall(text, line_end + 1, last_line))
        fences += self._FENCE.match((self._line + text[:line_end])[: self._FENCE_LENGTH]) is not None
        self._in_fence ^= fences % 2 == 1
        self._line = text[last_line : last_line + self._FENCE_LENGTH]
        self.at_line_start = not text[last_line:].strip()

    def is_quotation(self, line_breaks: int) -> bool:
        """Markup `line_breaks` after this point is quoted: it is in a code fence, or follows an opening quote."""
        if line_breaks == 0:
            return self._in_fence or (not self.at_line_start and self._last in self._QUOTES)
        return self._in_fence ^ (self._FENCE.match(self._line) is not None)
