"""The renderer and the parsers as vLLM drives them, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.abstract_parser import DelegatingParser
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams

from dsv32_plugin.core.chat import thinking_requested, variant
from dsv32_plugin.parsers import EncodingError, encode_messages
from dsv32_plugin.parsers.protocol import THINK_END, THINK_START
from dsv32_plugin.training import tokenizer as trained
from dsv32_plugin.vllm_adapter.parsers import DsaReasoningParser, DsaToolParser
from dsv32_plugin.vllm_adapter.rendering import DsaRenderer
from dsv32_plugin.vllm_adapter.upstream import DeltaMessage

START_ID, END_ID = 7, 8
USER = [{"role": "user", "content": "Weather in Paris?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)


class Tokenizer:
    """As much of a tokenizer as these hooks ask: the trained model's, and the two tags."""

    chat_template: str | None = None
    backend_tokenizer = trained.tokenizer()

    def get_vocab(self) -> dict[str, int]:
        return {THINK_START: START_ID, THINK_END: END_ID}


def renderer(model: str = "deepseek-ai/DeepSeek-V3.2", tokenizer: Tokenizer | None = None) -> DsaRenderer:
    made = DsaRenderer.__new__(DsaRenderer)
    made.tokenizer = tokenizer or Tokenizer()
    made.variant = variant(model, model)
    return made


@pytest.mark.parametrize(
    ("kwargs", "thinking"),
    [
        ({}, False),
        (None, False),
        ({"thinking": True}, True),
        ({"enable_thinking": True}, True),
        ({"thinking": False, "enable_thinking": True}, False),
        ({"thinking": None, "enable_thinking": True}, True),
    ],
)
def test_thinking_is_off_unless_asked_for(kwargs: dict[str, Any] | None, thinking: bool) -> None:
    assert thinking_requested(kwargs) is thinking


@pytest.mark.parametrize("kwargs", [{"thinking": "false"}, {"thinking": True, "enable_thinking": 1}])
def test_what_is_no_switch_of_thinking_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected true or false"):
        thinking_requested(kwargs)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_request_is_rendered_officially(thinking: bool) -> None:
    params = ChatParams(chat_template_kwargs={"thinking": thinking, "tools": [TOOL]})
    conversation, prompt = renderer().render_messages(USER, params)
    mode = "thinking" if thinking else "chat"
    assert trained.decode(prompt["prompt_token_ids"]) == encode_messages(USER, tools=[TOOL], thinking_mode=mode)
    assert conversation == USER


def test_speciale_takes_no_tools() -> None:
    speciale = renderer("deepseek-ai/DeepSeek-V3.2-Speciale")
    params = ChatParams(chat_template_kwargs={"tools": [TOOL]})
    with pytest.raises(EncodingError, match="Speciale"):
        speciale.render_messages(USER, params)
    speciale.render_messages(USER, ChatParams())


def test_the_variant_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV32_VARIANT", "speciale")
    with pytest.raises(EncodingError, match="Speciale"):
        renderer().render_messages(USER, ChatParams(chat_template_kwargs={"tools": [TOOL]}))


def test_the_developer_role_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "developer", "content": "Search."}]
    renderer().render_messages(messages, ChatParams())
    monkeypatch.setenv("DSV32_ALLOW_DEVELOPER", "0")
    with pytest.raises(EncodingError, match=r"messages\[0\].*developer"):
        renderer().render_messages(messages, ChatParams())


def test_documents_have_no_place() -> None:
    with pytest.raises(ValueError, match="documents: expected none"):
        renderer().render_messages(USER, ChatParams(chat_template_kwargs={"documents": [{"text": "x"}]}))


@pytest.mark.parametrize("where", ["checkpoint", "request"])
def test_a_chat_template_is_obeyed(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    tokenizer = Tokenizer()
    tokenizer.chat_template = "{{ messages }}" if where == "checkpoint" else None
    params = ChatParams(chat_template="{{ messages }}" if where == "request" else None)
    monkeypatch.setattr(HfRenderer, "render_messages", lambda self, messages, params: "by the template")
    assert renderer(tokenizer=tokenizer).render_messages(USER, params) == "by the template"


class Parser(DelegatingParser):
    """What vLLM composes of `--reasoning-parser dsv32 --tool-call-parser dsv32`."""

    reasoning_parser_cls = DsaReasoningParser
    tool_parser_cls = DsaToolParser


def make(thinking: bool, **options: Any) -> tuple[Parser, ChatCompletionRequest]:
    request = ChatCompletionRequest(model="m", messages=USER, tools=[TOOL], **options)
    return Parser(Tokenizer(), request.tools, chat_template_kwargs={"thinking": thinking}), request


def whole(text: str, thinking: bool, **options: Any) -> tuple[str, str, list[tuple[str, str]]]:
    parser, request = make(thinking, **options)
    reasoning, content, calls = parser.parse(text, request, enable_auto_tools=True)
    return reasoning or "", content or "", [(call.name, call.arguments) for call in calls or []]


def streamed(pieces: list[str], thinking: bool, **options: Any) -> tuple[str, str, list[tuple[str, str]]]:
    parser, request = make(thinking, **options)
    prompt_ids = [1, START_ID if thinking else END_ID]
    reasoning, content, calls = "", "", {}
    for delta in deltas(parser, request, pieces, prompt_ids):
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls:
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
    return reasoning, content, [calls[index] for index in sorted(calls)]


def deltas(
    parser: Parser, request: ChatCompletionRequest, pieces: list[str], prompt_ids: list[int]
) -> Iterator[DeltaMessage]:
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        delta = parser.parse_delta(piece, [ord(c) for c in piece], request, prompt_ids, finished=last)
        if delta is not None:
            yield delta


ANSWERS = [
    pytest.param("Two < three.", False, ("", "Two < three.", []), id="content"),
    pytest.param("Hm <b>.</think>Yes.", True, ("Hm <b>.", "Yes.", []), id="reasoning"),
    pytest.param("Hm.</think>", True, ("Hm.", "", []), id="reasoning-only"),
    pytest.param("Hm", True, ("Hm", "", []), id="unclosed-reasoning"),
    pytest.param("Hm </thi", True, ("Hm </thi", "", []), id="cut-tag"),
    pytest.param("I ask." + CALL, False, ("", "I ask.", [("weather", '{"city": "Paris"}')]), id="call"),
    pytest.param(
        "Hm.</think>I ask." + CALL, True, ("Hm.", "I ask.", [("weather", '{"city": "Paris"}')]), id="reasoning-and-call"
    ),
    pytest.param(
        "Hm." + CALL, True, ("Hm.", "", [("weather", '{"city": "Paris"}')]), id="call-after-unclosed-reasoning"
    ),
    pytest.param("A <think> tag.", False, ("", "A <think> tag.", []), id="tag-in-content"),
]


@pytest.mark.parametrize(("text", "thinking", "expected"), ANSWERS)
def test_every_split_of_an_answer_equals_the_whole(
    text: str, thinking: bool, expected: tuple[str, str, list[tuple[str, str]]]
) -> None:
    assert whole(text, thinking) == expected
    assert streamed([text], thinking) == expected
    assert streamed(list(text), thinking) == expected
    for cut in range(1, len(text)):
        assert streamed([text[:cut], text[cut:]], thinking) == expected, f"cut at {cut}"


@pytest.mark.parametrize("thinking", [True, False])
def test_without_a_choice_of_tools_the_markup_is_content(thinking: bool) -> None:
    text = "Hm.</think>See:" + CALL if thinking else "See:" + CALL
    expected = ("Hm." if thinking else "", "See:" + CALL, [])
    assert whole(text, thinking, tool_choice="none") == expected
    assert streamed(list(text), thinking, tool_choice="none") == expected


def test_the_end_of_the_reasoning_is_found_in_tokens() -> None:
    thinking = DsaReasoningParser(Tokenizer(), chat_template_kwargs={"thinking": True})
    assert not thinking.is_reasoning_end([1, END_ID, 2, START_ID])
    assert thinking.is_reasoning_end([START_ID, 1, END_ID, 2])
    assert thinking.is_reasoning_end_streaming([1, END_ID], [END_ID])
    assert thinking.extract_content_ids([1, END_ID, 2, 3]) == [2, 3]
    assert thinking.count_reasoning_tokens([1, 2, END_ID, 3]) == 2
    assert thinking.count_reasoning_tokens([1, 2]) == 2
    chat = DsaReasoningParser(Tokenizer())
    assert chat.is_reasoning_end([1, 2])
    assert chat.count_reasoning_tokens([1, 2]) == 0


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    with pytest.raises(ValueError, match="--reasoning-parser dsv32: the tokenizer has no token '<think>'"):
        DsaReasoningParser(SimpleNamespace(get_vocab=dict))
