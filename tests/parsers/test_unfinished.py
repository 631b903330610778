"""A call that the output stops in: what its arguments say, and how a history that holds it is rendered."""

import time

import pytest
from parser_cases import HALF, START, TOOLS, D, open_invoke

from dsv32_plugin.parsers import EncodingError, OutputParser, assemble, encode_messages, ended_parameters


@pytest.mark.parametrize(
    ("arguments", "ended", "open_parameter"),
    [
        ("", {}, None),
        (" ", {}, None),
        ("{", {}, None),
        ("{}", {}, None),
        ('{"a": 1}', {"a": 1}, None),
        ('{"a": "x"', {"a": "x"}, None),
        ('{"a": "x", ', {"a": "x"}, None),
        ('{"a": "x", "b', {"a": "x"}, None),
        ('{"a": "x", "b"', {"a": "x"}, ("b", "")),
        ('{"a": "x", "b": ', {"a": "x"}, ("b", "")),
        ('{"a": "x", "b": "rm -rf /home/u', {"a": "x"}, ("b", "rm -rf /home/u")),
        ('{"a": "x\\"\\n', {}, ("a", 'x"\n')),
        ('{"a": "x\\', {}, ("a", "x")),
        ('{"a": "x\\\\', {}, ("a", "x\\")),
        ('{"a": "x\\u00', {}, ("a", "x")),
        ('{"a": "x\\\\u00', {}, ("a", "x\\u00")),
        ('{"a": "x\\ud83d', {}, ("a", "x")),
        ('{"a": "x\\ud83d\\ude0', {}, ("a", "x")),
        ('{"a": "x\\ud83d\\ude00', {}, ("a", "x😀")),
        ('{"a": 12', {}, ("a", "12")),
        ('{"a": 12 ', {"a": 12}, None),
        ('{"a": 1E', {}, ("a", "1E")),
        ('{"a": 12abc', {}, ("a", "12abc")),
        ('{"a": NaN', {}, ("a", "NaN")),
        ('{"a": tru', {}, ("a", "tru")),
        ('{"a": true', {"a": True}, None),
        ('{"a": [1]', {"a": [1]}, None),
        ('{"a": [1, {"b": "c', {}, ("a", '[1, {"b": "c')),
        ('{"a": [1], "a": "[1 oops', {}, ("a", "[1 oops")),
        ('{"a": {"b": ' + "[" * 250, {}, ("a", '{"b": ' + "[" * 250)),
    ],
)
def test_parameters_that_ended(arguments: str, ended: dict, open_parameter: object):
    assert ended_parameters(arguments) == (ended, open_parameter)


@pytest.mark.parametrize("arguments", ["[", "x", '"a', "{a", '{"a" 1', '{"a": 1 "b"', '{"a": oops, "b": 1}', "{1: 2"])
def test_what_is_no_beginning_of_an_object_is_refused(arguments: str):
    with pytest.raises(ValueError, match="expected"):
        ended_parameters(arguments)


def test_a_history_with_an_unfinished_call_renders():
    """Such a history was refused: an agent that echoed a cut call was stuck."""
    asked = {"role": "user", "content": "u"}
    call = f'{START}\n{open_invoke("get_weather")}<{D}parameter name="location" string="true">Hang</{D}parameter>'
    for arguments, rest in (
        ('{"location": "Hang', f"\n</{D}invoke>"),
        ('{"location": "Hang"', f"\n</{D}invoke>"),
        ('{"location": "Hang", "n": [1, ', f'\n<{D}parameter name="n" string="true">[1, </{D}parameter>\n</{D}invoke>'),
    ):
        said = {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": arguments}}]}
        assert call + rest in encode_messages([asked, said, asked], thinking_mode="chat")


def results_of(*ids: str) -> list[dict]:
    return [{"role": "tool", "tool_call_id": call_id, "content": f"of {call_id}"} for call_id in ids]


def said(**arguments: str) -> dict:
    calls = [{"id": name, "function": {"name": "now", "arguments": text}} for name, text in arguments.items()]
    return {"role": "assistant", "tool_calls": calls}


@pytest.mark.parametrize("then", [[], [{"role": "user", "content": "u"}]], ids=["answer", "user"])
def test_a_call_that_was_cut_needs_no_result(then: list):
    """An agent ran the whole call of two, echoed both, and was refused from then on: `results are missing`."""
    asked = {"role": "user", "content": "u"}
    prompt = encode_messages([asked, said(a="{}", b='{"x": "y'), *results_of("a"), *then], thinking_mode="chat")
    assert "\n\n<function_results>\n<result>of a</result>\n</function_results>\n\n</think>" in prompt
    only = encode_messages([asked, said(a='{"x": "y'), *then], thinking_mode="chat", always_answer=True)
    assert only.endswith("<｜Assistant｜></think>")
    for calls, results in (
        (said(a="{}", b='{"x": "y'), results_of("b")),
        (said(a="{}", b="{}", c="{"), results_of("b")),
        (said(a="{}", b='{"x": "y"}'), results_of("a")),
    ):
        with pytest.raises(EncodingError, match="results"):
            encode_messages([asked, calls, *results, *then], thinking_mode="chat")
    both = encode_messages([asked, said(a="{}", b="{"), *results_of("b", "a"), *then], thinking_mode="chat")
    assert "<result>of a</result>\n<result>of b</result>\n</function_results>" in both


@pytest.mark.parametrize(
    "arguments", [r'{"\ud83d": "\ude00", "b": "x', r'{"a": {"b": "\ud83d"}, "b": "\ud83d', r'{"a": "\ud83d']
)
def test_a_history_cut_within_a_surrogate_pair_renders(arguments: str):
    """Halves of pairs came into the prompt, which no tokenizer encodes."""
    said = {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": arguments}}]}
    encode_messages([{"role": "user", "content": "u"}, said], thinking_mode="chat").encode()


@pytest.mark.parametrize(("end", "is_open"), [("", True), ("</", True), (f"</{D}parameter>", False)])
def test_the_parser_knows_whether_a_number_is_over(end: str, is_open: bool):
    parser = OutputParser(TOOLS)
    events = parser.feed(f'{START}\n{open_invoke("get_weather")}<{D}parameter name="v" string="false">12{end}')
    (call,) = assemble(events + parser.finish()).tool_calls
    assert call.arguments == '{"v": 12', "the beginning of what would have come"
    assert parser.value_is_open is is_open
    ended, _ = ended_parameters(call.arguments, value_is_open=parser.value_is_open)
    assert ended == ({} if is_open else {"v": 12})


def test_cut_anywhere_the_arguments_begin_the_whole_ones():
    text = f'{HALF}</{D}parameter>\n<{D}parameter name="v" string="false">{{"a": [-1.5e3, true]}}</{D}parameter>'
    text += f'\n<{D}parameter name="days" string="false">12</{D}parameter>\n</{D}invoke>'
    (whole,) = OutputParser.parse(text, TOOLS).tool_calls
    for end in range(text.index("<", len(HALF) - 10), len(text)):
        (call,) = OutputParser.parse(text[:end], TOOLS).tool_calls
        assert not call.complete
        assert whole.arguments.startswith(call.arguments), text[:end]


def test_whatever_the_parser_says_can_be_echoed():
    asked = {"role": "user", "content": "u"}
    text = f'{HALF}</{D}parameter>\n<{D}parameter name="v" string="false">{{"a": ["b\\u00e9", -1.5e3, true]}}</{D}p'
    for end in range(len(text)):
        said = OutputParser.parse(text[:end], TOOLS).to_openai()
        encode_messages([asked, said, asked])


def test_long_arguments_take_linear_time():
    def seconds(size: int) -> float:
        start = time.process_time()
        for arguments in ('{"a": "' + "\\n" * size, '{"a": ' + "[1, " * 200 + "2, " * size):
            ended_parameters(arguments)
        return time.process_time() - start

    assert min(seconds(1 << 16) for _ in range(3)) < 6 * min(seconds(1 << 14) for _ in range(3)) + 0.01
