"""A grammar is what its schema says, no more and no less; where it can't be, the log names the keyword."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from dsv32_plugin.parsers.constraint import Grammar, forced_calls, schema_or_calls

Accepts = Callable[[Grammar, str], bool]
LARGE = 2**64 - 1
BLOCK = '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{}</｜DSML｜invoke>\n</｜DSML｜function_calls>'


def parameter(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    kind = "true" if isinstance(value, str) else "false"
    return f'<｜DSML｜parameter name="{name}" string="{kind}">{text}</｜DSML｜parameter>\n'


def of(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def names(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "patternProperties": schema, **more}


CAT = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog"]}}, "required": ["kind"]}
ADD = {"type": "object", "properties": {"v": {"type": "integer"}}, "required": ["v"], "additionalProperties": False}
CLEAR = {"type": "object", "properties": {"w": {"type": "integer"}}, "additionalProperties": False}
NUMBERS = {"type": "integer"}
STRINGS = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        pytest.param({"enum": [1, 5, 10.5, "x"], "minimum": 5}, ["5", "10.5", '"x"'], ["1"], id="enum-and-minimum"),
        pytest.param({"enum": ["a", "abc", 3], "maxLength": 2}, ['"a"', "3"], ['"abc"'], id="enum-and-length"),
        pytest.param({"enum": ["ab", "ba"], "pattern": "^a"}, ['"ab"'], ['"ba"'], id="enum-and-pattern"),
        pytest.param({"enum": [[1], [1, 2]], "minItems": 2}, ["[1, 2]"], ["[1]"], id="enum-and-items"),
        pytest.param(
            {"enum": [{"a": 1}, {"a": "x"}], "properties": {"a": NUMBERS}},
            ['{"a": 1}'],
            ['{"a": "x"}'],
            id="enum-and-of",
        ),
        pytest.param({"const": 5, "type": "integer", "exclusiveMaximum": 6}, ["5"], ["6"], id="const"),
        pytest.param({"type": "integer", "minimum": 10**16}, [str(10**16), str(10**30)], ["5"], id="large-minimum"),
        pytest.param(
            {"type": "integer", "minimum": 0, "maximum": LARGE}, [str(LARGE), "0"], [str(LARGE + 1), "-1"], id="64-bits"
        ),
        pytest.param(
            {"type": "number", "minimum": 1e-9, "maximum": 2e-9},
            ["0.000000001", "0.0000000015", "0.000000002"],
            ["0", "0.0000000009", "0.0000000021", "0.0000000020001"],
            id="small-bounds",
        ),
        pytest.param(
            {"type": "integer", "multipleOf": 5},
            ["0", "5", "-10", "123456789012345678901234567890"],
            ["1", "-0", "05", "12", "5.0"],
            id="multiples",
        ),
        pytest.param(
            {"type": "integer", "multipleOf": 15, "minimum": 0, "exclusiveMaximum": 1440},
            ["0", "45", "1425"],
            ["1440", "-15", "50"],
            id="multiples-listed",
        ),
        pytest.param(
            {"type": "number", "multipleOf": 0.01, "minimum": 0},
            ["0", "7", "0.07", "19.9", "19.90", "1000000.01"],
            ["-0.01", "0.001", "1.", "00.01"],
            id="multiples-in-cents",
        ),
        pytest.param(
            {"allOf": [{"type": "number", "multipleOf": 0.5}, {"multipleOf": 0.2}], "exclusiveMinimum": -11},
            ["-10", "3", "2000"],
            ["-11", "0.5", "0.2", "-0.6"],
            id="multiples-of-two",
        ),
        pytest.param(
            {"enum": [1, 2.5, 7.5, "x"], "multipleOf": 2.5}, ["2.5", "7.5", '"x"'], ["1"], id="enum-and-multiples"
        ),
        pytest.param(
            {"type": "number", "exclusiveMinimum": -1, "maximum": 0.5},
            ["-0.99999999999", "0", "0.123456789123", "0.5"],
            ["-1", "-1.0", "0.500000001"],
            id="many-digits",
        ),
        pytest.param(
            {
                "type": "array",
                "prefixItems": [NUMBERS, STRINGS],
                "items": {"type": "integer", "minimum": 2, "maximum": 1},
                "maxItems": 1,
            },
            ["[1]", "[]"],
            ['[1, "x"]'],
            id="a-tuple-cut-short",
        ),
        pytest.param(
            {"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-02-30"', '"2025-06-31"'], id="date"
        ),
        pytest.param(
            {"type": "string", "format": "ipv6"},
            ['"2001:db8::1"', '"::"', '"::1"', '"1:2:3:4:5:6:7:8"', '"1::"'],
            ['"1:2"', '"1::2::3"', '"12345::"', '"1:2:3:4:5:6:7:8:9"'],
            id="ipv6",
        ),
        pytest.param(
            {"type": "string", "format": "hostname"}, ['"a-b.example"', '"x"'], ['"-a"', '"a..b"', '""'], id="hostname"
        ),
        pytest.param(
            {"type": "string", "format": "duration"},
            ['"P1D"', '"PT1H30M"', '"P1Y2M3DT4S"', '"P2W"'],
            ['"P"', '"PT"', '"1D"', '"P1DT"', '"P1H"'],
            id="duration",
        ),
        pytest.param({"type": "integer", "format": "int64"}, ["5"], ['"5"'], id="format-of-a-number"),
        pytest.param(
            {"oneOf": [CAT, DOG]}, ['{"kind": "cat"}', '{"kind": "dog"}'], ['{"kind": "x"}'], id="one-of-kinds"
        ),
        pytest.param({"oneOf": [ADD, CLEAR]}, ['{"v": 1}', '{"w": 1}', "{}"], ['{"v": 1, "w": 1}'], id="one-of-closed"),
        pytest.param({"oneOf": [STRINGS, NUMBERS]}, ['"x"', "5"], ["null"], id="one-of-types"),
        pytest.param(
            names({"^x-": NUMBERS}, additionalProperties=STRINGS),
            ['{"x-a": 1, "x": "s", "y": "s"}'],
            ['{"x-a": "s"}', '{"y": 1}', '{"x-": "s"}'],
            id="patterns-and-others",
        ),
        pytest.param(
            names({"^a": NUMBERS, "^[b-d]+$": STRINGS}),
            ['{"ab": 1, "bc": "s"}'],
            ['{"ab": "s"}', '{"bc": 1}'],
            id="patterns-apart",
        ),
    ],
)
def test_what_a_grammar_can_say_is_enforced(accepts: Accepts, schema: Any, allowed: Any, refused: Any) -> None:
    grammar = schema_or_calls(of({"anyOf": [schema]}))
    assert grammar.left_out == ()
    for value in allowed:
        assert accepts(grammar, f'{{"a": {value}}}'), value
    for value in refused:
        assert not accepts(grammar, f'{{"a": {value}}}'), value


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        pytest.param(
            {"oneOf": [NUMBERS, {"type": "number"}]}, "oneOf, of which more than one may hold", id="one-of-that-overlap"
        ),
        pytest.param(
            {"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]},
            "oneOf, of which more than one may hold",
            id="one-of-required",
        ),
        pytest.param(
            names({"^a": NUMBERS, "b$": {"minimum": 5, "type": "integer"}}),
            "patternProperties where properties or others of them speak of the same name",
            id="patterns-that-overlap",
        ),
        pytest.param(
            names({"b$": NUMBERS}, additionalProperties=STRINGS),
            "patternProperties where properties or others of them speak of the same name",
            id="pattern-and-others",
        ),
        pytest.param(
            names({"^a": NUMBERS}, properties={"ab": {"minimum": 3, "type": "integer"}}),
            "patternProperties where properties or others of them speak of the same name",
            id="pattern-of-a-property",
        ),
        pytest.param(
            {"type": "string", "allOf": [{"format": "date"}, {"format": "email"}]},
            "format 'email' (besides another)",
            id="two-formats",
        ),
        pytest.param(
            {"type": "string", "pattern": "^2", "format": "date"},
            "format 'date' (besides another)",
            id="pattern-format",
        ),
        pytest.param({"type": "string", "format": "iri"}, "format 'iri'", id="format"),
        pytest.param({"type": "integer", "multipleOf": 7}, "multipleOf", id="multiple"),
        pytest.param({"type": "number", "multipleOf": 1e-300}, "multipleOf", id="small-multiple"),
        pytest.param({"type": "integer", "maximum": 10**30}, "maximum with so many digits", id="bound"),
        pytest.param({"type": "number", "minimum": 1e-30}, "minimum with so many digits", id="digits"),
        pytest.param({"type": "string", "maxLength": 10**6}, "maxLength", id="length"),
        pytest.param({"minLength": 5}, "a schema without a type, taken as that of string", id="no-type"),
        pytest.param({"properties": {}}, "a schema without a type, taken as that of object", id="no-type-of-an-object"),
        pytest.param({"enum": ["x" * 1000 + str(i) for i in range(300)]}, "an enum of 300 values, which is", id="long"),
    ],
)
def test_what_it_cannot_say_is_told_by_name(schema: Any, says: str) -> None:
    for grammar in (schema_or_calls(of(schema)), forced_calls([{"name": "f", "parameters": of(schema)}])):
        (said,) = grammar.left_out
        assert said.partition(": ")[2].startswith(says)


def test_an_enum_of_all_parameters(accepts: Accepts) -> None:
    """It was taken for an object of any parameters."""
    values = [{"a": 1, "b": "x"}, {}, {"a": [1, "｜"]}, {"a": 7}]
    schema = {"type": "object", "enum": values, "properties": {"a": {"maximum": 6}}}
    grammar = forced_calls([{"name": "f", "parameters": schema}])
    assert grammar.left_out == ()
    allowed = [parameter("a", 1) + parameter("b", "x"), "\n", parameter("a", [1, "｜"])]
    for text in allowed:
        assert accepts(grammar, BLOCK.format(text)), text
    for text in (parameter("a", 1), parameter("a", 7), parameter("b", "x"), parameter("a", 1) + parameter("b", "y")):
        assert not accepts(grammar, BLOCK.format(text)), text


def test_a_value_that_no_parameter_can_hold_is_told() -> None:
    schema = of({"enum": ["x", "</｜DSML｜parameter>"]})
    (said,) = forced_calls([{"name": "f", "parameters": schema}]).left_out
    assert said == "tool f: values of an enum that no tag can have, or that hold the end of one"
