"""DeepSeek's strict function: the same results on well-formed text, the same refusals on all else."""

import json

import pytest
from parser_cases import CALL_HZ, CASES, EOS, Case, D, block, data, invoke, text

from dsv32_plugin.parsers import DecodingError, parse_message_from_completion_text

CALL = block(CALL_HZ)
OTHER_LAYOUT = ("spelling/", "quoted/", "structure/", "think/", "wrapped/")
"""Recovered by `OutputParser` without a note, but not rendered by DeepSeek's code."""
REFUSED = ("prose/mark-alone", "string/parameters-is-not-parameter")
"""Valid for `OutputParser`; DeepSeek's function refuses the mark in content and `/｜DSML｜parameter` in a value."""
OFFICIAL = [c for c in CASES if c.official and not c.id.startswith(OTHER_LAYOUT) and c.id not in REFUSED]


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: case.id)
def test_well_formed_cases(case: Case):
    completion = case.text if case.text.endswith(EOS) else case.text + EOS
    message = parse_message_from_completion_text(completion, "chat")
    assert (message["content"], message["reasoning_content"]) == (case.content, "")
    for call, (name, arguments) in zip(message["tool_calls"], case.calls, strict=True):
        assert call["type"] == "function"
        assert call["function"]["name"] == name
        got = call["function"]["arguments"]
        assert (got if isinstance(arguments, str) else json.loads(got)) == arguments


def test_thinking():
    message = parse_message_from_completion_text(f"r\n</think>a{CALL}{EOS}", "thinking")
    assert message == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "r\n",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": '{"location": "Hangzhou"}'}}
        ],
    }


def test_eos_may_be_missing_after_calls():
    assert parse_message_from_completion_text(CALL, "chat")["tool_calls"]
    assert parse_message_from_completion_text(f"\n\n<{D}function_calls>\n</{D}function_calls>", "chat")


@pytest.mark.parametrize(
    ("completion", "mode"),
    [
        pytest.param("no end", "chat", id="no-eos"),
        pytest.param(f"r{EOS}", "thinking", id="no-think-end"),
        pytest.param(f"r{CALL}</think>a{EOS}", "thinking", id="call-in-reasoning"),
        pytest.param(f"r<think></think>a{EOS}", "thinking", id="think-in-reasoning"),
        pytest.param(f"a</think>b{EOS}", "chat", id="think-end-in-content"),
        pytest.param(f"a{EOS}b", "chat", id="text-after-eos"),
        pytest.param(f"a{EOS}{EOS}", "chat", id="two-eos"),
        pytest.param(f"{CALL}b{EOS}", "chat", id="text-after-calls"),
        pytest.param(f"{CALL}\n{EOS}", "chat", id="line-break-after-calls"),
        pytest.param(f"a {D} b{EOS}", "chat", id="mark-in-content"),
        pytest.param(CALL.strip() + EOS, "chat", id="no-blank-line"),
        pytest.param(CALL.replace("\n</", "</") + EOS, "chat", id="layout"),
        pytest.param(CALL.replace('">\n', '">') + EOS, "chat", id="layout-after-name"),
        pytest.param(CALL.replace(' string="true"', "") + EOS, "chat", id="no-attribute"),
        pytest.param(CALL.replace("true", "yes") + EOS, "chat", id="bad-attribute"),
        pytest.param(CALL.replace(f"</{D}parameter>", "") + EOS, "chat", id="unclosed-parameter"),
        pytest.param(CALL.replace(f"</{D}invoke>\n", "") + EOS, "chat", id="unclosed-invoke"),
        pytest.param(CALL.replace(f"\n</{D}function_calls>", ""), "chat", id="unclosed-block"),
        pytest.param(block(invoke("f", text("a", f"</{D}parameters>"))) + EOS, "chat", id="end-tag-prefix-in-value"),
        pytest.param(CALL[:-3], "chat", id="cut"),
        pytest.param(block(invoke("f", text("a", "1"), data("a", "1"))) + EOS, "chat", id="duplicate"),
        pytest.param(block(invoke("f", text("a", f"x/{D}parameter"))) + EOS, "chat", id="end-tag-in-value"),
    ],
)
def test_refusals(completion: str, mode: str):
    with pytest.raises(DecodingError):
        parse_message_from_completion_text(completion, mode)  # type: ignore[arg-type]


def test_unknown_mode():
    with pytest.raises(ValueError, match="thinking_mode must be"):
        parse_message_from_completion_text("", "on")  # type: ignore[arg-type]
