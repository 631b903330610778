"""JSON schemas taken apart: a schema allows what one of several shapes allows.

A shape is a schema without references and combinations: `$ref` is resolved against the whole schema, `allOf` is merged,
`anyOf` and `oneOf` become several shapes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, TypeAlias
from urllib.parse import unquote

from . import regex
from .formats import OF_NUMBERS
from .messages import EncodingError

TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})

All: TypeAlias = tuple[Any, ...]
"""Schemas, as they stand in the request, all of which hold; none says nothing."""

_MAX_SHAPES = 1024
"""Of one schema: more are a product of combinations that nobody wrote down."""
_MAX_DEPTH = 64
_MOST_APART = 100
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_UNREAD = (
    *("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames", "unevaluatedItems"),
    *("contains", "uniqueItems"),
)
"""Keywords that are no part of a shape."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a value may be: of one of the types and as the members below say for its type.

    Attributes:
        types: None where the schema names none; "number" includes "integer".
        values: the only ones that are allowed, None for any.
        properties: of an object, in the order of the schema; None where it does not say.
        required: the names that an object must have.
        additional: what all other properties are; None where the schema does not say.
        patterns: what the properties are whose name matches, by regular expression.
        prefix: the first items of an array.
        items: those that follow; None where the schema does not say.
        bounds: the numeric keywords.
        steps: what a number must be a multiple of, each.
        regexes: what a string must match, each.
        formats: of a string.
    """

    types: frozenset[str] | None = None
    values: tuple[Any, ...] | None = None
    properties: Mapping[str, All] | None = None
    required: tuple[str, ...] = ()
    additional: All | None = None
    patterns: Mapping[str, All] = field(default_factory=dict)
    prefix: tuple[All, ...] = ()
    items: All | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[Decimal, ...] = ()
    regexes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()

    def all_types(self) -> frozenset[str]:
        """The types, guessed from what else is said where the schema names none."""
        if self.values is not None:
            listed = frozenset(kind for value in self.values for kind in types_of(value))
            return listed if self.types is None else listed & self.types
        if self.types is not None:
            return self.types
        bounds = frozenset(self.bounds)
        meant = set()
        if self.properties is not None or self.required or self.patterns or self.additional is not None:
            meant.add("object")
        if self.prefix or self.items is not None:
            meant.add("array")
        if self.regexes or not OF_NUMBERS.issuperset(self.formats):
            meant.add("string")
        if self.steps:
            meant.add("number")
        meant |= {kind for kind, keywords in _OF_TYPE.items() if bounds & frozenset(keywords)}
        return frozenset(meant | {"integer"} if "number" in meant else meant) or TYPES

    def of_name(self, name: str) -> All:
        """What the property of that name must be, declared or not."""
        matching = [schemas for pattern, schemas in self.patterns.items() if regex.matches(pattern, name)]
        declared = self.properties or {}
        if name in declared or matching:
            return _join(declared.get(name, ()), *matching)
        return self.additional or ()

    def of_index(self, index: int) -> All:
        """What the item there must be."""
        return self.prefix[index] if index < len(self.prefix) else self.items or ()


class Schema:
    """A whole schema, as the root of its references.

    Args:
        root: the schema.
        where: what it is the schema of, as errors name it; None to take what is no schema for one that says nothing.

    Attributes:
        left_out: what no shape says, each thing once.
    """

    def __init__(self, root: Any, where: str | None = None):
        self.root = root
        self.left_out: dict[str, None] = {}
        self._where = where
        self._shapes: dict[int, list[Shape]] = {}

    def shapes(self, schemas: All) -> list[Shape]:
        """What holds where all `schemas` do; empty where nothing can.

        Raises:
            EncodingError: one of them is no schema.
        """
        found = [Shape()]
        for schema in schemas:
            found = self._both(found, self._of(schema, ()))
        return found

    def leave_out(self, what: str) -> None:
        """A part of the schema is not enforced."""
        self.left_out[what] = None

    def _of(self, schema: Any, above: tuple[int, ...]) -> list[Shape]:
        if schema is True:
            return [Shape()]
        if schema is False:
            return []
        if not isinstance(schema, Mapping):
            self._fault("schema", "an object or a boolean", schema)
            return [Shape()]
        known = self._shapes.get(id(schema))
        if known is not None:
            return known
        if id(schema) in above:
            self.leave_out("a schema that refers to itself alone, which says nothing")
            return [Shape()]
        if len(above) >= _MAX_DEPTH:
            self.leave_out("combinations nested too deep")
            return [Shape()]
        found = self._combined(schema, (*above, id(schema)))
        self._shapes[id(schema)] = found
        return found

    def _combined(self, schema: Mapping[str, Any], above: tuple[int, ...]) -> list[Shape]:
        found = self._own(schema)
        for keyword in _REFERENCES:
            if schema.get(keyword) is not None:
                found = self._both(found, self._referred(schema[keyword], above))
        for part in self._list(schema, "allOf"):
            found = self._both(found, self._of(part, above))
        for keyword in ("anyOf", "oneOf"):
            options = self._list(schema, keyword)
            if options:
                each = [self._of(option, above) for option in options]
                if keyword == "oneOf" and not self._are_apart(each):
                    self.leave_out("oneOf, of which more than one may hold")
                either = {id(shape): shape for shapes in each for shape in shapes}
                found = self._both(found, list(either.values()))
        if schema.get("unevaluatedProperties") is not None:
            # Of the properties that none of the above speaks of.
            others = _join((schema["unevaluatedProperties"],))
            found = [replace(shape, additional=others) if shape.additional is None else shape for shape in found]
        if schema.get("nullable") is True and found:
            found = [*found, Shape(types=frozenset({"null"}))]
        return found

    def _both(self, left: list[Shape], right: list[Shape]) -> list[Shape]:
        """The shapes of what is allowed by one of each side."""
        if left == [Shape()]:
            merged = right
        elif right == [Shape()]:
            merged = left
        elif len(left) * len(right) > _MAX_SHAPES:
            self.leave_out("a combination of too many alternatives")
            return left
        else:
            pairs = (_merged(a, b) for a in left for b in right)
            merged = [shape for shape in pairs if shape is not None]
        if len(merged) > _MAX_SHAPES:
            self.leave_out("a combination of too many alternatives")
            return left
        return merged

    def _are_apart(self, options: list[list[Shape]]) -> bool:
        """Whether a look at types, listed values and required properties tells that no value fits two options."""
        if sum(map(len, options)) > _MOST_APART:
            return False
        pairs = (
            (a, b) for place, some in enumerate(options) for others in options[:place] for a in some for b in others
        )
        return all(self._is_apart(a, b) for a, b in pairs)

    def _is_apart(self, a: Shape, b: Shape) -> bool:
        types = a.all_types() & b.all_types()
        if not types or _merged(a, b) is None:
            return True
        return types == {"object"} and any(
            False in a.of_name(name)
            or False in b.of_name(name)
            or (
                name in a.required
                and name in b.required
                and None not in (these := [self._listed(shape.of_name(name)) for shape in (a, b)])
                and not any(equal(value, other) for value in these[0] or () for other in these[1] or ())
            )
            for name in (*a.required, *b.required)
        )

    def _listed(self, schemas: All) -> tuple[Any, ...] | None:
        """The values that one of the schemas lists; None where none does itself or by a reference."""
        for schema in schemas:
            for _ in range(_MAX_DEPTH):
                if not isinstance(schema, Mapping):
                    break
                values = self._values(schema)
                if values is not None:
                    return values
                try:
                    schema = self._resolve(schema["$ref"])
                except (LookupError, TypeError, AttributeError):
                    break
        return None

    def _referred(self, reference: Any, above: tuple[int, ...]) -> list[Shape]:
        if not isinstance(reference, str):
            self._fault("$ref", "text", reference)
            return [Shape()]
        try:
            target = self._resolve(reference)
        except LookupError:
            self.leave_out(f"$ref {reference!r}, which leads nowhere in this schema")
            return [Shape()]
        return self._of(target, above)

    def _resolve(self, reference: str) -> Any:
        """Follow a JSON pointer, or an anchor, from the root; raises LookupError."""
        own = self.root.get("$id") if isinstance(self.root, Mapping) else None
        if isinstance(own, str) and own and reference.startswith(own.rstrip("#")):
            reference = reference[len(own.rstrip("#")) :] or "#"
        if not reference.startswith("#"):
            raise LookupError(reference)
        pointer = unquote(reference[1:])
        if pointer and not pointer.startswith("/"):
            return self._anchored(pointer)
        found = self.root
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found[step]
            elif isinstance(found, list) and step.isdecimal():
                found = found[int(step)]
            else:
                raise LookupError(reference)
        return found

    def _anchored(self, name: str) -> Any:
        waiting = [self.root]
        while waiting:
            value = waiting.pop()
            if isinstance(value, Mapping):
                if name in (value.get("$anchor"), value.get("$dynamicAnchor")):
                    return value
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
        raise LookupError(name)

    def _own(self, schema: Mapping[str, Any]) -> list[Shape]:
        """What the schema says itself, beside its references and combinations."""
        for keyword in _UNREAD:
            if schema.get(keyword) not in (None, False):
                self.leave_out(keyword)
        values = self._values(schema)
        if values == ():
            return []
        return [
            Shape(
                types=self._types(schema),
                values=values,
                properties=self._properties(schema),
                required=tuple(dict.fromkeys(self._list(schema, "required", str))),
                additional=self._additional(schema),
                patterns={key: _join((value,)) for key, value in self._mapping(schema, "patternProperties").items()},
                **self._items(schema),
                bounds=self._bounds(schema),
                steps=tuple(self._steps(schema)),
                regexes=tuple(self._texts(schema, "pattern")),
                formats=tuple(self._texts(schema, "format")),
            )
        ]

    def _properties(self, schema: Mapping[str, Any]) -> Mapping[str, All] | None:
        if schema.get("properties") is None:
            return None
        return {name: _join((value,)) for name, value in self._mapping(schema, "properties").items()}

    def _types(self, schema: Mapping[str, Any]) -> frozenset[str] | None:
        declared = schema.get("type")
        if declared is None:
            return None
        named = declared if isinstance(declared, list) else [declared]
        known = {name for name in named if isinstance(name, str)} & TYPES
        if len(known) < len({str(name) for name in named}) or not known:
            self._fault("type", f"one or a list of {', '.join(sorted(TYPES))}", declared, shown=True)
            return None
        return frozenset(known | {"integer"} if "number" in known else known)

    def _values(self, schema: Mapping[str, Any]) -> tuple[Any, ...] | None:
        listed = tuple(self._list(schema, "enum")) or None
        if "const" not in schema:
            return listed
        const = schema["const"]
        return (const,) if listed is None or any(equal(const, value) for value in listed) else ()

    def _additional(self, schema: Mapping[str, Any]) -> All | None:
        value = schema.get("additionalProperties")
        return None if value is None else _join((value,))

    def _items(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        items, prefix = schema.get("items"), self._list(schema, "prefixItems")
        if isinstance(items, list):  # as it was before 2020
            prefix, items = items, schema.get("additionalItems")
        return {"prefix": tuple(_join((item,)) for item in prefix), "items": None if items is None else _join((items,))}

    def _bounds(self, schema: Mapping[str, Any]) -> dict[str, float]:
        bounds: dict[str, float] = {}
        for keyword in (*_LOWER, *_UPPER):
            value = schema.get(keyword)
            if value is True and keyword.startswith("exclusive"):  # as it was before 2019
                value = schema.get(keyword.removeprefix("exclusive").lower())
            if value is None or value is False:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
                self._fault(keyword, "a number", value)
            else:
                bounds[keyword] = value
        return bounds

    def _steps(self, schema: Mapping[str, Any]) -> Iterator[Decimal]:
        value = schema.get("multipleOf")
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value) or value <= 0:
            self._fault("multipleOf", "a number above zero", value)
        else:
            yield Decimal(str(value))

    def _texts(self, schema: Mapping[str, Any], keyword: str) -> Iterator[str]:
        value = schema.get(keyword)
        if isinstance(value, str):
            yield value
        elif value is not None:
            self._fault(keyword, "text", value)

    def _mapping(self, schema: Mapping[str, Any], keyword: str) -> Mapping[str, Any]:
        value = schema.get(keyword)
        if isinstance(value, Mapping):
            return value
        if value is not None and value != []:  # PHP writes an empty object as an empty list
            self._fault(keyword, "an object", value)
        return {}

    def _list(self, schema: Mapping[str, Any], keyword: str, of: type = object) -> Sequence[Any]:
        value = schema.get(keyword)
        if isinstance(value, list) and all(isinstance(item, of) for item in value):
            return value
        if value is not None and value != {}:
            self._fault(keyword, "a list" if of is object or not isinstance(value, list) else "a list of names", value)
        return ()

    def _fault(self, keyword: str, expected: str, value: Any, shown: bool = False) -> None:
        if self._where is not None:
            got = repr(value)[:80] if shown else type(value).__name__
            raise EncodingError(f"{self._where}: {keyword}: expected {expected}, got {got}")


def types_of(value: Any) -> frozenset[str]:
    """The JSON types of a value: a whole number is also a number."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, (int, float)):
        whole = isinstance(value, int) or value.is_integer()
        return frozenset({"number", "integer"} if whole else {"number"})
    names = {str: "string", type(None): "null", list: "array", dict: "object"}
    return frozenset({names[type(value)]}) if type(value) in names else frozenset()


def _merged(a: Shape, b: Shape) -> Shape | None:
    """What both allow; None for nothing."""
    types = a.types if b.types is None else b.types if a.types is None else a.types & b.types
    values = a.values if b.values is None else b.values
    if a.values is not None and b.values is not None:
        values = tuple(value for value in a.values if any(equal(value, other) for other in b.values))
    if types == frozenset() or values == ():
        return None
    declared = dict.fromkeys((*(a.properties or ()), *(b.properties or ())))
    patterns = {key: _join(a.patterns.get(key, ()), b.patterns.get(key, ())) for key in (*a.patterns, *b.patterns)}
    length = max(len(a.prefix), len(b.prefix))
    bounds = dict(a.bounds)
    for keyword, value in b.bounds.items():
        tighter = max if keyword in _LOWER else min
        bounds[keyword] = tighter(value, bounds.get(keyword, value))
    return Shape(
        types=types,
        values=values,
        properties=None
        if a.properties is b.properties is None
        else {name: _join(a.of_name(name), b.of_name(name)) for name in declared},
        required=tuple(dict.fromkeys((*a.required, *b.required))),
        additional=_join_known(a.additional, b.additional),
        patterns=patterns,
        prefix=tuple(_join(a.of_index(index), b.of_index(index)) for index in range(length)),
        items=_join_known(a.items, b.items),
        bounds=bounds,
        steps=tuple(dict.fromkeys((*a.steps, *b.steps))),
        regexes=tuple(dict.fromkeys((*a.regexes, *b.regexes))),
        formats=tuple(dict.fromkeys((*a.formats, *b.formats))),
    )


def is_finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)  # which takes no integer above a float's


def _join(*groups: All) -> All:
    """All schemas of all groups, each once, but for those that say nothing."""
    found = {id(schema): schema for group in groups for schema in group}
    return tuple(schema for schema in found.values() if schema is not True)


def _join_known(a: All | None, b: All | None) -> All | None:
    return b if a is None else a if b is None else _join(a, b)


def equal(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0, and is not true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    return bool(a == b)
