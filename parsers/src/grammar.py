"""The grammar of the values that a JSON schema allows, in the official layout."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import combinations
from typing import Any, Final

from . import ebnf, listed, multiples, regex
from .ebnf import Mode, Ranges
from .formats import FORMATS
from .options import Array, Leaf, Object, Option, Wrapped
from .shapes import TYPES, All, Schema, Shape, types_of

_MAX_RULES = 5_000
"""Of the values of one schema."""
_PASSES = 8
"""Equal rules are found from the innermost outwards."""
_MAX_COUNT = 100_000
"""Of items and characters: a schema that bounds them higher says nothing."""
_MAX_BOUND = 10**20
"""Of numbers, likewise: those of 64 bits are below."""
_MAX_DIGITS = 20
"""Of a bound, after the point."""
_NEVER = "never"
_MAX_NAME = 64
"""Of properties that a schema does not name, in characters, and of those that it does and keeps these from being."""

_IN_NAMES: Final[Ranges] = ebnf.without(((0x20, 0x7E), (0xA1, 0xD7FF), (0xE000, 0x10FFFF)), '"<>|\\' + ebnf.BAR)


class TooLargeError(ValueError):
    """The grammar of a schema would be too large."""


class Values:
    """Rules of a grammar, each made once, for all values of all schemas in it.

    Attributes:
        rules: the body of each rule by its name, once `write` has been called.
    """

    def __init__(self) -> None:
        self.rules: dict[str, str] = {}
        self._options: dict[str, list[Option]] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._waiting: list[tuple[str, str, Schema, All]] = []
        self._finite: set[str] = set()
        self._kept: list[Schema] = []
        """Rules are known by the identity of their schemas."""

    def value(self, schema: Schema, schemas: All) -> str:
        """The rule of a JSON value that all of `schemas`, parts of `schema`, allow."""
        return self._named("json", schema, schemas)

    def arguments(self, schema: Schema, schemas: All) -> str:
        """The rule of a call's parameters, each on a line of its own, by the schema of all of them as one object."""
        return self._named("arguments", schema, schemas)

    def fits(self, rule: str) -> bool:
        """Make all that the rule needs; False where no finite text fits it.

        Raises:
            TooLargeError: nothing is kept of what was made for it.
            EncodingError: part of its schema is none.
        """
        before = len(self._options)
        try:
            while self._waiting:
                name, kind, schema, schemas = self._waiting.pop()
                if len(self._options) >= before + _MAX_RULES:
                    raise TooLargeError
                self._options[name] = list(getattr(self, f"_{kind}")(schema, schemas))
        except (TooLargeError, RecursionError):
            for name in list(self._options)[before:]:
                del self._options[name]
            self._names = {key: name for key, name in self._names.items() if name in self._options}
            self._waiting.clear()
            raise TooLargeError from None
        self._find_finite(list(self._options)[before:])
        return rule in self._finite

    def write(self, roots: Iterable[str]) -> None:
        """Write these rules and all that they use, without what can never end."""
        self._join_equal(roots)
        finite = self._finite
        waiting = [name for name in roots if name in finite]
        written = set(waiting)
        while waiting:
            name = waiting.pop()
            used = {rule for option in self._options[name] for rule in option.uses() if rule in finite} - written
            written |= used
            waiting += sorted(used)
            bodies = [
                option.write(f"{name}_{index}", finite, self.rules)
                for index, option in enumerate(self._options[name])
                if finite.issuperset(option.needs())
            ]
            self.rules[name] = " | ".join(dict.fromkeys(bodies))

    def _named(self, kind: str, schema: Schema, schemas: All) -> str:
        # What says nothing is the same in every schema.
        key = (kind, id(schema) if schemas else 0, *sorted(map(id, schemas)))
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"{kind}{len(self._names)}"
            self._kept.append(schema)
            self._waiting.append((name, kind, schema, schemas))
        return name

    def _join_equal(self, kept: Iterable[str]) -> None:
        """Give what is said in several places one rule: an engine takes time for each."""
        names: dict[str, str] = {}
        for _ in range(_PASSES):
            first: dict[str, str] = {}
            before = len(names)
            for name, options in self._options.items():
                if name not in names:
                    self._options[name] = [option.with_names(names) for option in options]
                    known = first.setdefault(repr(self._options[name]), name)
                    if known != name and name not in kept:
                        names[name] = known
            if len(names) == before:
                return

    def _find_finite(self, names: list[str]) -> None:
        """Which of these rules some finite text fits. Those made last are needed by those made before."""
        grown = True
        while grown:
            before = len(self._finite)
            for name in reversed(names):
                if any(self._finite.issuperset(option.needs()) for option in self._options[name]):
                    self._finite.add(name)
            grown = len(self._finite) > before

    # What a value may be

    def _json(self, schema: Schema, schemas: All, without: frozenset[str] = frozenset()) -> Iterator[Option]:
        for shape in listed.shapes(schema, schemas):
            types = shape.all_types() - without
            if shape.types is None and shape.values is None and shape.all_types() != TYPES:
                schema.leave_out(f"a schema without a type, taken as that of {' or '.join(sorted(shape.all_types()))}")
            if shape.values is not None:
                yield from (Leaf(ebnf.json_text(value)) for value in shape.values if types_of(value) & types)
                continue
            if "string" in types:
                yield from (Leaf(body) for body in self._string(schema, shape, "json"))
            if types & {"number", "integer"} and (body := _number(schema, shape, "number" in types)):
                yield Leaf(body)
            if "boolean" in types:
                yield Leaf('"true" | "false"')
            if "null" in types:
                yield Leaf('"null"')
            if "array" in types:
                yield from self._array(schema, shape)
            if "object" in types:
                yield from self._object(schema, shape, "json")

    def _unquoted(self, schema: Schema, schemas: All) -> Iterator[Option]:
        """JSON that is no string."""
        return self._json(schema, schemas, frozenset({"string"}))

    def _argument(self, schema: Schema, schemas: All) -> Iterator[Option]:
        """A parameter from its attribute to its end: strings as they are, all else as JSON."""
        attribute = 'string="true">'
        for shape in listed.shapes(schema, schemas):
            if "string" not in shape.all_types():
                continue
            if shape.values is not None:
                bodies = listed.texts(schema, shape.values)
            else:
                bodies = list(self._string(schema, shape, "raw"))
            # The tags stand once around all texts: an engine's time follows the length of what it reads.
            yield from (Leaf(f"{ebnf.text(attribute)} ({body}) {ebnf.text(listed.END)}") for body in bodies)
        value = self._named("unquoted", schema, schemas)
        yield Wrapped(ebnf.text('string="false">'), value, ebnf.text(listed.END))

    def _arguments(self, schema: Schema, schemas: All) -> Iterator[Option]:
        for shape in listed.shapes(schema, schemas):
            if shape.values is not None:
                yield from map(Leaf, listed.calls(schema, shape.values))
            elif "object" in shape.all_types():
                yield from self._object(schema, shape, "raw")

    def _array(self, schema: Schema, shape: Shape) -> Iterator[Option]:
        least, most = _counts(schema, shape, "Items")
        never = {index for index, item in enumerate(shape.prefix) if False in item}
        prefix = shape.prefix[: min(never, default=len(shape.prefix))]
        item = shape.items
        if never or (item is not None and False in item) or (item is None and prefix):
            most, item = min(most if most is not None else len(prefix), len(prefix)), None
        if most is None or least <= most:
            rule = None if most is not None and most <= len(prefix) else self.value(schema, item or ())
            yield Array([self.value(schema, part) for part in prefix], rule, least, most)

    def _object(self, schema: Schema, shape: Shape, mode: Mode) -> Iterator[Option]:
        raw = mode == "raw"
        kind = "argument" if raw else "json"
        declared = dict.fromkeys((*(shape.properties or ()), *shape.required))
        members = []
        for name in declared:
            schemas, required = shape.of_name(name), name in shape.required
            if raw and not listed.is_name(name):
                schema.leave_out(f"the parameter {name[:80]!r}, whose name no tag can have")
            elif False not in schemas:
                members.append((self._key(name, mode), self._named(kind, schema, schemas), required))
            elif required:
                return
        free = []
        for pattern, schemas in shape.patterns.items():
            key = self._free_key(schema, mode, declared, pattern)
            if key is not None and False not in schemas:
                free.append((key, self._named(kind, schema, schemas)))
        additional = shape.additional
        if additional is None and shape.properties is None and not shape.patterns:
            additional = ()
        prefixes = [regex.literal_prefix(pattern) for pattern in shape.patterns]
        if additional is not None and False not in additional:
            key = self._free_key(schema, mode, declared, None, [prefix for prefix in prefixes if prefix is not None])
            free.append((key or "", self._named(kind, schema, additional)))
        if not _are_apart(shape, declared, additional is not None and None in prefixes):
            schema.leave_out("patternProperties where properties or others of them speak of the same name")
        yield self._sized(schema, shape, mode, members, free)

    def _sized(
        self, schema: Schema, shape: Shape, mode: Mode, members: list[Any], free: list[tuple[str, str]]
    ) -> Object:
        least, most = _counts(schema, shape, "Properties")
        named = sum(required for _, _, required in members)
        least = max(least - named, 0)
        if least and (named < len(members) or not free):
            schema.leave_out("minProperties")
            least = 0
        if most is not None and most < len(members):
            schema.leave_out("maxProperties")
        most = None if most is None else max(most - len(members), least)
        # A call without parameters has an empty line.
        layout = ("", "", "", '"\\n"') if mode == "raw" else ('"{"', '", "', '"}"', '""')
        begin, separator, end, empty = layout
        return Object(members, free, least, most, begin, separator, end, empty)

    @staticmethod
    def _key(name: str, mode: Mode) -> str:
        if mode == "raw":
            return listed.before(name)
        return ebnf.text(json.dumps(name, ensure_ascii=not ebnf.is_text(name)).replace(ebnf.BAR, "\\uff5c") + ": ")

    def _free_key(
        self,
        schema: Schema,
        mode: Mode,
        declared: Mapping[str, None],
        pattern: str | None,
        prefixes: Sequence[str] = (),
    ) -> str | None:
        alphabet = _IN_NAMES if mode == "raw" else ebnf.EVERY
        if pattern is None and mode == "json" and not declared and not prefixes:
            return 'string ": "'
        if pattern is None:
            name = _other_than(declared, prefixes, alphabet, mode)
        else:
            name = None
            for most in (_MAX_NAME, None):  # its length cannot always be bounded
                try:
                    name = name or regex.grammar(pattern, mode, alphabet=alphabet, least=1 if most else 0, most=most)
                except regex.UnwritableError as reason:
                    why = reason
            if name is None:
                schema.leave_out(f"patternProperties {pattern[:80]!r} ({why})")
                return None
        if mode == "raw":
            return f"{ebnf.text(listed.BEFORE_NAME)} ({name}) {ebnf.text(listed.AFTER_NAME)}"
        return f'"\\"" ({name}) "\\": "'

    def _string(self, schema: Schema, shape: Shape, mode: Mode) -> Iterator[str]:
        """None where no string fits."""
        least, most = _counts(schema, shape, "Length")
        if most is not None and least > most:
            return
        quote = '"\\""' if mode == "json" else ""
        patterns = {f"pattern {pattern[:80]!r}": pattern for pattern in shape.regexes}
        patterns |= {f"format {name[:80]!r}": FORMATS.get(name, "") for name in shape.formats}
        written = None
        for what, pattern in patterns.items():
            try:
                if not pattern:
                    schema.leave_out(what)
                elif written is None:
                    written = regex.grammar(pattern, mode, least=least, most=most)
                else:
                    schema.leave_out(f"{what} (besides another)")
            except regex.UnwritableError as reason:
                schema.leave_out(f"{what} ({reason})")
        if written is not None:
            yield f"{quote} ({written}) {quote}"
            return
        if least or most is not None:
            yield f"{quote} {ebnf.repeat(ebnf.one_of(ebnf.EVERY, mode), least, most)} {quote}"
        else:
            yield "string" if mode == "json" else "text"


def _are_apart(shape: Shape, declared: Iterable[str], beside_others: bool) -> bool:
    """Whether no name is spoken of twice in an object with patterns."""
    patterns = [pattern for pattern, schemas in shape.patterns.items() if False not in schemas]
    return not patterns or not (
        beside_others
        or any(not regex.excludes(pattern, name) for pattern in patterns for name in declared)
        or any(not regex.begins_apart(one, other) for one, other in combinations(patterns, 2))
    )


def _other_than(names: Iterable[str], prefixes: Iterable[str], alphabet: Ranges, mode: Mode) -> str:
    """The grammar of a short name that is none of these, and begins with none of the prefixes."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        if len(name) <= _MAX_NAME:
            for character in name:
                node = node.setdefault(character, {})
            node[""] = {}
    for prefix in prefixes:
        node = tree
        for character in prefix:
            node = node.setdefault(character, {})
        node[_NEVER] = {}
    rest = ebnf.repeat(ebnf.one_of(alphabet, mode), 0, _MAX_NAME if mode == "raw" else None)

    def after(node: dict[str, Any], start: bool) -> str:
        branches = {character: inner for character, inner in node.items() if len(character) == 1}
        options = [f"{ebnf.one_of(ebnf.without(alphabet, branches), mode)} {rest}"]
        for character, inner in branches.items():
            if _NEVER in inner:
                continue
            one = ebnf.one_of(ebnf.intersect(alphabet, ((ord(character),) * 2,)), mode)
            options += [f"{one} ({after(inner, False)})"] if one else []
        if not start and "" not in node:
            options.append('""')
        return " | ".join(options)

    return after(tree, True)


def _number(schema: Schema, shape: Shape, fractions: bool) -> str:
    """Empty where no number fits."""
    bounds = {}
    for keyword, value in shape.bounds.items():
        if keyword.lower().endswith("imum"):
            bound = Decimal(str(value)) if abs(value) <= _MAX_BOUND else None
            if bound is None or -int(bound.as_tuple().exponent) > _MAX_DIGITS:
                schema.leave_out(f"{keyword} with so many digits")
            else:
                bounds[keyword] = bound
    low, too_low = bounds.get("minimum"), bounds.get("exclusiveMinimum")
    high, too_high = bounds.get("maximum"), bounds.get("exclusiveMaximum")
    above = too_low is not None and (low is None or too_low >= low)
    below = too_high is not None and (high is None or too_high <= high)
    low, high = too_low if above else low, too_high if below else high
    if shape.steps:
        written = multiples.grammar(shape.steps, low, high, above, below, fractions)
        if written is not None:
            return written
        schema.leave_out("multipleOf")
    if low is None and high is None:
        return ebnf.NUMBER if fractions else ebnf.INTEGER
    return ebnf.numbers(low, high, above, below) if fractions else ebnf.whole(low, high, above, below)


def _counts(schema: Schema, shape: Shape, what: str) -> tuple[int, int | None]:
    """How many at least and at most."""
    least, most = shape.bounds.get(f"min{what}", 0), shape.bounds.get(f"max{what}")
    if least > _MAX_COUNT:
        schema.leave_out(f"min{what}")
        least = 0
    if most is not None and most > _MAX_COUNT:
        schema.leave_out(f"max{what}")
    return max(math.ceil(least), 0), None if most is None or most > _MAX_COUNT else max(math.floor(most), 0)
