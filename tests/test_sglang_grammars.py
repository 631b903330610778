"""What SGLang is told to constrain an answer to, without a server."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, MessageProcessingResult

from dsv32_plugin.apis import anthropic
from dsv32_plugin.apis.conversation import serve
from dsv32_plugin.apis.exchange import Server
from dsv32_plugin.core.chat import call_grammar
from dsv32_plugin.sglang_adapter import grammars
from dsv32_plugin.sglang_adapter.names import PARSER_NAME

pytestmark = pytest.mark.engine

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "function", "function": {"name": "f"}}
FORMATS = [
    pytest.param({"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}, SCHEMA, id="schema"),
    pytest.param({"type": "json_object"}, {"type": "object"}, id="object"),
    pytest.param({"type": "text"}, None, id="text"),
]


def tool(strict: bool = False) -> dict[str, Any]:
    return {"name": "f", "parameters": SCHEMA, "strict": strict}


def make_request(strict: bool = False, **options: Any) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": tool(strict)}]
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}], tools=tools, **options)


def make_serving(backend: str = "xgrammar", parser: str = PARSER_NAME) -> Any:
    manager = SimpleNamespace(server_args=SimpleNamespace(grammar_backend=backend))
    return SimpleNamespace(tool_call_parser=parser, tokenizer_manager=manager)


def as_sglang(serving: Any, request: Any, is_multimodal: bool) -> MessageProcessingResult:
    """As much of SGLang's own as matters here."""
    return MessageProcessingResult(
        prompt="", prompt_ids=[], image_data=None, audio_data=None, video_data=None, modalities=[], stop=[]
    )


def parameters(request: ChatCompletionRequest, serving: Any = None) -> dict[str, Any]:
    """What SGLang's own endpoint asks of the engine."""
    result = grammars.process_around(as_sglang, serving or make_serving(), request, False)
    return request.to_sampling_params([], {}, tool_call_constraint=result.tool_call_constraint)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("response_format", "schema"), FORMATS)
@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_a_format_beside_tools_means_this_or_calls(
    choice: Any, response_format: dict[str, Any], schema: Any, strict: bool
) -> None:
    """Stock SGLang makes no call then, not even a forced one."""
    request = make_request(strict, tool_choice=choice, response_format=response_format)
    name = choice if isinstance(choice, str) else "f"
    expected = call_grammar([tool(strict)], name, parallel=True, answer=schema)
    asked = parameters(request)
    if expected is None:
        assert not {"structural_tag", "json_schema"} & asked.keys()
        return
    assert asked.get("json_schema") is None
    tag = grammars.StructuralTag.model_validate_json(asked["structural_tag"])
    assert tag.format.grammar == expected.ebnf


def test_a_forced_call_wins_over_a_grammar_of_the_clients_own() -> None:
    assert parameters(make_request(tool_choice="required", regex="a+"))["regex"] is None
    assert parameters(make_request(tool_choice="auto", regex="a+"))["regex"] == "a+"
    with pytest.raises(ValueError, match="expected none beside strict tools"):
        parameters(make_request(True, tool_choice="auto", regex="a+"))


@pytest.mark.parametrize("backend", ["llguidance", "outlines", "none"])
def test_a_backend_without_our_grammars_is_named(backend: str) -> None:
    with pytest.raises(ValueError, match=f"--grammar-backend xgrammar .* started with {backend}"):
        parameters(make_request(tool_choice="required"), make_serving(backend))
    assert "structural_tag" not in parameters(make_request(tool_choice="auto"), make_serving(backend))


def test_other_parsers_are_left_alone() -> None:
    request = make_request(tool_choice="required")
    assert "structural_tag" not in parameters(request, make_serving(parser="qwen25"))


@pytest.mark.parametrize("with_tools", [False, True])
def test_the_text_format_of_responses_is_a_format(with_tools: bool) -> None:
    """Releases before 0.5.18 do not know it and answered in any text."""
    text_format = {"type": "json_schema", "name": "s", "schema": SCHEMA}
    made: list[Any] = []

    async def create(serving: Any, request: Any, raw_request: Any) -> None:
        inner = make_request() if with_tools else ChatCompletionRequest(model="m", messages=[])
        made.append(grammars.process_around(as_sglang, make_serving(), inner, False).tool_call_constraint)

    async def body() -> dict[str, Any]:
        return {"text": {"format": text_format}}

    raw_request = SimpleNamespace(json=body)
    asyncio.run(grammars.create_responses_around(create, make_serving(), SimpleNamespace(), raw_request))
    kind, value = made[0]
    if not with_tools:
        assert (kind, value) == ("json_schema", SCHEMA)
        return
    expected = call_grammar([tool()], "auto", parallel=True, answer=SCHEMA)
    assert expected is not None
    assert value.format.grammar == expected.ebnf
    assert grammars._text_format.get() is None


@pytest.mark.parametrize("with_tools", [False, True])
def test_the_output_format_of_messages_is_a_format(with_tools: bool) -> None:
    """The class of 0.5.15 has no field for it, and the answer was any text."""
    said = {"type": "json_schema", "schema": SCHEMA}
    body = {"messages": [{"role": "user", "content": "?"}], "output_config": {"format": said}}
    serve(anthropic.read(body, Server()).conversation)
    try:
        asked = parameters(make_request() if with_tools else ChatCompletionRequest(model="m", messages=[]))
    finally:
        serve(None)
    if not with_tools:
        assert json.loads(asked["json_schema"]) == SCHEMA
        return
    expected = call_grammar([tool()], "auto", parallel=True, answer=SCHEMA)
    assert expected is not None
    assert grammars.StructuralTag.model_validate_json(asked["structural_tag"]).format.grammar == expected.ebnf


def test_a_backend_that_the_user_chose_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    grammars.warn_of_backend("xgrammar")
    assert not caplog.records
    grammars.warn_of_backend("llguidance")
    assert "--grammar-backend llguidance: forced calls" in caplog.text
