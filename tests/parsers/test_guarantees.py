"""What the parser promises about every text, tried on generated ones."""

import json
import re
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parser_cases import BOS, END, EOS, HALF, START, TOOLS, D, block, invoke, open_invoke, text, untyped

from dsv32_plugin.parsers import (
    Event,
    Message,
    OutputParser,
    ToolCallArguments,
    ToolCallEnd,
    assemble,
    encode_messages,
    merge,
    parse_message_from_completion_text,
)

PIECES = [
    "<",
    "</",
    "｜",
    D,
    "|DSML|",
    "<｜｜DSML｜｜",
    "function_calls",
    "tool_calls",
    "invoke",
    "parameter",
    ">",
    "/>",
]
PIECES += [
    ' name="now"',
    ' name="a<b>"',
    ' string="true"',
    ' string="false"',
    ' string="',
    "\n",
    "\n\n",
    " ",
    "\\",
    "\\u1",
]
PIECES += [
    "<think>",
    "</think>",
    BOS,
    EOS,
    "```\n",
    "`",
    "x",
    '{"a": 1',
    '{"query": ',
    "[1, ",
    "1.",
    '"',
    "}",
    "]",
    "tru",
    ",",
]
PIECES += [
    START,
    END,
    f"</{D}invoke>",
    f"</{D}parameter>",
    open_invoke("now"),
    open_invoke("edit"),
    open_invoke("nope"),
]
PIECES += [
    f'<{D}parameter name="{n}"{a}>' for n in ("label", "arguments") for a in (' string="true"', ' string="false"', "")
]
PIECES += [block(invoke("now")), HALF]

MODES = [
    {},
    {"thinking": True},
    {"policy": "strict"},
    {"tools": None, "thinking": True, "policy": "strict"},
    {"tools": None},
    {"thinking": True, "tool_calls": False},
    {"think_tags": False},
]
modes = st.sampled_from(MODES)
fragments = st.lists(st.sampled_from(PIECES), max_size=30)
outputs = fragments.map("".join)


def run(output: str, cuts: list[int], **options) -> tuple[list[Event], Message]:
    parser = OutputParser(**{"tools": TOOLS, **options})
    events: list[Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(output)], strict=True):
        events += parser.feed(output[start:end])
    events += parser.finish()
    return merge(events), assemble(events, parser.notes)


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@given(outputs, modes, st.lists(st.floats(0, 1), max_size=12))
def test_events_do_not_depend_on_the_cuts(output: str, options: dict, places: list[float]):
    events, message = run(output, [], **options)
    cuts = sorted(int(place * len(output)) for place in places)
    for some in (cuts, list(range(len(output)))):
        again, message_again = run(output, some, **options)
        assert again == events
        assert message_again.notes == message.notes


@given(outputs, modes, st.floats(0, 1), st.booleans())
def test_arguments_are_an_object_or_visibly_unfinished(output: str, options: dict, place: float, ended: bool):
    message = OutputParser.parse(output[: int(place * len(output))], **{"tools": TOOLS, "ended": ended, **options})
    for call in message.tool_calls:
        assert is_json_object(call.arguments) is call.complete
        assert call.name
        assert not re.search(r"[<>]|[|｜]DSML", call.name)


@given(fragments, modes)
def test_nothing_is_dropped(parts: list[str], options: dict):
    """A character between any two pieces comes out somewhere; only one inside a cut tag at the end is in its note."""
    marks = [chr(0x4E00 + i) for i in range(len(parts))]
    _, message = run("".join(part + mark for part, mark in zip(parts, marks, strict=True)), [], **options)
    said = message.reasoning + message.content + "".join(call.name + call.arguments for call in message.tool_calls)
    said += "".join(note.detail for note in message.notes if note.code == "truncated_markup")
    assert [mark for mark in marks if mark not in said] == []


@given(outputs)
def test_without_tool_calls_the_text_is_only_split(output: str):
    _, message = run(output, [], tool_calls=False, think_tags=False)
    assert message.content == output.replace(BOS, "").replace(EOS, "")


def test_fragments_come_as_they_arrive():
    """At most a marker's length is held back: here the longest end of an output, wrapper and all."""
    for name, value, attribute in (
        ("code", "some < code\n" * 200, ' string="true"'),
        ("env", json.dumps([{"key": "some < value\n", "n": 1} for _ in range(200)]), ' string="false"'),
    ):
        parser = OutputParser(TOOLS)
        parser.feed(f"\n\n{START}\n{open_invoke('run')}")
        parser.feed(f'<{D}parameter name="{name}"{attribute}>')
        sent = 0
        for i in range(0, len(value), 4):
            sent += sum(len(e.fragment) for e in parser.feed(value[i : i + 4]) if isinstance(e, ToolCallArguments))
            assert sent > i - 40


def test_only_a_complete_call_ends():
    """A call cut inside a value was handed out as a finished one, and clients ran it."""
    events, _ = run(HALF, [])
    assert not any(isinstance(event, ToolCallEnd) for event in events)
    closed = f"{HALF}</{D}parameter>"
    for ended in (False, True):
        message = OutputParser.parse(closed, TOOLS, ended=ended)
        assert [(call.arguments, call.complete) for call in message.tool_calls] == [
            ('{"location": "Hangzhou"' + "}" * ended, ended)
        ]


def test_feed_after_finish_is_refused_and_finish_may_repeat():
    parser = OutputParser()
    assert parser.feed("") == []
    parser.finish()
    assert parser.finish() == []
    with pytest.raises(RuntimeError, match="after finish"):
        parser.feed("x")


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="policy must be"):
        OutputParser(policy="lenient")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs think_tags"):
        OutputParser(thinking=True, think_tags=False)


def test_phase_is_reported():
    parser = OutputParser(TOOLS, thinking=True)
    seen = [(parser.phase, parser.reasoning_ended)]
    for delta in ("r", "</think>", "c", f"\n\n{START}\n", open_invoke("now"), f"</{D}invoke>", f"\n{END}"):
        parser.feed(delta)
        seen.append((parser.phase, parser.reasoning_ended))
    assert [phase for phase, _ in seen] == ["reasoning"] * 2 + ["content"] * 4 + ["tool_call"] + ["content"]
    assert [ended for _, ended in seen] == [False, False] + [True] * 6


# -- encode, then parse

# Text as people write it: not the markup itself, which content can't hold.
plain = st.text(st.characters(exclude_characters="｜", exclude_categories=["Cs"]), max_size=40).filter(
    lambda s: not any(mark in s for mark in ("<think>", "</think>", "DSML|"))
)
keys = st.text(st.characters(exclude_characters="｜|", exclude_categories=["Cs"]), max_size=12).filter(
    lambda s: '">' not in s and not re.search(r'"\s*[/>\w]*\s*=', s) and not s.endswith('"')
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
argument_values = st.one_of(json_values, st.text(max_size=60), outputs).filter(
    lambda v: not isinstance(v, str) or f"/{D}parameter" not in v
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
calls = st.lists(st.tuples(names, st.dictionaries(keys, argument_values, max_size=4)), max_size=3)


@given(plain, plain, calls, st.integers(1, 9))
@settings(max_examples=150)
def test_parsing_inverts_encoding(reasoning: str, content: str, calls: list, step: int):
    tool_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    reasoning = reasoning or "r"
    asked = {"role": "user", "content": "u"}
    said = {"role": "assistant", "reasoning": reasoning, "content": content, "tool_calls": tool_calls}
    output = encode_messages([said], context=[asked])
    _, message = run(output, list(range(step, len(output), step)), thinking=True, tools=None)
    assert message.notes == ()
    assert (message.reasoning, message.content) == (reasoning, content)
    assert [(c.name, json.loads(c.arguments)) for c in message.tool_calls] == [
        (name, json.loads(json.dumps(arguments))) for name, arguments in calls
    ]
    assert message.to_openai() == parse_message_from_completion_text(output, "thinking")
    again = encode_messages([message.to_openai()], context=[asked])
    assert again == output


@given(json_values.filter(lambda v: not isinstance(v, str)), st.integers(1, 7), st.sampled_from([None, 1, "\t"]))
def test_json_comes_through_verbatim(value: object, step: int, indent: object):
    written = json.dumps(value, indent=indent, ensure_ascii=indent is None)  # type: ignore[arg-type]
    output = block(invoke("f", f'<{D}parameter name="v" string="false">{written}</{D}parameter>'))
    _, message = run(output, list(range(step, len(output), step)), tools=None)
    assert message.tool_calls[0].arguments == f'{{"v": {written}}}'


@given(outputs, st.integers(1, 7))
def test_json_or_text_every_body_is_kept(body: str, step: int):
    """Whatever stands where JSON belongs, the last value under the name is that JSON, or all of the text."""
    if f"</{D}parameter" in body or "|DSML|" in body or not body.strip():
        return
    output = block(invoke("f", untyped("v", body, ' string="false"')))
    _, message = run(output, list(range(step, len(output), step)), tools=None)
    value = json.loads(message.tool_calls[0].arguments)["v"]
    notes = {note.code for note in message.notes}
    assert value == body if "not_json" in notes else notes or value == json.loads(body)


# -- time and memory


def seconds(output: str, step: int = 4, **options) -> float:
    parser = OutputParser(**options)
    start = time.process_time()
    for i in range(0, len(output), step):
        parser.feed(output[i : i + step])
    parser.finish()
    return time.process_time() - start


CODE = 'def f(x):\n    return x < 3 and "<div>" in y  # </p>\n'


def long_argument(size: int, kind: str) -> str:
    if kind == "text":
        return block(invoke("run", text("code", CODE * (size // len(CODE)))))
    body = json.dumps([CODE, {"n": 1.5}] * (size // (len(CODE) + 20)))
    return block(invoke("run", f'<{D}parameter name="args" string="false">{body}</{D}parameter>'))


@pytest.mark.parametrize(("kind", "size", "limit"), [("text", 1 << 20, 2.0), ("json", 1 << 18, 0.5)])
def test_a_long_argument_four_characters_at_a_time(kind: str, size: int, limit: float):
    """1 MiB in under 2 s, and four times as much in at most 4.4 times that (the best of a few, for a busy machine)."""
    small, large = long_argument(size, kind), long_argument(4 * size, kind)
    best_small, best_large = seconds(small), seconds(large)
    for _ in range(4):
        if best_small < limit and best_large <= 4.4 * best_small:
            break
        best_small, best_large = min(best_small, seconds(small)), min(best_large, seconds(large))
    assert best_small < limit
    assert best_large <= 4.4 * best_small


def test_memory_is_linear():
    peaks = []
    for size in (1 << 17, 1 << 19):
        output = long_argument(size, "text")
        tracemalloc.start()
        parser = OutputParser()
        for i in range(0, len(output), 64):
            parser.feed(output[i : i + 64])
        parser.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # string arguments are not kept at all


INSIDE = {
    "content": ("", {}),
    "reasoning": ("", {"thinking": True}),
    "quotation": (f"\n\n{START}\n{open_invoke('now')}", {"thinking": True}),
    "call": (f"\n\n{START}\n{open_invoke('now')}", {}),
    "text": (HALF, {}),
    "strict": (HALF, {"policy": "strict"}),
    "json": (HALF.replace("true", "false").replace("Hangzhou", ""), {}),
    "untyped": (HALF.replace(' string="true"', "").replace("Hangzhou", ""), {}),
}
FLOODS = ["<", "</", f"</{D}", f"</{D}invoke>\n", f"</{D}parameter", f'<{D}parameter name="', f"{START}\n", "\n", " "]
FLOODS += ["`", "```\n", "<think>", EOS, "[", '"', "\\", "1", "[1,", '{"a":', "a"]
FLOODS += [
    "< / ｜ ｜ DSML ",
    "<parameter ",
    "</parameter",
    open_invoke("now"),
    open_invoke("now") + "x ",
    open_invoke("now") + "{",
]
FLOODS += [block(open_invoke("now") + "x"), f'<{D}parameter name="c"g={D}>']


@pytest.mark.parametrize("place", INSIDE)
def test_floods_of_look_alikes_take_linear_time(place: str):
    """Four times the text takes about four times as long, whatever it repeats."""
    prefix, options = INSIDE[place]
    for flood in FLOODS:
        small, large = (prefix + flood * (size // len(flood)) for size in (1 << 12, 1 << 14))
        for _ in range(6):
            fast, slow = seconds(small, **options), seconds(large, **options)
            if slow < 6 * fast + 0.002:
                break
        else:
            pytest.fail(f"{flood!r}: {fast:.4f} s, then {slow:.4f} s for four times as much")


# -- notes


def test_what_is_noted_at_the_end_stands_there_also_after_calls_in_the_reasoning():
    """Its offset was that of some character inside the calls."""
    cut = block(open_invoke("get_weather") + f'\n<{D}parameter name="location" string="true">x\n</{D}invoke>')
    output = f"Hm, so.{cut}"
    codes = {note.code: note.offset for note in OutputParser.parse(output, TOOLS, thinking=True, ended=True).notes}
    assert codes["unclosed_reasoning"] == len("Hm, so.")
    assert codes["unclosed_parameter"] == len(output)


# -- import


def test_importing_is_light():
    code = (
        "import sys; import dsv32_plugin.parsers;"
        "print([m for m in ('torch', 'vllm', 'sglang', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
