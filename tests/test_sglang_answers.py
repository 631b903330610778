"""What SGLang's endpoints make of an answer: every call found, and a cut one never handed out as finished."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import pytest

pytest.importorskip("sglang")

from scripted_sglang import (
    ANTHROPIC,
    APIS,
    CHAT,
    ENDED,
    LIMIT,
    RESPONSES,
    Api,
    Endpoints,
    Said,
    chat_streamed,
    chat_whole,
    put_hooks,
    stopped,
)
from test_guarantees import PIECES, START, TOOLS, open_invoke

from dsv32_plugin.parsers import OutputParser, encode_messages
from dsv32_plugin.parsers.protocol import BOS, EOS, THINK_END, USER
from dsv32_plugin.sglang_adapter import upstream
from dsv32_plugin.sglang_adapter.names import PARSER_NAME
from dsv32_plugin.sglang_adapter.parsers import DsaToolDetector, LastText

pytestmark = pytest.mark.engine

FUNCTION = {
    "name": "run",
    "description": "Run it.",
    "parameters": {
        "type": "object",
        "properties": {"dir": {"type": "string"}, "command": {"type": "string"}, "times": {"type": "integer"}},
        "required": ["dir"],
    },
}
NAMED = {"type": "function", "function": {"name": "run"}}
BLOCK = "\n\n<｜DSML｜function_calls>\n"
HEAD = '<｜DSML｜invoke name="run">\n'
DIR = '<｜DSML｜parameter name="dir" string="true">/home</｜DSML｜parameter>\n'
CALL_END = "</｜DSML｜invoke>\n"
BLOCK_END = "</｜DSML｜function_calls>"
WHOLE = BLOCK + HEAD + DIR + CALL_END + BLOCK_END
CUT_TEXTS = {
    "in-a-value": (
        HEAD + DIR + '<｜DSML｜parameter name="command" string="true">rm -rf /home/u',
        '{"dir": "/home", "command": "rm -rf /home/u',
    ),
    "in-a-number": (HEAD + DIR + '<｜DSML｜parameter name="times" string="false">12', '{"dir": "/home", "times": 12'),
    "in-the-tag-of-a-parameter": (HEAD + DIR + '<｜DSML｜parameter name="comm', '{"dir": "/home"'),
    "after-a-parameter": (HEAD + DIR, '{"dir": "/home"'),
    "before-the-first-parameter": (HEAD, "{"),
}
"""What the model wrote of a call before it was cut, and the arguments that are left."""
cut_texts = pytest.mark.parametrize(("text", "arguments"), CUT_TEXTS.values(), ids=CUT_TEXTS)
every_api = pytest.mark.parametrize("api", APIS.values(), ids=APIS)
whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
flagged_and_not = pytest.mark.parametrize("special", [True, False], ids=["mark-special", "mark-plain"])
cuts_of_calls = pytest.mark.parametrize(
    ("finish", "label"),
    [(LIMIT, "length"), (stopped("zhou"), "stop"), (stopped(55), "stop"), ({"type": "abort", "message": "m"}, None)],
    ids=["limit", "stop-string", "stop-token", "abort"],
)


@pytest.fixture
def endpoints(monkeypatch: pytest.MonkeyPatch) -> Endpoints:
    put_hooks(monkeypatch)
    return Endpoints(monkeypatch)


def ask(api: Api, endpoints: Endpoints, text: str, finish: dict[str, Any] = ENDED, **options: Any) -> Said:
    engine = {name: options.pop(name) for name in ("mark_is_special", "cuts", "incremental") if name in options}
    body = api.body([FUNCTION], options.pop("choice", "auto")) | options
    return api.said(endpoints, body, (text, finish), **engine)


@every_api
@whole_and_streamed
@flagged_and_not
@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
def test_a_call_is_found(endpoints: Endpoints, api: Api, stream: bool, special: bool, choice: Any) -> None:
    if api is RESPONSES and choice is NAMED and not upstream.knows_cut_answers():
        pytest.skip("SGLang 0.5.15 has no named tool_choice here")
    said = ask(api, endpoints, "So:" + WHOLE, stream=stream, choice=choice, mark_is_special=special)
    assert (said.content, said.calls) == ("So:", [("run", '{"dir": "/home"}')])
    assert said.finish == api.finishes["tool_calls"]
    assert said.statuses in ([], ["completed"])


@every_api
@whole_and_streamed
@cut_texts
@cuts_of_calls
def test_a_cut_call_looks_cut(
    endpoints: Endpoints, api: Api, stream: bool, text: str, arguments: str, finish: dict[str, Any], label: str | None
) -> None:
    said = ask(api, endpoints, "So:" + WHOLE + BLOCK + text, finish, stream=stream)
    first, second = said.calls
    assert (said.content, first) == ("So:", ("run", '{"dir": "/home"}'))
    if api is ANTHROPIC and not stream:
        assert json.loads(second[1]) == ({"dir": "/home"} if DIR in text else {})
    else:
        assert second == ("run", arguments)
    assert said.statuses in ([], ["completed", "incomplete"])
    if label is not None:
        assert said.finish == ("incomplete" if api is RESPONSES else api.finishes[label])


@every_api
@whole_and_streamed
def test_a_call_is_whole_if_the_model_ended_its_turn_after_the_last_parameter(
    endpoints: Endpoints, api: Api, stream: bool
) -> None:
    said = ask(api, endpoints, BLOCK + HEAD + DIR, stream=stream)
    assert said.calls == [("run", '{"dir": "/home"}')]
    assert said.finish == api.finishes["tool_calls"]


@every_api
@whole_and_streamed
def test_of_a_call_cut_in_its_header_nothing_is_said(endpoints: Endpoints, api: Api, stream: bool) -> None:
    ends = range(len(BLOCK) + 2, len(BLOCK + HEAD) - 2)
    for end in ends if api is CHAT else ends[::9]:
        said = ask(api, endpoints, "So:" + (BLOCK + HEAD)[:end], LIMIT, stream=stream, cuts=[[]])
        assert (said.content, said.calls, said.finish) == ("So:", [], api.finishes["length"]), f"cut at {end}"


@pytest.mark.parametrize("text", [text for text, _ in CUT_TEXTS.values()], ids=CUT_TEXTS)
@pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])
def test_a_cut_call_does_not_depend_on_the_steps(endpoints: Endpoints, text: str, incremental: bool) -> None:
    text = "So:" + BLOCK + text
    cuts = [[], *([cut] for cut in range(1, len(text)))]
    body = CHAT.body([FUNCTION], "auto") | {"stream": True, "n": len(cuts)}
    answer = endpoints.ask(CHAT.path, body, *[(text, LIMIT)] * len(cuts), cuts=cuts, incremental=incremental)
    said = [chat_streamed(answer, index) for index in range(len(cuts))]
    assert [cut for cut in range(len(cuts)) if said[cut] != said[0]] == []
    assert said[0] == ask(CHAT, endpoints, text, LIMIT)
    for api in (RESPONSES, ANTHROPIC):
        expected = ask(api, endpoints, text, LIMIT, stream=True)
        for cut in range(5, len(text), 31):
            said_so = ask(api, endpoints, text, LIMIT, stream=True, cuts=[[cut]], incremental=incremental)
            assert said_so == expected, f"{api.path}, cut at {cut}"


@whole_and_streamed
@pytest.mark.parametrize(
    ("finish", "status"), [(LIMIT, "max_output_tokens"), (stopped("zhou"), None)], ids=["limit", "stop-string"]
)
def test_a_cut_response_is_stored_as_such(
    endpoints: Endpoints, stream: bool, finish: dict[str, Any], status: str | None
) -> None:
    body = RESPONSES.body([FUNCTION], "auto") | {"stream": stream}
    answer = endpoints.ask(RESPONSES.path, body, (BLOCK + HEAD + DIR, finish))
    response = answer[-1]["response"] if stream else answer
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == (status and {"reason": status})
    stored = endpoints.responses.response_store[response["id"]].model_dump()
    assert (stored["status"], stored["output"][0]["status"]) == ("incomplete", "incomplete")


@pytest.mark.parametrize("text", ["So.", WHOLE], ids=["content", "call"])
@whole_and_streamed
def test_a_response_without_a_cut_call_is_incomplete_at_the_limit(
    endpoints: Endpoints, stream: bool, text: str
) -> None:
    assert ask(RESPONSES, endpoints, text, LIMIT, stream=stream).finish == "incomplete"
    assert ask(RESPONSES, endpoints, text, ENDED, stream=stream).finish == "completed"


@every_api
@pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])
def test_a_step_may_bring_the_rest_of_a_call_and_text_after_it(
    endpoints: Endpoints, api: Api, incremental: bool
) -> None:
    cut = len(BLOCK + HEAD + DIR) - 20
    said = ask(api, endpoints, f"{WHOLE}Then{WHOLE}", stream=True, cuts=[[cut, cut + 5]], incremental=incremental)
    assert (said.content, said.calls) == ("Then", [("run", '{"dir": "/home"}')] * 2)


@every_api
@whole_and_streamed
def test_the_tail_of_an_answer_is_not_lost(endpoints: Endpoints, api: Api, stream: bool) -> None:
    assert ask(api, endpoints, "It is a <", LIMIT, stream=stream).content == "It is a <"
    assert ask(api, endpoints, "It is a <", ENDED, stream=stream).content == "It is a <"


@whole_and_streamed
def test_several_answers_end_each_in_its_own_way(endpoints: Endpoints, stream: bool) -> None:
    ways = [(BLOCK + HEAD + DIR, LIMIT), (BLOCK + HEAD + DIR, ENDED), ("So.", ENDED), (WHOLE, LIMIT)]
    body = CHAT.body([FUNCTION], "auto") | {"stream": stream, "n": len(ways)}
    answer = endpoints.ask(CHAT.path, body, *ways)
    said = [(chat_streamed if stream else chat_whole)(answer, index) for index in range(len(ways))]
    cut, whole = '{"dir": "/home"', '{"dir": "/home"}'
    assert [[call[1] for call in choice.calls] for choice in said] == [[cut], [whole], [], [whole]]
    assert [choice.finish for choice in said] == ["length", "tool_calls", "stop", "length"]


@every_api
@whole_and_streamed
def test_special_tokens_do_not_leak(endpoints: Endpoints, api: Api, stream: bool) -> None:
    for tools in ([FUNCTION], []):
        body = api.body(tools, "auto") | {"stream": stream}
        if not tools:
            del body["tools"], body["tool_choice"]
        said = api.said(endpoints, body, (f"{BOS}So{EOS}.", LIMIT))
        assert said.content == "So."


@every_api
@whole_and_streamed
def test_the_answer_ends_where_the_model_writes_the_next_turn(endpoints: Endpoints, api: Api, stream: bool) -> None:
    said = ask(api, endpoints, f"So:{WHOLE}{USER}And?", stream=stream)
    assert (said.content, said.calls) == ("So:", [("run", '{"dir": "/home"}')])
    body = api.body([], "auto") | {"stream": stream}
    del body["tools"], body["tool_choice"]
    assert api.said(endpoints, body, (f"So.{USER}And?", ENDED)).content == "So."


@pytest.mark.parametrize(
    ("parsers", "options", "kept"),
    [
        pytest.param((PARSER_NAME, PARSER_NAME), {}, True, id="calls"),
        pytest.param((None, PARSER_NAME), {}, True, id="calls-alone"),
        pytest.param((PARSER_NAME, PARSER_NAME), {"tool_choice": "none"}, True, id="no-calls"),
        pytest.param((PARSER_NAME, None), {"tools": None}, True, id="reasoning"),
        pytest.param((None, PARSER_NAME), {"tools": None}, False, id="nothing-to-parse"),
        pytest.param((PARSER_NAME, PARSER_NAME), {"skip_special_tokens": True}, True, id="calls-would-be-lost"),
        pytest.param((PARSER_NAME, None), {"tools": None, "skip_special_tokens": True}, False, id="chosen"),
        pytest.param((None, None), {"tools": None, "skip_special_tokens": False}, True, id="chosen-without-parsers"),
    ],
)
def test_who_keeps_special_tokens(
    monkeypatch: pytest.MonkeyPatch, parsers: Any, options: dict[str, Any], kept: bool
) -> None:
    put_hooks(monkeypatch)
    endpoints = Endpoints(monkeypatch, parsers)
    endpoints.ask(CHAT.path, CHAT.body([FUNCTION], "auto") | options, ("So.", ENDED))
    assert endpoints.engine.sampling["skip_special_tokens"] is not kept


@pytest.mark.parametrize(("text", "arguments"), CUT_TEXTS.values(), ids=CUT_TEXTS)
def test_a_history_with_a_cut_call_renders(endpoints: Endpoints, text: str, arguments: str) -> None:
    """Chat and Responses echo what they were given; Anthropic's clients hold an object."""
    call = {"id": "1", "type": "function", "function": {"name": "run", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "cut"}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
    official = encode_messages(messages, thinking_mode="chat")
    assert "/home" in official or DIR not in text
    assert "/home/u" in official or "/home/u" not in text
    endpoints.ask(CHAT.path, {"messages": messages}, ("So.", ENDED))
    assert endpoints.engine.prompt == official
    items = [
        {"role": "user", "content": "?"},
        {"type": "function_call", "call_id": "1", "name": "run", "arguments": arguments, "status": "incomplete"},
        {"type": "function_call_output", "call_id": "1", "output": "cut"},
    ]
    endpoints.ask(RESPONSES.path, {"input": items}, ("So.", ENDED))
    assert endpoints.engine.prompt == official


def test_thoughts_of_an_anthropic_history_stay_thoughts(endpoints: Endpoints) -> None:
    messages = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "s"},
                {"type": "tool_use", "id": "1", "name": "run", "input": {"dir": "/home"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "empty"}]},
    ]
    call = {"id": "1", "function": {"name": "run", "arguments": {"dir": "/home"}}}
    expected = encode_messages(
        [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "empty"},
        ]
    )
    body = {"messages": messages, "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    endpoints.ask(ANTHROPIC.path, body, (f"So.{THINK_END}Done.", ENDED))
    assert endpoints.engine.prompt == expected
    assert "<think>I look.</think>" in expected


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        pytest.param("So:" + WHOLE, "So:", [("run", '{"dir": "/home"}')], id="call"),
        pytest.param(BLOCK + HEAD + DIR, "", [("run", '{"dir": "/home"')], id="cut-call"),
        pytest.param("So.", "So.", [], id="content"),
        pytest.param("So:" + BLOCK, "So:", [], id="cut-in-the-header"),
    ],
)
def test_a_given_text_is_parsed(endpoints: Endpoints, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    body = {"text": text, "tools": [{"type": "function", "function": FUNCTION}], "tool_call_parser": PARSER_NAME}
    answer = endpoints.ask("/parse_function_call", body)
    assert answer["normal_text"] == content
    assert [(call["name"], call["parameters"]) for call in answer["calls"]] == calls


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [("I think.</think>So.", "I think.", "So."), ("<think>I think.</think>So.", "I think.", "So."), ("So.", "", "So.")],
    ids=["answer", "with-the-start", "content"],
)
def test_reasoning_of_a_given_text(endpoints: Endpoints, text: str, reasoning: str, content: str) -> None:
    answer = endpoints.ask("/separate_reasoning", {"text": text, "reasoning_parser": PARSER_NAME})
    assert (answer["reasoning_text"], answer["text"]) == (reasoning, content)


@pytest.mark.parametrize("thinking", [False, True], ids=["chat", "thinking"])
def test_random_answers(endpoints: Endpoints, thinking: bool) -> None:
    """Streamed, cut anywhere and ended in any way, they are what the parser says, whole as well."""
    choose = random.Random(int(os.environ.get("DSV32_TEST_SEED", "0")))
    for _ in range(int(os.environ.get("DSV32_TEST_ANSWERS", "1000")) // (2 * ANSWERS_AT_ONCE)):
        texts = ["".join(_pieces(choose)) for _ in range(ANSWERS_AT_ONCE)]
        ways = [(text, choose.choice([ENDED, LIMIT, stopped("zhou"), stopped(55)])) for text in texts]
        cuts = [sorted(choose.choices(range(1, len(text) + 1), k=choose.randrange(5))) for text in texts]
        body = {**CHAT.body([], "auto"), "tools": TOOLS, "n": len(ways), "chat_template_kwargs": {"thinking": thinking}}
        whole = endpoints.ask(CHAT.path, body, *ways)
        streamed = endpoints.ask(CHAT.path, {**body, "stream": True}, *ways, cuts=cuts)
        for index, (text, finish) in enumerate(ways):
            said = chat_streamed(streamed, index)
            assert said == chat_whole(whole, index), (text, cuts[index])
            _check(said, text, finish, thinking)


ANSWERS_AT_ONCE = 50


def _pieces(choose: random.Random) -> list[str]:
    pieces = choose.choices(PIECES, k=choose.randint(1, 12))
    # Half of them are in a call.
    return [START, open_invoke("edit"), *pieces] if choose.random() < 0.5 else pieces


def _check(said: Said, text: str, finish: dict[str, Any], thinking: bool) -> None:
    open_calls = [arguments for _, arguments in said.calls if not _is_json(arguments)]
    assert all(arguments.startswith("{") for arguments in open_calls), text
    if finish is not LIMIT:
        assert said.finish == ("tool_calls" if said.calls and not open_calls else "stop"), text
    if not thinking:
        message = OutputParser.parse(text, TOOLS, think_tags=False, ended=finish is ENDED)
        calls = [(call.name, call.arguments) for call in message.tool_calls]
        assert (said.content, said.calls) == (message.content, calls), text
        assert len(open_calls) == sum(not call.complete for call in message.tool_calls), text


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def test_the_time_is_linear() -> None:
    def seconds(length: int) -> float:
        detector, start = DsaToolDetector(), time.process_time()
        detector.parse_streaming_increment(BLOCK + HEAD + '<｜DSML｜parameter name="dir" string="true">', [])
        for _ in range(length):
            detector.parse_streaming_increment("a < b", [])
        detector.parse_streaming_increment(LastText("", ended=False), [])
        return time.process_time() - start

    small, large = (min(seconds(length) for _ in range(3)) for length in (4_000, 16_000))
    assert large < 6 * small, "four times the text"
