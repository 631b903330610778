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

    _QUOTES = frozenset("\"'“‘«„‟「『([（【*")
    _FENCE = re.compile(r"[ \t]*(?:(?:[-*+>]|\d{1,9}[.)])[ \t]+)*(`{3,}(?!.*`)|~{3,})[ \t]*(.?)")
    _RUN = re.compile("`+")
    _LINE_BEGINNING = 64  # long enough to tell a fence

    def __init__(self) -> None:
        self.blank = True
        self.at_line_start = True
        self._fence = ""  # that opened the code block that the answer is in
        self._line = ""  # the beginning of the current line
        self._code = 0  # backticks that opened code within the current line
        self._backticks = 0  # that the line ends in
        self._last = ""

    def add(self, text: str) -> None:
        """The answer goes on with `text`, which is not empty."""
        self.blank = self.blank and text.isspace()
        *lines, rest = text.split("\n")
        for line in lines:
            self._fence = self._fence_after((self._line + line)[: self._LINE_BEGINNING])
            self._line = ""
        if lines:
            self.at_line_start, self._code, self._backticks, self._last = True, 0, 0, ""
        if rest:
            self.at_line_start = self.at_line_start and rest.isspace()
            if len(self._line) < self._LINE_BEGINNING:
                self._line = (self._line + rest)[: self._LINE_BEGINNING]
            self._add_backticks(rest)
            self._last = rest[-1]

    def is_quotation(self, line_breaks: int) -> bool:
        """Markup `line_breaks` after this point is quoted.

        It is in a block of code or in code within a line, or it follows an opening quote.
        """
        if line_breaks > 0:
            return bool(self._fence_after(self._line))
        follows_quote = not self.at_line_start and self._last in self._QUOTES
        return bool(self._fence) or self._code_after() > 0 or follows_quote

    def _add_backticks(self, text: str) -> None:
        at = 0
        for run in self._RUN.finditer(text):
            if run.start() > at:
                self._code, self._backticks = self._code_after(), 0
            self._backticks += len(run[0])
            at = run.end()
        if at < len(text):
            self._code, self._backticks = self._code_after(), 0

    def _code_after(self) -> int:
        """The backticks that opened the code which the line ends in: as many close it."""
        if not self._code:
            return self._backticks
        return 0 if self._backticks == self._code else self._code

    def _fence_after(self, line: str) -> str:
        """The fence that is open after a line: one at least as long, of the same character and alone, closes it."""
        mark = self._FENCE.match(line)
        if mark is None or (self._fence and (mark[2].strip() or not mark[1].startswith(self._fence))):
            return self._fence
        return "" if self._fence else mark[1]
