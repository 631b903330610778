"""The grammar of one DSML tag, in its official spelling and in the spellings seen in the wild.

A tag is short and holds no other tag, so a reader never looks further than `MAX_TAG` characters ahead.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from .protocol import DSML

MAX_TAG: Final = 512
"""Longest tag, in characters. A longer one is text."""

CUT: Final = "cut"
"""Answer of `read_tag`: what is there may be the beginning of a tag."""

# What every tag begins with, and what a text that stops inside that beginning looks like.
_BAR = "[|｜‖]"
_BARS = f"{_BAR}(?: ?{_BAR})?"
OFFICIAL_MARK: Final = re.compile(f"</?{DSML}")
OFFICIAL_END_MARK: Final = re.compile(f"</{DSML}")
ANY_MARK: Final = re.compile(f"< ?/? ?{_BARS} ?DSML ?{_BARS} ?")
ANY_END_MARK: Final = re.compile(f"< ?/ ?{_BARS} ?DSML ?{_BARS} ?")
MARK_PREFIX: Final = re.compile(f"< ?/? ?(?:{_BARS} ?(?:D(?:S(?:M(?:L ?(?:{_BARS} ?)?)?)?)?)?)?")
LONGEST_MARK: Final = len("< / | | DSML | | ")
_NO_MARK = re.compile("</?")

_WORD = re.compile(r"[A-Za-z_-]*")


class Word(Enum):
    """What a tag is about."""

    CALLS = "function_calls"
    INVOKE = "invoke"
    PARAMETER = "parameter"


_WORDS = {word.value: word for word in Word}
_WRAPPERS = frozenset(
    first + joint + second + plural
    for first, second in (("function", "call"), ("tool", "call"), ("tool", "use"))
    for joint in ("_", "-", "")
    for plural in ("", "s")
) | {"call", "calls"}
"""Spellings of a wrapper, in small letters."""
_WORD_PREFIXES = frozenset(word[:length] for word in {*_WORDS, *_WRAPPERS} for length in range(len(word) + 1))

_OFFICIAL_TAG = re.compile(
    f"</{DSML}(?P<closing>function_calls|invoke|parameter)>"
    f"|<{DSML}(?P<calls>function_calls)>"
    f'|<{DSML}invoke name="(?P<function>[^"<>\n]+)">'
    f'|<{DSML}parameter name="(?P<parameter>.*?)" string="(?P<string>true|false)">',
    re.DOTALL,
)
_OPEN_NAME = re.compile(f'<{DSML}parameter name="')
_CLOSE_NAME = re.compile('" string="(?:true|false)">')
_BARE_MARK = re.compile(f"{_BAR} ?DSML ?{_BAR}")
_VALUE = r"""(?:"([^"]*)"|'([^']*)'|[“”„‟«]([^“”„‟«»]*)[“”„‟»]|([^\s"'“”<>/=]+))"""
_ATTRIBUTE = re.compile(rf"\s*([A-Za-z_]+)\s*=\s*{_VALUE}")
_TAG_END = re.compile(r"\s*(/?)>")
_FUNCTION_NAME = re.compile(r"[^\s<>|｜‖\"“”][^<>|｜‖\"“”\n]*")


@dataclass(frozen=True, slots=True)
class Tag:
    """One complete tag.

    Attributes:
        word: what it is about.
        end: index of the character after it.
        closing: it is an end tag.
        name: function or parameter name of a start tag.
        is_string: the `string` attribute, None where it is missing or makes no sense.
        empty: it closes itself (`/>`).
        official: it is spelled exactly as the model was trained on.
        official_mark: at least its mark is.
        marked: it has a mark.
    """

    word: Word
    end: int
    closing: bool = False
    name: str = ""
    is_string: bool | None = None
    empty: bool = False
    official: bool = True
    official_mark: bool = True
    marked: bool = True


def read_tag(text: str, start: int, *, official_only: bool = False, marked: bool = True) -> Tag | str | None:
    """The tag at `start`; CUT if the text ends before that is decided; None if there is none.

    More text never changes an answer other than CUT. With `marked` False the tag is one that lacks its mark.
    """
    mark = (ANY_MARK if marked else _NO_MARK).match(text, start)
    if mark is None:
        return CUT if MARK_PREFIX.fullmatch(text, start) else None
    word_end = _WORD.match(text, mark.end()).end()  # type: ignore[union-attr]
    spelling = text[mark.end() : word_end]
    if word_end == len(text):
        return CUT if spelling.lower() in _WORD_PREFIXES else None
    word = _WORDS.get(spelling) or (Word.CALLS if spelling.lower() in _WRAPPERS else None)
    official = OFFICIAL_MARK.fullmatch(mark[0]) is not None
    if word is None or (official_only and not official):
        return None
    limit = start + MAX_TAG
    end = text.find(">", word_end, limit)
    here = end if end >= 0 else limit
    open_name = _OPEN_NAME.match(text, start)  # the name of an official parameter may hold > and <
    if _BARE_MARK.search(text, word_end, here) or (not open_name and text.find("<", word_end, here) >= 0):
        return None
    if end >= 0 and (tag := _parse(text, mark, word, end + 1, official, official_only)):
        return tag
    if open_name is None:
        return None if end >= 0 or len(text) >= limit else CUT
    rest = _CLOSE_NAME.search(text, open_name.end(), limit)
    if rest:
        return _parse(text, mark, word, rest.end(), official, True)
    return None if len(text) >= limit or _BARE_MARK.search(text, open_name.end(), limit) else CUT


def may_begin(word: Word, text: str, start: int) -> bool:
    """The beginning of a tag at `start` may be that of the start tag of `word`."""
    mark = ANY_MARK.match(text, start) or _NO_MARK.match(text, start)
    if mark is None or "/" in mark[0]:
        return False
    spelling = _WORD.match(text, mark.end())[0]  # type: ignore[index]
    return word.value.startswith(spelling)


def _parse(text: str, mark: re.Match[str], word: Word, end: int, official: bool, official_only: bool) -> Tag | None:
    """The tag that begins with `mark` and ends at `end`; `official` says that its mark is."""
    exact = _OFFICIAL_TAG.fullmatch(text, mark.start(), end)
    if exact and (official_only or _is_trimmed(exact["function"])):
        name = exact["function"] or exact["parameter"] or ""
        if _BARE_MARK.search(name):
            return None
        is_string = None if exact["string"] is None else exact["string"] == "true"
        return Tag(word, end, closing=bool(exact["closing"]), name=name, is_string=is_string)
    if official_only:
        return None
    marked = "DSML" in mark[0]
    word_end = _WORD.match(text, mark.end()).end()  # type: ignore[union-attr]
    if "/" in mark[0]:
        closed = text[word_end : end - 1].strip() == ""
        return Tag(word, end, True, official=False, official_mark=official, marked=marked) if closed else None
    attributes: dict[str, str] = {}
    position = word_end
    while match := _ATTRIBUTE.match(text, position, end):
        attributes.setdefault(match[1].lower(), next(value for value in match.groups()[1:] if value is not None))
        position = match.end()
    tag_end = _TAG_END.fullmatch(text, position, end)
    name = attributes.get("name", "")
    name = name.strip() if word is Word.INVOKE else name
    if tag_end is None or (word is not Word.CALLS and not _is_name(name, word)):
        return None
    is_string = {"true": True, "false": False}.get(attributes.get("string", "").strip().lower())
    return Tag(word, end, False, name, is_string, bool(tag_end[1]), False, official, marked)


def _is_trimmed(name: str | None) -> bool:
    """No function's name begins or ends with white space: the client that is called by one knows no such function."""
    return name is None or name == name.strip()


def _is_name(name: str, word: Word) -> bool:
    return bool(_FUNCTION_NAME.fullmatch(name)) if word is Word.INVOKE else bool(name) and not _BARE_MARK.search(name)
