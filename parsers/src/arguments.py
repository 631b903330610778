"""Writes the arguments of one call as JSON while its parameters arrive."""

from collections.abc import Callable, Container
from json.encoder import encode_basestring
from typing import Literal

from .json_stream import JsonStream
from .schema import Tools

Kind = Literal["text", "json", "guess", "members"]
"""How the value is read: as raw text; as JSON; as JSON if it is of an allowed type, else text; as members to unwrap."""

WRAPPERS = frozenset({"arguments", "args", "input", "parameters", "params"})
"""Parameter names that models have been seen to wrap the real arguments in."""


class ArgumentWriter:
    """The arguments of one call, in the official layout `{"name": value, "name": value}`.

    The fragments that the methods return concatenate to one JSON object once `finish` was called, and to the beginning
    of one if `cut` was called instead. A value is either text, which becomes a JSON string as it arrives, or JSON,
    which passes through verbatim as it arrives. A JSON value that turns out not to be JSON is given again as a string,
    the whole of it, under the same name: where part of it is out already the object then names the parameter twice,
    and JSON readers take the last. What is tried first may be given up for the next: "members" for what the value
    would be without its wrapper's name, "guess" and "json" for "text".

    Args:
        function: the function called.
        tools: what its schema is looked up in.
        repair: unwrap arguments that were wrapped once more.
        note: called with (code, detail) for each departure.
    """

    def __init__(self, function: str, tools: Tools, repair: bool, note: Callable[[str, str], None]):
        self._function = function
        self._tools = tools
        self._repair = repair
        self._note = note
        self._names: set[str] = set()
        self._open = False  # the brace is out
        # The value being written, or the last one:
        self._name = ""
        self._kind: Kind = "text"
        self._wrapped_kind: Kind = "json"  # what "members" is given up for
        self._is_body = False
        self._types: frozenset[str] | None = None
        self._stream = JsonStream()
        self._raw: list[str] = []  # all of a JSON value, should it turn out to be text
        self._guess: list[str] = []  # the JSON of a value whose kind is not decided
        self._begun = False  # part of the value is out
        self._in_value = False

    @property
    def in_value(self) -> bool:
        """A parameter has begun and has not ended."""
        return self._in_value

    @property
    def is_empty(self) -> bool:
        """No parameter has begun."""
        return not self._names

    @property
    def unread(self) -> int | None:
        """How much of the text that was written last stands after the object, if this is a body and it ended."""
        return self._stream.unread if self._is_body and self._kind == "members" else None

    def begin(self, name: str, is_string: bool | None) -> str:
        """A parameter begins. `is_string` is its attribute, None to let the schema decide."""
        if name in self._names:
            self._note("duplicate_parameter", name)
        self._types = self._tools.types(self._function, name)
        declared = self._tools.parameters(self._function)
        wraps = self._repair and not self._names and name in WRAPPERS and bool(declared) and name not in declared
        self._names.add(name)
        self._name = name
        self._kind = self._choose_kind(is_string)
        self._begun = False
        self._is_body = False
        self._in_value = True
        self._raw = []
        self._guess = []
        self._stream = JsonStream()
        if wraps:
            self._unwrap(declared, self._kind)
            return ""
        if self._kind == "text":
            if is_string and self._types is not None and "string" not in self._types:
                self._note("type_conflict", f"{name}: string, the schema says {_listed(self._types)}")
            return self._begin_text()
        return ""

    def begin_body(self) -> str:
        """The whole object follows as JSON, without parameters around its members."""
        fragment = self.begin("arguments", False)
        self._unwrap(_Anything(), "json", alone=False)
        self._is_body = True
        return fragment

    def write(self, text: str) -> str:
        """More of the value."""
        if self._kind == "text":
            return encode_basestring(text)[1:-1]
        self._raw.append(text)
        return self._write_json(text)

    def end(self) -> str:
        """The value is over."""
        self._in_value = False
        if self._kind == "text":
            return '"'
        rest = self._emit(self._stream.finish())
        if self._stream.failed:
            return rest + self._fall_back() + self.end()
        for repair in sorted(self._stream.repairs):
            self._note(repair, self._name)
        if self._kind == "members":
            self._note("wrapped_arguments", self._name)
        elif self._types is not None and not _allowed(self._stream.kind, self._types):
            self._note("type_conflict", f"{self._name}: {self._stream.kind}, the schema says {_listed(self._types)}")
        if self._kind == "guess":
            return self._key() + "".join(self._guess)
        return rest

    def finish(self) -> str:
        """The call is complete: no parameter follows."""
        return "}" if self._open else "{}"

    def cut(self) -> str:
        """The output stops inside the call: what was held back, as it was written. Nothing is closed."""
        if not self._in_value:
            return "" if self._open else self._brace()
        if self._kind == "members" and self._stream.undecided and not self._is_body:
            fragment = self._fall_back()
            return fragment + self.cut()
        if self._kind == "text":
            return ""
        held = self._stream.held()
        if self._kind == "guess":
            return self._key() + "".join(self._guess) + held
        if self._begun:
            return held
        return (self._separator() if self._kind == "members" else self._key()) + held

    def _choose_kind(self, is_string: bool | None) -> Kind:
        if is_string is not None:
            return "text" if is_string else "json"
        if self._types == frozenset({"string"}):
            return "text"
        return "guess" if self._types is None or "string" in self._types else "json"

    def _unwrap(self, names: Container[str], otherwise: Kind, *, alone: bool = True) -> None:
        self._kind = "members"
        self._wrapped_kind = otherwise
        self._stream = JsonStream(members_of=names, alone=alone)

    def _write_json(self, text: str) -> str:
        fragment = self._emit(self._stream.feed(text))
        kind = self._stream.kind
        if self._kind == "guess" and kind and not (kind != "string" and _allowed(kind, self._types)):
            self._stream.failed = True  # it reads as a JSON value, but of a type that is not allowed
        return fragment + self._fall_back() if self._stream.failed else fragment

    def _emit(self, json_text: str) -> str:
        if self._kind == "guess":
            self._guess.append(json_text)
            return ""
        if not json_text or self._begun:
            return json_text
        self._begun = True
        return (self._separator() if self._kind == "members" else self._key()) + json_text

    def _fall_back(self) -> str:
        """The value is not what it was taken for: write all of it again as the next kind."""
        raw = "".join(self._raw)
        if self._kind == "members" and not self._begun:
            self._kind = self._wrapped_kind
            if self._kind == "text":
                return self._begin_text() + self.write(raw)
            self._stream = JsonStream()
            return self._write_json(raw)
        if self._kind != "guess":
            self._note("not_json", self._name)
        closing = self._stream.abandon() if self._begun else ""
        self._kind = "text"
        self._raw = []
        return closing + self._begin_text() + self.write(raw)

    def _begin_text(self) -> str:
        self._begun = True
        return self._key() + '"'

    def _key(self) -> str:
        return f"{self._separator()}{encode_basestring(self._name)}: "

    def _separator(self) -> str:
        return ", " if self._open else self._brace()

    def _brace(self) -> str:
        self._open = True
        return "{"


class _Anything:
    def __contains__(self, name: object) -> bool:
        return True


def _allowed(kind: str | None, types: frozenset[str] | None) -> bool:
    return types is None or kind in types or (kind == "number" and "integer" in types)


def _listed(types: frozenset[str]) -> str:
    return " or ".join(sorted(types))
