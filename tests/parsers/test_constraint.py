"""The grammar of calls accepts what DeepSeek's encoding writes, and nothing that the parser would read otherwise."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv32_plugin.parsers import EncodingError, OutputParser, encode_messages
from dsv32_plugin.parsers.constraint import forced_calls, optional_calls
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
    ["type", "properties", "required", "enum", "const", "$ref", "$defs", "anyOf", "allOf", "items", "nullable", "a"]
)
WORDS = st.sampled_from(["string", "object", "a", "#/$defs/a", "#/properties/a", ""])
ODD_SCHEMAS = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCHEMA_KEYS, inner, max_size=4),
    max_leaves=12,
)


def official(*calls: tuple[str, Mapping[str, Any]]) -> str:
    """The text of a turn that makes these calls, as the model is trained to write it."""
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": n, "arguments": a} for n, a in calls]}
    messages = [{"role": "user", "content": "?"}]
    options: dict[str, Any] = {"thinking_mode": "chat", "tools": TOOLS}
    prompt = encode_messages(messages, **options)
    return encode_messages([*messages, turn], **options).removeprefix(prompt).removesuffix(EOS)


@pytest.fixture(scope="module")
def accepts() -> Callable[[Mapping[str, Any], str], bool]:
    characters = sorted({*map(chr, range(1, 128)), *"｜杭州"})
    tokenizer = xgrammar.TokenizerInfo([*characters, "<eos>"], stop_token_ids=[len(characters)])
    compiler = xgrammar.GrammarCompiler(tokenizer)

    def judge(tag: Mapping[str, Any], text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(json.dumps(tag)))
        return matcher.accept_string(text) and matcher.accept_token(len(characters))

    return judge


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
        pytest.param({"properties": 5}, "properties: expected an object, got int", id="properties"),
        pytest.param({"properties": {"a": {}}, "required": "a"}, "required: expected a list, got str", id="required"),
        pytest.param({"properties": {"a": {"enum": 5}}}, "enum: expected a list, got int", id="enum"),
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


@given(ODD_SCHEMAS)
def test_any_schema_gives_a_grammar_or_its_fault(parameters: Any) -> None:
    with suppress(EncodingError):
        tag = forced_calls([{"name": "f", "parameters": parameters}])
        assert json.loads(json.dumps(tag)) == tag
