"""The grammar of calls accepts what DeepSeek's encoding writes, and nothing that the parser would read otherwise."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv32_plugin.parsers import EncodingError, OutputParser, encode_messages
from dsv32_plugin.parsers.constraint import forced_calls, optional_calls, schema_or_calls
from dsv32_plugin.parsers.protocol import EOS

xgrammar = pytest.importorskip("xgrammar", reason="xgrammar, which the engines bring, judges the grammar")

CITY = {"type": "string", "enum": ["Hangzhou", "Paris"]}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": CITY,
                    "days": {"type": "integer"},
                    "note": {"type": "string"},
                    "limit": {"type": ["string", "null"]},
                    "at": {"$ref": "#/$defs/Point"},
                    "any": {},
                },
                "required": ["city", "days"],
                "$defs": {"Point": POINT},
            },
        },
    },
    {"name": "now"},
]


SCHEMA_KEYS = st.sampled_from(
    [
        *("type", "properties", "required", "enum", "const", "nullable", "a", "additionalProperties", "format"),
        *("$ref", "$defs", "$id", "$anchor", "anyOf", "oneOf", "allOf", "not", "items", "prefixItems", "pattern"),
        *("patternProperties", "minimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems"),
        *("minProperties", "maxProperties", "uniqueItems", "multipleOf", "if"),
    ]
)
WORDS = st.sampled_from(
    [
        *(
            "string",
            "object",
            "integer",
            "array",
            "a",
            "date",
            "^a+$",
            "(a+)+$",
            "a{2,}",
            "[",
            "(?<=a)b",
            "\\p{L}",
            "｜",
        ),
        *(
            "#",
            "#/$defs/a",
            "#/properties/a",
            "#/items",
            "#/anyOf/0",
            "#/%24defs/~1",
            "#a",
            "https://x/y",
            "",
            "\0",
            "\ud800",
        ),
    ]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -(10**30), 0.1, 1e300, 2**63])
ODD_SCHEMAS = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCHEMA_KEYS, inner, max_size=5),
    max_leaves=20,
)
LIKELY_SCHEMAS = st.deferred(
    lambda: (
        st.booleans()
        | st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(
                    ["object", "array", "string", "integer", "number", ["null", "string"], "boolean"]
                ),
                "$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/a", "#/$defs/b"]),
                "properties": st.dictionaries(st.sampled_from("ab"), LIKELY_SCHEMAS, max_size=2),
                "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
                "additionalProperties": LIKELY_SCHEMAS,
                "patternProperties": st.dictionaries(
                    st.sampled_from(["^a", "b$", "(a|b)+"]), LIKELY_SCHEMAS, max_size=1
                ),
                "items": LIKELY_SCHEMAS,
                "prefixItems": st.lists(LIKELY_SCHEMAS, max_size=2),
                "allOf": st.lists(LIKELY_SCHEMAS, max_size=2),
                "anyOf": st.lists(LIKELY_SCHEMAS, min_size=1, max_size=2),
                "$defs": st.fixed_dictionaries({"a": LIKELY_SCHEMAS, "b": LIKELY_SCHEMAS}),
                "enum": st.lists(st.sampled_from(["x", 1, None, 2.5, {"a": 1}]), min_size=1, max_size=3),
                "minimum": st.integers(-9, 9),
                "maximum": st.floats(-9, 9),
                "minItems": st.integers(0, 3),
                "maxItems": st.integers(0, 3),
                "minLength": st.integers(0, 3),
                "maxLength": st.integers(0, 3),
                "pattern": st.sampled_from(["^a", "b$", "^[ab]*$"]),
            },
        )
    )
)


BLOCK = '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{}\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'


def official(*calls: tuple[str, Mapping[str, Any]]) -> str:
    """The text of a turn that makes these calls, as the model is trained to write it."""
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": n, "arguments": a} for n, a in calls]}
    messages = [{"role": "user", "content": "?"}]
    options: dict[str, Any] = {"thinking_mode": "chat", "tools": TOOLS}
    prompt = encode_messages(messages, **options)
    return encode_messages([*messages, turn], **options).removeprefix(prompt).removesuffix(EOS)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"city": "Paris", "days": 2}, id="required-only"),
        pytest.param({"city": "Paris", "days": -2, "note": " <b>\n杭州 </｜DSML｜invoke> "}, id="any-text"),
        pytest.param({"city": "Paris", "days": 2, "limit": None}, id="null-of-a-type-list"),
        pytest.param({"city": "Paris", "days": 2, "limit": "none"}, id="string-of-a-type-list"),
        pytest.param({"city": "Paris", "days": 2, "at": {"x": 3}}, id="reference"),
        pytest.param({"city": "Paris", "days": 2, "any": [1, {"a": "b"}]}, id="untyped-json"),
        pytest.param({"city": "Paris", "days": 2, "any": "text"}, id="untyped-text"),
    ],
)
def test_official_calls_are_accepted_and_read_back(accepts: Callable[..., bool], arguments: dict[str, Any]) -> None:
    text = official(("weather", arguments))
    assert accepts(forced_calls(TOOLS), text)
    call = OutputParser.parse(text, TOOLS).tool_calls[0]
    assert json.loads(call.arguments) == arguments


def test_parallel_calls_and_calls_without_arguments(accepts: Callable[..., bool]) -> None:
    text = official(("now", {}), ("weather", {"city": "Paris", "days": 1}))
    assert accepts(forced_calls(TOOLS), text)
    assert not accepts(forced_calls(TOOLS, parallel=False), text)
    assert accepts(forced_calls(TOOLS, parallel=False), official(("now", {})))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(">Paris<", "> Paris<", id="space-before-a-value"),
        pytest.param(">Paris<", ">London<", id="not-in-the-enum"),
        pytest.param('string="true"', 'string="false"', id="wrong-attribute"),
        pytest.param(">1<", ">one<", id="not-an-integer"),
        pytest.param("weather", "forecast", id="unknown-function"),
        pytest.param("\n\n<｜DSML｜function_calls>", "Well,\n\n<｜DSML｜function_calls>", id="text-before"),
        pytest.param("</｜DSML｜function_calls>", "", id="unclosed"),
    ],
)
def test_anything_else_is_refused(accepts: Callable[..., bool], old: str, new: str) -> None:
    text = official(("weather", {"city": "Paris", "days": 1}))
    assert old in text
    assert not accepts(forced_calls(TOOLS), text.replace(old, new, 1))


def test_optional_calls_leave_text_free(accepts: Callable[..., bool]) -> None:
    text = official(("weather", {"city": "Paris", "days": 1}))
    assert accepts(optional_calls(TOOLS), "I just talk < about it.")
    assert accepts(optional_calls(TOOLS), "I ask." + text)
    assert not accepts(optional_calls(TOOLS), text.replace("Paris", "London"))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        pytest.param([1], "parameters: expected an object, got list", id="parameters"),
        pytest.param("object", "parameters: expected an object, got str", id="parameters-as-text"),
        pytest.param({"properties": 5}, "properties: expected an object, got int", id="properties"),
        pytest.param({"properties": {"a": {}}, "required": "a"}, "required: expected a list, got str", id="required"),
        pytest.param({"required": [1]}, "required: expected a list of names, got list", id="required-names"),
        pytest.param({"properties": {"a": {"enum": 5}}}, "enum: expected a list, got int", id="enum"),
        pytest.param({"properties": {"a": 5}}, "schema: expected an object or a boolean, got int", id="property"),
        pytest.param({"properties": {"a": {"$ref": 5}}}, r"\$ref: expected text, got int", id="reference"),
        pytest.param({"properties": {"a": {"minLength": "5"}}}, "minLength: expected a number, got str", id="bound"),
        pytest.param({"properties": {"a": {"pattern": 5}}}, "pattern: expected text, got int", id="pattern"),
        pytest.param({"allOf": {"a": 1}}, "allOf: expected a list, got dict", id="all-of"),
        pytest.param({"type": "strnig"}, "type: expected one or a list of array, .*, got 'strnig'", id="type"),
        pytest.param(
            {"type": "array"}, "parameters: expected the schema of an object, got that of array", id="no-object"
        ),
    ],
)
def test_a_schema_that_is_none_is_named(parameters: Any, says: str) -> None:
    with pytest.raises(EncodingError, match=f"^tool f: {says}$"):
        forced_calls([{"name": "f", "parameters": parameters}])


def test_what_is_empty_is_absent() -> None:
    """PHP writes an empty object as an empty list."""
    absent = forced_calls([{"name": "f"}])
    assert forced_calls([{"name": "f", "parameters": []}]) == absent
    assert forced_calls([{"name": "f", "parameters": {"properties": [], "required": {}}}]) == absent


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        pytest.param({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems", id="keyword"),
        pytest.param({"properties": {"a": {"$ref": "https://x/y"}}}, "$ref 'https://x/y', which leads", id="elsewhere"),
        pytest.param({"$ref": "#/$defs/a"}, "$ref '#/$defs/a', which leads nowhere", id="nowhere"),
        pytest.param(
            {"properties": {"a": {"type": "string", "pattern": "(?<=a)b"}}}, "pattern '(?<=a)b'", id="pattern"
        ),
        pytest.param({"properties": {"a": {"not": {}}}}, "not", id="not"),
        pytest.param({"allOf": [{"type": "object"}, False]}, "all of it: nothing fits it", id="never"),
        pytest.param(
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "all of it: nothing",
            id="endless",
        ),
        pytest.param({"properties": {"a": {}, "|DSML|": {}}}, "the parameter '|DSML|', whose name", id="name"),
    ],
)
def test_what_cannot_be_said_allows_more_and_is_told(accepts: Callable[..., bool], parameters: Any, says: str) -> None:
    grammar = forced_calls([{"name": "f", "parameters": parameters}])
    assert grammar.left_out[0].startswith(f"tool f: {says}")
    given = ('string="false">[1, 1]', 'string="true">any')
    assert any(
        accepts(grammar, BLOCK.format(f'<｜DSML｜parameter name="a" {text}</｜DSML｜parameter>')) for text in given
    )


def test_an_answer_is_by_the_schema_or_calls(accepts: Callable[..., bool]) -> None:
    grammar = schema_or_calls(POINT, TOOLS, parallel=False)
    call = official(("now", {}))
    assert accepts(grammar, '{"x": 1}')
    assert accepts(grammar, call)
    for text in ('{"y": 1}', '{"x": 1}' + call, call + call, "Well,", "", '{"x":  1}', '{"x": 1}\n'):
        assert not accepts(grammar, text), text


def test_forced_json_has_no_white_space_to_run_away_in(accepts: Callable[..., bool]) -> None:
    """xgrammar 0.2.1 knows no bound for what it makes of a schema itself: a random model went on to its limit."""
    grammar = forced_calls([{"name": "f", "parameters": {"properties": {"a": POINT, "b": {}}}}])
    value = '<｜DSML｜parameter name="{}" string="false">{}</｜DSML｜parameter>'
    assert accepts(grammar, BLOCK.format(value.format("a", '{"x": 1}')))
    assert accepts(grammar, BLOCK.format(value.format("b", '[1, {"y": [2, 3]}]')))
    for text in ('{  "x": 1}', '{"x":\n1}', ' {"x": 1}', '{"x": 1} ', '{"x" : 1}', '{\t"x": 1}'):
        assert not accepts(grammar, BLOCK.format(value.format("a", text))), text
        assert not accepts(grammar, BLOCK.format(value.format("b", text))), text


def test_a_value_never_ends_too_early(accepts: Callable[..., bool]) -> None:
    """The parser ends a value at its end tag, also inside JSON, so JSON must escape what is part of it."""
    parameters = {"properties": {"a": {"type": "array", "items": {}}, "b": {"type": "string", "maxLength": 99}}}
    grammar = forced_calls([{"name": "f", "parameters": parameters}])
    mark = "</｜DSML｜parameter>"
    for value in (f'string="false">["{mark}"]', f'string="true">x{mark}y'):
        name = "a" if "false" in value else "b"
        assert not accepts(grammar, BLOCK.format(f'<｜DSML｜parameter name="{name}" {value}{mark}'))
    escaped = mark.replace("｜", "\\uff5c")
    text = BLOCK.format(f'<｜DSML｜parameter name="a" string="false">["{escaped}"]{mark}')
    assert accepts(grammar, text)
    assert json.loads(OutputParser.parse(text).tool_calls[0].arguments) == {"a": [mark]}


@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(ODD_SCHEMAS | LIKELY_SCHEMAS)
def test_any_schema_gives_a_grammar_or_its_fault(parameters: Any) -> None:
    """One that xgrammar reads, too."""
    OutputParser([{"name": "f", "parameters": parameters}])
    for make in (lambda: forced_calls([{"name": "f", "parameters": parameters}]), lambda: schema_or_calls(parameters)):
        try:
            grammar = make()
        except EncodingError:
            continue
        assert len(grammar.ebnf) < 1_000_000
        xgrammar.Grammar.from_structural_tag(json.dumps(grammar.structural_tag))


def doubled(depth: int, keyword: str) -> dict[str, Any]:
    """Written out, it has two to the power of `depth` parts."""
    definitions: dict[str, Any] = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    for i in range(depth):
        definitions[f"d{i}"]["properties"] = {f"p{i}": {"$ref": f"#/$defs/d{i + 1}"}}
    definitions[f"d{depth}"] = {"type": "object", "properties": {"x": {"type": "integer"}}}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def test_too_large_a_schema_allows_anything(accepts: Callable[..., bool]) -> None:
    """Beside others, which are as they would be without it."""
    large = {"properties": {f"p{i}": {"type": "object", "properties": {"x": {"type": "integer"}}} for i in range(3000)}}
    tools = [*TOOLS, {"name": "f", "parameters": large}, {"name": "free", "parameters": {}}]
    grammar = forced_calls(tools)
    assert grammar.left_out == ("tool f: all of it: it is too large",)
    assert accepts(
        grammar, BLOCK.format('<｜DSML｜parameter name="a" string="false">[1, {"b": "c"}]</｜DSML｜parameter>')
    )
    assert accepts(grammar, official(("weather", {"city": "Paris", "days": 2})))
    assert not accepts(grammar, official(("weather", {"city": "London", "days": 2})))


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param(doubled(30, "allOf"), id="all-of-doubled"),
        pytest.param(doubled(30, "anyOf"), id="any-of-doubled"),
        pytest.param(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(9)]} for i in range(9)]},
            id="product-of-unions",
        ),
        pytest.param({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}, id="thousand-properties"),
        pytest.param(nested(200), id="deep"),
        pytest.param({"properties": {"a": {"type": "string", "pattern": "((a{99}){99}){99}"}}}, id="large-pattern"),
        pytest.param({"properties": {"a" * 60: {}}, "patternProperties": {"(a+)+$": {}}}, id="slow-pattern"),
        pytest.param({"properties": {"a": {"enum": [str(i) for i in range(5000)]}}}, id="large-enum"),
        pytest.param({"properties": {"a": {"type": "string", "minLength": 10**9, "maxLength": 10**12}}}, id="lengths"),
    ],
)
def test_no_schema_takes_long(parameters: Any) -> None:
    started = time.process_time()
    grammar = forced_calls([{"name": "f", "parameters": parameters}])
    assert len(grammar.ebnf) < 2_000_000
    xgrammar.Grammar.from_structural_tag(json.dumps(grammar.structural_tag))
    assert time.process_time() - started < 5


def test_a_long_enum_compiles_as_fast_as_xgrammars_own() -> None:
    """The tags around each of its texts took four times as long."""
    schema = {"type": "object", "properties": {"a": {"enum": [f"{i * 7919 % 10007} of many" for i in range(2000)]}}}
    grammar = forced_calls([{"name": "f", "parameters": schema}])
    assert len(grammar.ebnf) < 1.2 * len(json.dumps(schema))
