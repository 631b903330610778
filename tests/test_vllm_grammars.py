"""What vLLM is told to constrain an answer to, without a server."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from transformers import TokenizersBackend
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from dsv32_plugin.core.chat import call_grammar
from dsv32_plugin.core.config import DEEPSEEK_V32
from dsv32_plugin.parsers.protocol import THINK_END, THINK_START
from dsv32_plugin.vllm_adapter import grammars
from dsv32_plugin.vllm_adapter.answers import AnswerParser
from dsv32_plugin.vllm_adapter.parsers import DsaToolParser
from dsv32_plugin.vllm_adapter.upstream import ClientError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "function", "function": {"name": "f"}}
FORMATS = [
    pytest.param({"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}, SCHEMA, id="schema"),
    pytest.param({"type": "json_object"}, {"type": "object"}, id="object"),
    pytest.param({"type": "text"}, None, id="text"),
]
UNIQUE = {"type": "object", "properties": {"v": {"type": "array", "items": {"enum": [1]}, "uniqueItems": True}}}
MULTIPLE = {"type": "object", "properties": {"v": {"type": "integer", "multipleOf": 5}}}
DSA = SimpleNamespace(architectures=[DEEPSEEK_V32], is_diffusion=False)
LLAMA = SimpleNamespace(architectures=["LlamaForCausalLM"], is_diffusion=False)


class Parser(AnswerParser):
    tool_parser_cls = DsaToolParser


def tool(strict: bool = False) -> dict[str, Any]:
    return {"name": "f", "parameters": SCHEMA, "strict": strict}


def adjusted(request: Any) -> Any:
    """The request as vLLM hands it on."""
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: {THINK_START: 7, THINK_END: 8})
    return Parser(tokenizer, request.tools).adjust_request(request)


def grammar_of(request: Any) -> str | None:
    wanted = adjusted(request).extract_structured_outputs()
    if wanted is None or wanted.structural_tag is None:
        return None
    return json.loads(wanted.structural_tag)["format"]["grammar"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("response_format", "schema"), FORMATS)
@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_a_format_beside_tools_means_this_or_calls(
    choice: Any, response_format: dict[str, Any], schema: Any, strict: bool
) -> None:
    """Stock vLLM leaves no room for calls, or drops the format where a tool is strict."""
    request = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "?"}],
        tools=[{"type": "function", "function": tool(strict)}],
        tool_choice=choice,
        response_format=response_format,
    )
    name = choice if isinstance(choice, str) else "f"
    expected = call_grammar([tool(strict)], name, parallel=True, answer=schema)
    assert grammar_of(request) == (None if expected is None else expected.ebnf)
    if expected is not None:
        assert ('"{"' in expected.ebnf.splitlines()[0] or "json" in expected.ebnf.splitlines()[0]) == (
            choice == "auto" and schema is not None
        )
        assert request.response_format is None


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    ("text_format", "schema"),
    [
        pytest.param({"type": "json_schema", "name": "s", "schema": SCHEMA}, SCHEMA, id="schema"),
        pytest.param({"type": "json_object"}, {"type": "object"}, id="object"),
    ],
)
def test_so_does_the_text_format_of_responses(choice: str, text_format: dict[str, Any], schema: Any) -> None:
    request = ResponsesRequest(
        model="m", input="?", tools=[{"type": "function", **tool()}], tool_choice=choice, text={"format": text_format}
    )
    expected = call_grammar([tool()], choice, parallel=True, answer=schema)
    assert expected is not None
    assert grammar_of(request) == expected.ebnf


def test_a_grammar_of_the_clients_own_is_kept_or_refused() -> None:
    def request(strict: bool) -> ChatCompletionRequest:
        return ChatCompletionRequest(
            model="m",
            messages=[{"role": "user", "content": "?"}],
            tools=[{"type": "function", "function": tool(strict)}],
            structured_outputs={"regex": "a+"},
        )

    assert adjusted(request(strict=False)).structured_outputs.regex == "a+"
    with pytest.raises(ValueError, match="structured_outputs: expected none beside strict tools"):
        adjusted(request(strict=True))


def validated(model: Any, backend: str, **wanted: Any) -> StructuredOutputsParams:
    """What vLLM makes of it before the engine is asked."""
    grammars.hook()
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**wanted))
    config = SimpleNamespace(backend=backend, disable_any_whitespace=False)
    tokenizer = object.__new__(TokenizersBackend)
    params._validate_structured_outputs(model, config, tokenizer)
    assert params.structured_outputs is not None
    return params.structured_outputs


@pytest.mark.parametrize("schema", [UNIQUE, MULTIPLE], ids=["uniqueItems", "multipleOf"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_schema_beyond_the_backend_is_enforced_but_for_that(schema: Any, as_text: bool) -> None:
    """With `auto` it made vLLM choose a backend that refuses the grammar of every call, until the server ended."""
    wanted = validated(DSA, "xgrammar", json=json.dumps(schema) if as_text else schema)
    assert wanted.json is None
    assert wanted.grammar is not None
    assert wanted._backend == "xgrammar"


def test_other_schemas_are_left_to_vllm() -> None:
    assert validated(DSA, "xgrammar", json=SCHEMA).json == SCHEMA


def test_other_models_are_left_alone() -> None:
    with pytest.raises((ClientError, ValueError), match="features not supported by xgrammar"):
        validated(LLAMA, "xgrammar", json=MULTIPLE)
    assert validated(LLAMA, "auto", json=MULTIPLE)._backend == "guidance"


def test_a_backend_without_our_grammars_is_named() -> None:
    grammar = call_grammar([tool()], "required", parallel=True)
    assert grammar is not None
    tag = json.dumps(grammar.structural_tag)
    with pytest.raises(ValueError, match=r"--structured-outputs-config\.backend xgrammar .* started with guidance"):
        validated(DSA, "guidance", structural_tag=tag)
    assert validated(DSA, "xgrammar", structural_tag=tag).structural_tag == tag
    assert validated(DSA, "guidance", json=MULTIPLE).json == MULTIPLE


@pytest.mark.parametrize(
    ("chosen", "becomes"), [("auto", "xgrammar"), ("xgrammar", "xgrammar"), ("guidance", "guidance")]
)
def test_the_backend_is_chosen_once(chosen: str, becomes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[Any] = []
    monkeypatch.setattr(grammars, "logger", SimpleNamespace(warning=lambda *text: warned.append(text)))
    config: Any = SimpleNamespace(structured_outputs_config=SimpleNamespace(backend=chosen))
    grammars.choose_backend(config)
    assert config.structured_outputs_config.backend == becomes
    assert bool(warned) == (becomes != "xgrammar")
