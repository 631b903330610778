"""What the tools' JSON schemas say about the type of an argument."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .messages import read_tools

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_PYTHON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_PYTHON_TYPES |= {list: "array", dict: "object"}
_MAX_DEPTH = 32


class Tools:
    """The functions a request offers, by name. Empty means: not known, so every name is possible."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None):
        self._functions = {function["name"]: function for function in read_tools(tools)}
        self._types: dict[tuple[str, str], frozenset[str] | None] = {}

    def may_call(self, name: str) -> bool:
        """False if the request's tools are known and `name` is none of them."""
        return not self._functions or name in self._functions

    def parameters(self, function: str) -> frozenset[str]:
        """The declared parameters of a function; empty where none are known."""
        return frozenset(self._properties(function))

    def types(self, function: str, parameter: str) -> frozenset[str] | None:
        """The JSON types the schema allows for a parameter; None where it doesn't say."""
        key = (function, parameter)
        if key not in self._types:
            schema = self._properties(function).get(parameter)
            self._types[key] = _Resolver(self._schema(function)).types(schema) if schema is not None else None
        return self._types[key]

    def _schema(self, function: str) -> Any:
        return self._functions.get(function, {}).get("parameters")

    def _properties(self, function: str) -> Mapping[str, Any]:
        schema = self._schema(function)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return properties if isinstance(properties, Mapping) else {}


class _Resolver:
    """Reads types through `$ref`, `anyOf`, `oneOf`, `allOf`, `enum`, `const`, `nullable` and lists of types."""

    def __init__(self, root: Any):
        self._root = root
        self._references: dict[str, frozenset[str] | None] = {}

    def types(self, schema: Any, depth: int = 0) -> frozenset[str] | None:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return None
        types = self._declared(schema, depth)
        if types is not None and schema.get("nullable") is True:
            types |= {"null"}
        if types is not None and "number" in types:
            types |= {"integer"}
        return types

    def _declared(self, schema: Mapping[str, Any], depth: int) -> frozenset[str] | None:
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference not in self._references:
                self._references[reference] = frozenset()  # a cycle adds nothing
                self._references[reference] = self.types(self._resolve(reference), depth + 1)
            return self._references[reference]
        declared = schema.get("type")
        if isinstance(declared, str):
            return frozenset({declared}) & ALL_TYPES or None
        if isinstance(declared, list):
            return frozenset(t for t in declared if isinstance(t, str)) & ALL_TYPES or None
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                return _union(self.types(option, depth + 1) for option in schema[key])
        if isinstance(schema.get("allOf"), list):
            known = [types for part in schema["allOf"] if (types := self.types(part, depth + 1)) is not None]
            return frozenset.intersection(*known) or None if known else None
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values:
            return _union(frozenset({_PYTHON_TYPES[type(v)]}) if type(v) in _PYTHON_TYPES else None for v in values)
        if "properties" in schema:
            return frozenset({"object"})
        return frozenset({"array"}) if "items" in schema else None

    def _resolve(self, reference: str) -> Any:
        """Follow a JSON pointer inside the function's own schema; None where it leads nowhere."""
        if not reference.startswith("#"):
            return None
        schema = self._root
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(step) if isinstance(schema, Mapping) else None
        return schema


def _union(options: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    types: frozenset[str] = frozenset()
    for option in options:
        if option is None:
            return None
        types |= option
    return types or None
