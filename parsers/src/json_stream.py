"""JSON as it arrives: passes valid text through verbatim and can close it at any moment.

What can't end validly is held until it can: a separator and a key wait for their value, a number or literal for its
end, and one that is all there is for the end of the text. Damage inside the JSON that has one reading is repaired in
place; anything else makes the stream `failed`. `held` gives what is held, as it was written.
"""

import json
import math
import re
from collections.abc import Container
from enum import Enum, auto

MAX_DEPTH = 256  # Python's own reader stops at about 1000 levels
MAX_ATOM = 4096  # Python's own reader refuses integers of more than 4300 digits

_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE = re.compile(r"[ \t\n\r]*")
_ATOM_RUN = re.compile(r"[-+.0-9A-Za-z_]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_PREFIX = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_FIRST_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")  # of a surrogate pair
_SECOND_HALF = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_LITERALS = {"true": "boolean", "false": "boolean", "null": "null"}
_PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}
_KINDS = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
_KINDS |= {"T": "boolean", "F": "boolean", "N": "null"}


class _Expect(Enum):
    VALUE = auto()  # a value: at the top, after a colon, after a comma in an array
    FIRST_VALUE = auto()  # after [
    KEY = auto()  # after a comma in an object
    FIRST_KEY = auto()  # after {
    COLON = auto()
    SEPARATOR = auto()  # after a value inside an object or array
    IN_STRING = auto()
    IN_KEY = auto()
    IN_ATOM = auto()
    END = auto()  # after the top value


class JsonStream:
    """Incremental JSON.

    Args:
        alone: nothing but white space may follow the value.
        members_of: with a set of names, the text must be one object, its first key must be among them, and its members
            come out without the braces around them.

    Attributes:
        kind: the JSON type of the top value once it has begun, else None.
        failed: the text is not JSON. Nothing more comes out; `abandon` closes what came out before.
        repairs: names of the repairs made inside the JSON so far.
        unread: with `alone` False, how much of the text fed last stands after the value; None while it goes on.
    """

    def __init__(self, members_of: Container[str] | None = None, *, alone: bool = True):
        self.kind: str | None = None
        self.failed = False
        self.repairs: set[str] = set()
        self.unread: int | None = None
        self._alone = alone
        self._members_of = members_of
        self._expect = _Expect.VALUE
        self._closers: list[str] = []
        self._hidden = 0 if members_of is None else 1  # outer containers whose braces stay inside
        self._held: list[str] = [""]  # white space, separators and keys that wait for a value
        self._held_comma = False  # the first held piece is a comma
        self._piece: list[str] = []  # the atom, or the key's text, being read
        self._piece_length = 0
        self._escape = ""  # an escape sequence being read
        self._half = ""  # the escape sequence of half a surrogate pair, until the other half follows
        self._first_key = members_of is not None

    def feed(self, text: str) -> str:
        """Take more text; returns the JSON that is now certain."""
        out: list[str] = []
        i = 0
        while i < len(text) and not self.failed:
            if self._expect is _Expect.END and not self._alone:
                break
            if self._escape:
                i = self._read_escape(text, i, out)
            elif self._expect is _Expect.IN_STRING or self._expect is _Expect.IN_KEY:
                i = self._read_string(text, i, out)
            elif self._expect is _Expect.IN_ATOM:
                i = self._read_atom(text, i, out)
            else:
                i = self._read_structure(text, i, out)
        if self._expect is _Expect.END and not self._alone and not self.failed:
            self.unread = len(text) - i
        return "".join(out)

    @property
    def undecided(self) -> bool:
        """`members_of` is given and the first key isn't known yet."""
        return self._first_key and (bool(self._closers) or self.kind is None)

    def finish(self) -> str:
        """The text is over; returns what completes the JSON: closing quotes and brackets, else the stream fails."""
        out: list[str] = []
        if self._expect is _Expect.IN_ATOM:
            self._end_atom(out)
        dangling = self._expect in (_Expect.IN_KEY, _Expect.COLON, _Expect.VALUE, _Expect.KEY)
        if self.kind is None or self.undecided or dangling:
            self.failed = True
        if not self.failed:
            self._complete(out)
        return "".join(out)

    def held(self) -> str:
        """What the text wrote beyond what came out, where it stops short of the JSON's end; nothing is completed."""
        return "".join([*self._held, *self._piece, self._half, self._escape])

    def abandon(self) -> str:
        """What makes the JSON that came out so far valid; everything held is forgotten."""
        emitted = len(self._closers) - sum(piece in ("{", "[") for piece in self._held)
        quote = '"' if self._expect is _Expect.IN_STRING else ""
        return quote + "".join(reversed(self._closers[self._hidden : emitted]))

    def _complete(self, out: list[str]) -> None:
        """Close the string and every container that is open."""
        if self._closers or self._expect is _Expect.IN_STRING:
            self.repairs.add("unbalanced_json")
        self._end_half(out)
        if self._escape:
            out.append("\\" + self._escape)
        if self._expect is _Expect.IN_STRING:
            out.append('"')
        self._flush(out)
        out.extend(reversed(self._closers[self._hidden :]))

    # Everything below reads one piece at `i`, appends what comes out to `out`, and returns where to go on.

    def _read_structure(self, text: str, i: int, out: list[str]) -> int:
        end = _SPACE.match(text, i).end()  # type: ignore[union-attr]
        if end > i:
            if not (self._hidden and self._expect is _Expect.END):
                (self._held if self._held else out).append(text[i:end])
            return end
        char = text[i]
        expect = self._expect
        if expect is _Expect.SEPARATOR and char == ",":
            self._held.append(",")
            self._held_comma = True
            self._expect = _Expect.KEY if self._closers[-1] == "}" else _Expect.VALUE
        elif expect is _Expect.COLON and char == ":":
            self._held.append(":")
            self._expect = _Expect.VALUE
        elif expect in (_Expect.KEY, _Expect.FIRST_KEY) and char == '"':
            self._held.append('"')
            self._expect = _Expect.IN_KEY
        elif self._closers and char == self._closers[-1] and self._may_close():
            self._close_container(out)
        elif expect in (_Expect.VALUE, _Expect.FIRST_VALUE):
            return self._begin_value(text, i, out)
        else:
            self.failed = True
        return i + 1

    def _begin_value(self, text: str, i: int, out: list[str]) -> int:
        char = text[i]
        if self.kind is None:
            self.kind = "number" if char in "-0123456789" else _KINDS.get(char)
            if self.kind is None or (self._members_of is not None and char != "{"):
                self.failed = True
                return i
        if char in "{[":
            if len(self._closers) == MAX_DEPTH:
                self.failed = True
                return i
            if self._members_of is None or self._closers:
                self._held.append(char)
            self._closers.append("}" if char == "{" else "]")
            self._expect = _Expect.FIRST_KEY if char == "{" else _Expect.FIRST_VALUE
        elif char == '"':
            self._flush(out)
            out.append('"')
            self._expect = _Expect.IN_STRING
        elif char in _KINDS or char in "-0123456789":
            self._expect = _Expect.IN_ATOM
            return i
        else:
            self.failed = True
        return i + 1

    def _read_string(self, text: str, i: int, out: list[str]) -> int:
        in_key = self._expect is _Expect.IN_KEY
        sink = self._piece if in_key else out
        if text[i] != "\\":
            self._end_half(sink)
        end = _STRING_RUN.match(text, i).end()  # type: ignore[union-attr]
        if end > i:
            sink.append(text[i:end])
            if end == len(text):
                return end
        char = text[end]
        if char == "\\":
            self._escape = "\\"
        elif char != '"':
            sink.append(json.dumps(char)[1:-1])
            self.repairs.add("raw_control_character")
        elif in_key:
            self._end_key()
        else:
            out.append('"')
            self._end_value()
        return end + 1

    def _read_escape(self, text: str, i: int, out: list[str]) -> int:
        sink = self._piece if self._expect is _Expect.IN_KEY else out
        escape = self._escape + text[i]
        if _ESCAPE.fullmatch(escape):
            self._escape = ""
            self._end_escape(escape, sink)
        elif _ESCAPE_PREFIX.fullmatch(escape):
            self._escape = escape
        else:  # the backslash was meant literally; the character after it is read again
            self._end_half(sink)
            sink.append("\\" + self._escape)
            self._escape = ""
            self.repairs.add("stray_backslash")
            return i
        return i + 1

    def _end_escape(self, escape: str, sink: list[str]) -> None:
        """A whole escape sequence. Half of a surrogate pair alone is no character, and many readers refuse it."""
        if self._half and _SECOND_HALF.fullmatch(escape):
            sink.append(self._half + escape)
            self._half = ""
            return
        self._end_half(sink)
        if _FIRST_HALF.fullmatch(escape):
            self._half = escape
        elif _SECOND_HALF.fullmatch(escape):
            self._half = escape
            self._end_half(sink)
        else:
            sink.append(escape)

    def _end_half(self, sink: list[str]) -> None:
        """The other half of a surrogate pair does not follow."""
        if self._half:
            self._half = ""
            sink.append("\\ufffd")
            self.repairs.add("half_surrogate_pair")

    def _read_atom(self, text: str, i: int, out: list[str]) -> int:
        end = _ATOM_RUN.match(text, i).end()  # type: ignore[union-attr]
        self._piece.append(text[i:end])
        self._piece_length += end - i
        if self._piece_length > MAX_ATOM:
            self.failed = True
        elif end < len(text):
            self._end_atom(out)
        return end

    def _end_atom(self, out: list[str]) -> None:
        atom = "".join(self._piece)
        self._piece.clear()
        self._piece_length = 0
        if atom in _PYTHON_LITERALS:
            atom = _PYTHON_LITERALS[atom]
            self.repairs.add("python_literal")
        elif atom not in _LITERALS and not (_NUMBER.fullmatch(atom) and _is_finite(atom)):
            self.failed = True
            return
        if self._closers:
            self._flush(out)
            out.append(atom)
        else:  # `12 apples` begins with a number, so a number alone waits for the end
            self._held.append(atom)
        self._end_value()

    def _end_key(self) -> None:
        key = "".join(self._piece)
        self._piece.clear()
        if self._first_key and json.loads(f'"{key}"') not in self._members_of:  # type: ignore[operator]
            self.failed = True
        self._first_key = False
        self._held.append(key + '"')
        self._expect = _Expect.COLON

    def _end_value(self) -> None:
        self._expect = _Expect.SEPARATOR if self._closers else _Expect.END

    def _may_close(self) -> bool:
        if self._expect in (_Expect.SEPARATOR, _Expect.FIRST_KEY, _Expect.FIRST_VALUE):
            return True
        trailing_comma = self._held_comma and self._expect in (_Expect.KEY, _Expect.VALUE) and ":" not in self._held
        if trailing_comma:
            self._held.pop(0)
            self.repairs.add("trailing_comma")
        return trailing_comma

    def _close_container(self, out: list[str]) -> None:
        if len(self._closers) > self._hidden:
            self._flush(out)
            out.append(self._closers[-1])
        self._held.clear()
        self._closers.pop()
        self._end_value()

    def _flush(self, out: list[str]) -> None:
        out.extend(self._held)
        self._held.clear()
        self._held_comma = False


def _is_finite(number: str) -> bool:
    """Readers get a number of it that they can write again; integers stay exact whatever their size."""
    return number.lstrip("-").isdigit() or math.isfinite(float(number))
