"""The values that an enum lists: those that the rest of the schema allows, and how a call writes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from . import ebnf
from .judge import fits
from .protocol import PARAMETER_END, parameter_start
from .shapes import All, Schema, Shape, types_of
from .tags import Tag, read_tag

_MAX_LISTED = 250_000
"""Of an enum, in characters: xgrammar takes two seconds for so many."""
BEFORE_NAME, AFTER_NAME = parameter_start("\0", is_string=True).removesuffix('string="true">').split("\0")
END: Final = f"{PARAMETER_END}\n"
_UNWRITABLE = "values of an enum that no tag can have, or that hold the end of one"


def shapes(schema: Schema, schemas: All) -> Iterator[Shape]:
    """The shapes of a schema, their values without those that other keywords exclude."""
    for shape in schema.shapes(schemas):
        if shape.values is None:
            yield shape
            continue
        rest = replace(shape, values=None)
        values = tuple(value for value in shape.values if fits(schema, rest, value))
        if len(json.dumps(values)) > _MAX_LISTED:
            schema.leave_out(f"an enum of {len(values)} values, which is too long")
            yield replace(rest, types=frozenset(kind for value in values for kind in types_of(value)))
        elif values:
            yield replace(shape, values=values)


def texts(schema: Schema, values: Sequence[Any]) -> list[str]:
    """The grammar of the texts among values, as a parameter has them; none where there is none."""
    found = [value for value in values if isinstance(value, str)]
    writable = [ebnf.text(value) for value in found if _is_raw(value)]
    if len(writable) < len(found):
        schema.leave_out(_UNWRITABLE)
    return [" | ".join(writable)] if writable else []


def calls(schema: Schema, values: Sequence[Any]) -> list[str]:
    """The grammar of the parameters of each object among values."""
    found = [value for value in values if isinstance(value, Mapping)]
    writable = [value for value in found if all(is_name(name) and _is_raw(item) for name, item in value.items())]
    if len(writable) < len(found):
        schema.leave_out(_UNWRITABLE)
    return [" ".join(_line(*member) for member in value.items()) or '"\\n"' for value in writable]


def before(name: str) -> str:
    """The grammar of a parameter's tag up to its attribute."""
    return ebnf.text(BEFORE_NAME + name + AFTER_NAME)


def is_name(name: str) -> bool:
    """A tag can have it."""
    text = parameter_start(name, is_string=True)
    tag = read_tag(text, 0, official_only=True)
    return isinstance(tag, Tag) and tag.name == name and tag.end == len(text) and ebnf.is_text(name)


def _is_raw(value: Any) -> bool:
    """A parameter can hold it."""
    return not isinstance(value, str) or (PARAMETER_END not in value and ebnf.is_text(value))


def _line(name: str, value: Any) -> str:
    written = ebnf.text(f'string="true">{value}') if isinstance(value, str) else _json(value)
    return f"{before(name)} {written} {ebnf.text(END)}"


def _json(value: Any) -> str:
    attribute = ebnf.text('string="false">')
    return f"{attribute} {ebnf.json_text(value)}"
