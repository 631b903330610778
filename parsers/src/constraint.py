"""The grammar of an answer, for engines that can constrain what a model writes (xgrammar).

The format is the official one to the byte: no white space where DeepSeek puts none, since white space inside a string
parameter belongs to its value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import ebnf
from .grammar import TooLargeError, Values
from .messages import EncodingError, read_tools
from .protocol import CALLS_END, CALLS_START, INVOKE_END, PARAMETER_END, invoke_start
from .shapes import Schema
from .tags import Tag, read_tag

_NEWLINE = "\n"
_CALLS = f"\n\n{CALLS_START}\n"
_STRING = (
    '"\\"" ([\\u0020-\\u0021\\u0023-\\u005b\\u005d-\\ud7ff\\ue000-\\uff5b\\uff5d-\\U0010ffff] '
    '| "\\\\" ([\\u0022\\u005c/bfnrt] | "u" [0-9a-fA-F]{4}))* "\\""'
)


@dataclass(frozen=True)
class Grammar:
    """What an answer may be.

    Attributes:
        ebnf: as xgrammar reads it; it begins at the rule `root`.
        left_out: what of the schemas it does not enforce, for a log.
    """

    ebnf: str
    left_out: tuple[str, ...] = ()

    @property
    def structural_tag(self) -> dict[str, Any]:
        """The same in the form in which engines hand grammars of calls on."""
        return {"type": "structural_tag", "format": {"type": "grammar", "grammar": self.ebnf}}


def forced_calls(tools: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> Grammar:
    """An answer that is nothing but calls of `tools`, one or (if `parallel`) more.

    Arguments come in the order of the schema, required ones always, optional ones or not, then those of other names
    where the schema says what they are. Strings are raw, all else is JSON in the official layout.

    Args:
        tools: wrapped (`{"type": "function", "function": {...}}`) or bare.
        parallel: allow more than one call.

    Raises:
        EncodingError: parameters are no schema, or not that of an object.
    """
    writer = _Writer()
    return writer.grammar(f"{ebnf.text(_CALLS)} {writer.calls(tools, parallel)}")


def optional_calls(tools: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> Grammar:
    """An answer in free text whose calls, if it ends in any, are well-formed calls of `tools`."""
    writer = _Writer()
    block = f'"\\n" {writer.calls(tools, parallel)}'
    return writer.grammar("free", {"free": ebnf.text_up_to(CALLS_START, "block"), "block": block})


def schema_or_calls(schema: Any, tools: Sequence[Mapping[str, Any]] = (), *, parallel: bool = True) -> Grammar:
    """An answer that is one JSON value by `schema`, or calls of `tools`, which may be none.

    Raises:
        EncodingError: as `forced_calls`, or `schema` is none.
    """
    writer = _Writer()
    answer = writer.value(schema)
    if not tools:
        return writer.grammar(answer)
    return writer.grammar(f"{answer} | {ebnf.text(_CALLS)} {writer.calls(tools, parallel)}")


class _Writer:
    """Makes one grammar."""

    def __init__(self) -> None:
        self._values = Values()
        self._rules: dict[str, str] = {}
        self._roots: list[str] = []
        self._left_out: list[str] = []

    def calls(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> str:
        """Calls up to the end of their block."""
        invokes = []
        for function in read_tools(tools):
            start = invoke_start(function["name"])
            tag = read_tag(start, 0, official_only=True)
            if not isinstance(tag, Tag) or tag.name != function["name"] or not ebnf.is_text(start):
                raise EncodingError(
                    f'tool {function["name"]}: name: expected one that a tag can have, without <, > or "'
                )
            rule = self._arguments(function)
            invokes.append(f"{ebnf.text(start + _NEWLINE)} {rule} {ebnf.text(INVOKE_END)}")
        self._rules["call"] = " | ".join(invokes)
        more = r'("\n" call)*' if parallel else ""
        return f"call {more} {ebnf.text(_NEWLINE + CALLS_END)}"

    def value(self, schema: Any) -> str:
        """A JSON value."""
        return self._rule("json", schema, "response_format")

    def grammar(self, root: str, rules: Mapping[str, str] | None = None) -> Grammar:
        """All rules together."""
        self._values.write(self._roots)
        always = {"text": ebnf.text_without(PARAMETER_END), "string": _STRING}
        every = {"root": root, **(rules or {}), **self._rules, **self._values.rules, **always}
        return Grammar("\n".join(f"{name} ::= {body}" for name, body in every.items()), tuple(self._left_out))

    def _arguments(self, function: Mapping[str, Any]) -> str:
        where = f"tool {function['name']}"
        parameters = function.get("parameters")
        if parameters is None or parameters == []:  # PHP writes an empty object as an empty list
            parameters = {"properties": {}}
        if not isinstance(parameters, (Mapping, bool)):
            raise EncodingError(f"{where}: parameters: expected an object, got {type(parameters).__name__}")
        return self._rule("arguments", parameters, where)

    def _rule(self, kind: str, root: Any, where: str) -> str:
        """The rule of a schema; one of anything where none can be made."""
        schema = Schema(root, where)
        make = getattr(self._values, "value" if kind == "json" else "arguments")
        try:
            if kind == "arguments" and (types := _types(schema)) and "object" not in types:
                got = " or ".join(sorted(types))
                raise EncodingError(f"{where}: parameters: expected the schema of an object, got that of {got}")
            rule = make(schema, (root,))
            if not self._values.fits(rule):
                schema.leave_out("all of it: nothing fits it")
                rule = make(schema, ())
        except (TooLargeError, RecursionError):
            schema.leave_out("all of it: it is too large")
            rule = make(schema, ())
        self._values.fits(rule)
        self._roots.append(rule)
        self._left_out += [f"{where}: {what}" for what in schema.left_out]
        return rule


def _types(schema: Schema) -> set[str]:
    """What the schema is one of; empty where nothing fits it."""
    return {kind for shape in schema.shapes((schema.root,)) for kind in shape.all_types()}
