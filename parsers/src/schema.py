"""What the tools' JSON schemas say about the type of an argument."""

from collections.abc import Mapping, Sequence
from typing import Any

from .messages import read_tools
from .shapes import TYPES, Schema, Shape


class Tools:
    """The functions a request offers, by name. Empty means: not known, so every name is possible."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None):
        self._functions = {function["name"]: function for function in read_tools(tools)}
        self._shapes: dict[str, tuple[Schema, list[Shape]]] = {}
        self._types: dict[tuple[str, str], frozenset[str] | None] = {}

    def may_call(self, name: str) -> bool:
        """False if the request's tools are known and `name` is none of them."""
        return not self._functions or name in self._functions

    def parameters(self, function: str) -> frozenset[str]:
        """The declared parameters of a function; empty where none are known."""
        _, shapes = self._read(function)
        return frozenset(name for shape in shapes for name in shape.properties or ())

    def types(self, function: str, parameter: str) -> frozenset[str] | None:
        """The JSON types the schema allows for a parameter; None where it doesn't say."""
        key = (function, parameter)
        if key not in self._types:
            schema, shapes = self._read(function)
            allowed = [inner for shape in shapes for inner in schema.shapes(shape.of_name(parameter))]
            types = frozenset(kind for shape in allowed for kind in shape.all_types())
            self._types[key] = types if types < TYPES and types else None
        return self._types[key]

    def _read(self, function: str) -> tuple[Schema, list[Shape]]:
        if function not in self._shapes:
            root = self._functions.get(function, {}).get("parameters")
            schema = Schema({} if root is None else root)
            self._shapes[function] = schema, schema.shapes((schema.root,))
        return self._shapes[function]
