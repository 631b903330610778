"""Whatever a schema says, what its grammar lets a model write is read back as arguments that the schema allows."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from schema_cases import SCHEMAS

from dsv32_plugin.parsers import OutputParser
from dsv32_plugin.parsers.constraint import Grammar, forced_calls, schema_or_calls

xgrammar = pytest.importorskip("xgrammar", reason="xgrammar, which the engines bring, judges the grammar")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, which the engines bring, judges the arguments")

WALKS = 2
LONGEST = 600
"""Of a walk, in tokens; from half of it on the walk makes for an end."""
CLOSING = ("</｜DSML｜parameter>", '"', "]", "}")

Walk = Callable[[Grammar, int], str]


@pytest.fixture(scope="module")
def walk() -> Walk:
    """A text that the grammar lets a model write, with a vocabulary of characters and some marks."""
    vocabulary = [*map(chr, range(9, 127)), *"杭数｜", *CLOSING, "</｜DSML｜", "parameter>\n", '", "', "<eos>"]
    vocabulary = list(dict.fromkeys(vocabulary))
    eos = vocabulary.index("<eos>")
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[eos]))
    closing = [vocabulary.index(text) for text in CLOSING]

    def walk(grammar: Grammar, seed: int) -> str:
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(json.dumps(grammar.structural_tag)))
        return random_walk(matcher, vocabulary, eos, closing, random.Random(seed))

    return walk


def random_walk(matcher: Any, vocabulary: list[str], eos: int, closing: list[int], choice: random.Random) -> str:
    mask = xgrammar.allocate_token_bitmask(1, len(vocabulary))
    said: list[str] = []
    while len(said) < LONGEST:
        matcher.fill_next_token_bitmask(mask)
        words = [int(word) & 0xFFFFFFFF for word in mask[0]]
        allowed = [token for token in range(len(vocabulary)) if words[token // 32] >> token % 32 & 1]
        assert allowed, "".join(said)
        wanted = [token for token in (eos, *closing) if token in allowed]
        ends = wanted and choice.random() < (0.2 if len(said) < LONGEST / 2 else 0.9)
        token = wanted[0] if ends else choice.choice(allowed)
        assert matcher.accept_token(token)
        if token == eos:
            return "".join(said)
        said.append(vocabulary[token])
    raise AssertionError(f"no end after {LONGEST} tokens: {''.join(said)[-200:]}")


@pytest.mark.parametrize("name", SCHEMAS)
def test_forced_arguments_are_what_the_schema_allows(walk: Walk, name: str) -> None:
    tools = [{"name": "f", "parameters": SCHEMAS[name]}]
    grammar = forced_calls(tools, parallel=False)
    judge = jsonschema.Draft202012Validator(as_2020(SCHEMAS[name]))
    for seed in range(WALKS):
        text = walk(grammar, seed)
        message = OutputParser.parse(text, tools)
        assert [call.name for call in message.tool_calls] == ["f"], text
        assert not message.content, text
        # Of names that a schema leaves free one may come twice.
        assert {note.code for note in message.notes} <= {"duplicate_parameter"}, text
        judge.validate(json.loads(message.tool_calls[0].arguments))


@pytest.mark.parametrize("name", SCHEMAS)
def test_forced_answers_are_what_the_schema_allows(walk: Walk, name: str) -> None:
    judge = jsonschema.Draft202012Validator(as_2020(SCHEMAS[name]))
    for seed in range(WALKS):
        judge.validate(json.loads(walk(schema_or_calls(SCHEMAS[name]), seed)))


def as_2020(schema: Any) -> Any:
    """What older drafts said otherwise, for a validator of today's."""
    if isinstance(schema, list):
        return [as_2020(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: as_2020(value) for key, value in schema.items() if key != "$schema"}
    if isinstance(schema.get("items"), list):
        schema["prefixItems"] = schema.pop("items")
    if schema.get("exclusiveMinimum") is True:
        schema["exclusiveMinimum"] = schema.pop("minimum")
    if schema.pop("nullable", False):
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema
