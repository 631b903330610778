"""Whether a schema allows a value that is given."""

from fractions import Fraction
from typing import Any

from . import regex
from .formats import FORMATS
from .shapes import All, Schema, Shape, equal, is_finite, types_of


def allows(schema: Schema, schemas: All, value: Any) -> bool:
    """Whether all of `schemas`, parts of `schema`, do, as far as shapes and Python's regular expressions tell."""
    return any(fits(schema, shape, value) for shape in schema.shapes(schemas))


def fits(schema: Schema, shape: Shape, value: Any) -> bool:
    """The same of one shape. A keyword says nothing of values of other types than its own."""
    if shape.types is not None and not types_of(value) & shape.types:
        return False
    if shape.values is not None and not any(equal(value, listed) for listed in shape.values):
        return False
    if isinstance(value, str):
        patterns = [*shape.regexes, *(FORMATS[name] for name in shape.formats if name in FORMATS)]
        return _counts(shape, "Length", len(value)) and not any(regex.excludes(each, value) for each in patterns)
    if isinstance(value, list):
        return _counts(shape, "Items", len(value)) and all(
            allows(schema, shape.of_index(index), item) for index, item in enumerate(value)
        )
    if isinstance(value, dict):
        return (
            _counts(shape, "Properties", len(value))
            and value.keys() >= set(shape.required)
            and all(allows(schema, shape.of_name(name), item) for name, item in value.items())
        )
    return "number" not in types_of(value) or _within(shape, value)


def _counts(shape: Shape, what: str, count: int) -> bool:
    least, most = shape.bounds.get(f"min{what}"), shape.bounds.get(f"max{what}")
    return (least is None or count >= least) and (most is None or count <= most)


def _within(shape: Shape, value: float) -> bool:
    bound = shape.bounds.get
    low, too_low, high, too_high = map(bound, ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"))
    return not (
        (low is not None and value < low)
        or (too_low is not None and value <= too_low)
        or (high is not None and value > high)
        or (too_high is not None and value >= too_high)
        or (shape.steps and not is_finite(value))
        or any(Fraction(str(value)) % Fraction(step) for step in shape.steps)
    )
