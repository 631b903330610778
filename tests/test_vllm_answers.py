"""What vLLM's endpoints make of an answer, wherever it stops: its own server, parsers and clients, a scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import httpx
from chats import USER, WEATHER, dsml
from scripted_vllm import ScriptedServer, serve
from told import NAME, TELL, Tell, openai_client, tell_chat, tell_messages, tell_responses
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from dsv32_plugin.parsers import ended_parameters
from dsv32_plugin.parsers.protocol import BOS, EOS, PAD
from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.tiny import DSML_ID, TinySpec
from dsv32_plugin.vllm_adapter import endpoints, hooks, upstream
from dsv32_plugin.vllm_adapter.answers import Finish

PARSERS = ("--tool-call-parser", "dsv32", "--reasoning-parser", "dsv32", "--enable-auto-tool-choice")
MARK = "｜DSML｜"
THOUGHTS = "Let me see.</think>"
CALLS = [("Hangzhou", 1), ("Paris", 2)]
ARGUMENTS = [json.dumps({"city": city, "days": days}) for city, days in CALLS]
ANSWER = "I ask." + dsml(*CALLS)
COMMAND = "rm -rf /home/u"
RUN = {
    "type": "function",
    "function": {"name": "run", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
HALF = f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="run">\n<｜DSML｜parameter name="a" string="true">{COMMAND}'

whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
every_choice = pytest.mark.parametrize("choice", ["auto", "required", "named"])


@pytest.fixture(scope="module", params=["special", "ordinary"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer, in which the mark of a call is flagged special, or not."""
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny.write_without_weights(TinySpec(rope_original=512).config(), folder)
    if request.param == "ordinary":
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        (mark,) = (token for token in tokenizer["added_tokens"] if token["id"] == DSML_ID)
        mark["special"] = False
        path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ScriptedServer]:
    with serve(model, *PARSERS) as server:
        shown = server.tokenizer.decode([DSML_ID], skip_special_tokens=True)
        assert shown == ("" if model.name == "special" else MARK)
        yield server


every_endpoint = pytest.mark.parametrize("tell", list(TELL.values()), ids=list(TELL))
CALLED = {tell_chat: "tool_calls", tell_responses: "completed", tell_messages: "tool_use"}
CUT = {tell_chat: "length", tell_responses: "incomplete", tell_messages: "max_tokens"}
STOPPED = {tell_chat: "stop", tell_responses: "incomplete", tell_messages: "stop_sequence"}
ENDED = {tell_chat: "stop", tell_responses: "completed", tell_messages: "end_turn"}
THINKING = {"thinking": {"thinking": True}}


@whole_and_streamed
@every_endpoint
@every_choice
@pytest.mark.parametrize("thinking", [False, True], ids=["chat", "thinking"])
def test_calls_are_found(server: ScriptedServer, tell: Tell, stream: bool, choice: str, thinking: bool) -> None:
    server.says(THOUGHTS + ANSWER if thinking else ANSWER)
    (told,) = tell(server.url, stream, choice, tools=[WEATHER], **(THINKING if thinking else {}))
    assert told.names == [NAME, NAME]
    assert told.arguments == ARGUMENTS
    assert told.text == "I ask."
    assert told.thoughts == ("Let me see." if thinking else "")
    if choice != "named":
        assert told.ending == CALLED[tell]


@whole_and_streamed
@pytest.mark.parametrize("tell", [tell_chat, tell_responses], ids=["chat", "responses"])
@pytest.mark.parametrize("asked", [False, True])
def test_the_client_does_not_take_the_mark_away(server: ScriptedServer, tell: Tell, stream: bool, asked: bool) -> None:
    server.says(ANSWER)
    (told,) = tell(server.url, stream, "auto", tools=[WEATHER], skip_special_tokens=asked)
    assert told.arguments == ARGUMENTS


@whole_and_streamed
def test_each_of_two_choices_is_parsed_alone(server: ScriptedServer, stream: bool) -> None:
    length = server.says(ANSWER, "No.")
    first, second = tell_chat(server.url, stream, "auto", tools=[WEATHER], n=2)
    assert (first.arguments, first.ending) == (ARGUMENTS, "tool_calls")
    assert (second.text, second.names, second.ending) == ("No.", [], "stop")
    first, second = tell_chat(server.url, stream, "auto", tools=[WEATHER], n=2, limit=length - 9)
    assert (first.arguments[0], first.ending) == (ARGUMENTS[0], "length")
    assert first.arguments[1].rstrip() == ARGUMENTS[1].removesuffix("}")
    assert (second.text, second.names, second.ending) == ("No.", [], "stop")


@whole_and_streamed
@every_endpoint
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_without_a_call_nothing_special_shows(server: ScriptedServer, tell: Tell, stream: bool, choice: str) -> None:
    server.says("Two < three.")
    (told,) = tell(server.url, stream, choice, tools=[WEATHER])
    assert (told.text, told.names, told.ending) == ("Two < three.", [], ENDED[tell])


@whole_and_streamed
@every_endpoint
def test_with_tool_choice_none_markup_is_content(server: ScriptedServer, tell: Tell, stream: bool) -> None:
    server.says(ANSWER)
    (told,) = tell(server.url, stream, "none", tools=[WEATHER])
    assert (told.text, told.names) == (ANSWER, [])


@whole_and_streamed
@every_endpoint
@pytest.mark.parametrize("thinking", [False, True], ids=["chat", "thinking"])
def test_without_tools_special_tokens_stay_away(
    server: ScriptedServer, model: Path, tell: Tell, stream: bool, thinking: bool
) -> None:
    server.says((THOUGHTS if thinking else "") + f"The {MARK} mark.{PAD}")
    (told,) = tell(server.url, stream, "auto", **(THINKING if thinking else {}))
    assert told.text == ("The  mark." if model.name == "special" else f"The {MARK} mark.")
    assert told.thoughts == ("Let me see." if thinking else "")


@whole_and_streamed
@pytest.mark.parametrize("text", ["Hello.", THOUGHTS + "Hello.", ANSWER, THOUGHTS + ANSWER])
@pytest.mark.parametrize("choice", ["auto", "none"])
@pytest.mark.parametrize("eos", [f"{EOS}", f"{EOS}{EOS}{EOS}"], ids=["one", "many"])
def test_eos_that_the_client_asks_for_is_not_in_the_answer(
    server: ScriptedServer, stream: bool, text: str, choice: str, eos: str
) -> None:
    length = server.says(text + eos)
    thinking = THINKING if text.startswith(THOUGHTS) else {}
    for asked in ({"include_stop_str_in_output": True}, {"ignore_eos": True, "limit": length}):
        (told,) = tell_chat(server.url, stream, choice, tools=[WEATHER], **asked, **thinking)
        if choice == "none":
            assert told.text == text.removeprefix(THOUGHTS)
        else:
            assert told.text == ("Hello." if "Hello." in text else "I ask.")
            assert told.arguments == ([] if "Hello." in text else ARGUMENTS)
        assert told.thoughts == ("Let me see." if thinking else "")


@whole_and_streamed
@every_endpoint
@pytest.mark.parametrize("token", [BOS, PAD], ids=["bos", "pad"])
def test_other_tokens_of_the_tokenizer_do_not_leak(
    server: ScriptedServer, tell: Tell, stream: bool, token: str
) -> None:
    server.says(f"Hm{token}m.</think>I{token} ask{token}." + dsml(*CALLS) + token)
    (told,) = tell(server.url, stream, "auto", tools=[WEATHER], **THINKING)
    assert (told.thoughts, told.text, told.arguments) == ("Hmm.", "I ask.", ARGUMENTS)


@whole_and_streamed
@every_endpoint
def test_the_model_does_not_speak_for_the_user(server: ScriptedServer, tell: Tell, stream: bool) -> None:
    server.says(ANSWER + "<｜User｜>And in Rome?<｜Assistant｜></think>Rain.")
    (told,) = tell(server.url, stream, "auto", tools=[WEATHER])
    assert (told.text, told.arguments) == ("I ask.", ARGUMENTS)


def is_open(arguments: str) -> bool:
    try:
        json.loads(arguments)
    except ValueError:
        return True
    return False


@every_endpoint
def test_an_answer_cut_anywhere_is_visibly_cut(server: ScriptedServer, model: Path, tell: Tell) -> None:
    length = server.says(THOUGHTS + ANSWER)
    wishes = {"tools": [WEATHER], **THINKING}
    seen = set()
    for limit in range(1, length + 1, 1 if model.name == "special" else 5):
        (whole,) = tell(server.url, False, "auto", limit=limit, **wishes)
        (streamed,) = tell(server.url, True, "auto", limit=limit, **wishes)
        assert (whole.thoughts, whole.text, whole.names) == (streamed.thoughts, streamed.text, streamed.names)
        assert whole.ending == streamed.ending == CUT[tell], f"after {limit} tokens"
        for told in (whole, streamed):
            assert "Let me see.".startswith(told.thoughts)
            assert "I ask.\n\n<".startswith(told.text)
            assert told.names == [NAME] * len(told.names)
        for number, arguments in enumerate(streamed.arguments):
            if number < len(streamed.arguments) - 1 or not is_open(arguments):
                assert arguments == ARGUMENTS[number]
            else:
                assert arguments.startswith("{")
                assert ARGUMENTS[number].startswith(arguments)
            seen.add(is_open(arguments))
        if tell is tell_messages:
            for held, arguments in zip(whole.arguments, streamed.arguments, strict=True):
                # Of a number at the end the streamed text does not say whether it is over.
                ways = [ended_parameters(arguments, value_is_open=may_go_on)[0] for may_go_on in (True, False)]
                assert json.loads(held) in ways
        else:
            assert whole.arguments == streamed.arguments
        if tell is tell_responses:
            statuses = ["completed"] * bool(whole.text)
            statuses += ["incomplete" if is_open(arguments) else "completed" for arguments in whole.arguments]
            if whole.text and not whole.names:
                statuses[-1] = "incomplete"
            assert whole.detail == streamed.detail == (statuses, "max_output_tokens")
    assert seen == {False, True}


@whole_and_streamed
@every_endpoint
@every_choice
def test_a_command_that_was_cut_is_not_finished(server: ScriptedServer, tell: Tell, stream: bool, choice: str) -> None:
    tools = [{**RUN, "function": {**RUN["function"], "name": NAME}}]
    half = HALF.replace('"run"', f'"{NAME}"')
    limit = server.says(half, ends=False)
    (told,) = tell(server.url, stream, choice, tools=tools, limit=limit)
    assert told.ending == CUT[tell]
    assert told.names == [NAME]
    if tell is tell_messages and not stream:
        assert told.arguments == ["{}"], "what has not ended is not in the input"
    else:
        assert told.arguments == [f'{{"a": "{COMMAND}']
    server.says(half + "STOP", ends=False)
    (told,) = tell(server.url, stream, choice, tools=tools, stop=["STOP"])
    assert told.ending == STOPPED[tell]
    if tell is tell_messages:
        assert told.detail == "STOP"
    if tell is tell_responses:
        assert told.detail == (["incomplete"], None)
    if tell is not tell_messages or stream:
        assert told.arguments == [f'{{"a": "{COMMAND}']


@whole_and_streamed
@every_endpoint
def test_a_model_that_ends_inside_a_value_has_not_finished_the_call(
    server: ScriptedServer, tell: Tell, stream: bool
) -> None:
    server.says(HALF)
    (told,) = tell(server.url, stream, "auto", tools=[RUN])
    assert told.ending == {tell_responses: "incomplete"}.get(tell, ENDED[tell])
    assert told.ending != CALLED[tell]
    if tell is not tell_messages or stream:
        assert told.arguments == [f'{{"a": "{COMMAND}']


@whole_and_streamed
@every_endpoint
def test_a_model_that_ends_after_its_last_value_has(server: ScriptedServer, tell: Tell, stream: bool) -> None:
    server.says(HALF + "</｜DSML｜parameter>")
    (told,) = tell(server.url, stream, "auto", tools=[RUN])
    assert (told.arguments, told.ending) == ([json.dumps({"a": COMMAND})], CALLED[tell])


@whole_and_streamed
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_stop_string_in_a_step_with_eos_cuts(server: ScriptedServer, stream: bool, step: int) -> None:
    """Drafts bring several tokens at once: EOS was among them, and the text ends before."""
    server.says(HALF + "</｜DSML｜parameter>\nSTOP</｜DSML｜invoke>", step=step)
    (told,) = tell_chat(server.url, stream, "auto", tools=[RUN], stop=["STOP"])
    assert told.ending == "stop"
    assert is_open(told.arguments[0])


@whole_and_streamed
@every_endpoint
@pytest.mark.parametrize("head", ["", "I ask.\n\n"], ids=["bare", "after-text"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_markup_of_a_call_cut_in_its_header_does_not_show(
    server: ScriptedServer, tell: Tell, stream: bool, head: str, choice: str
) -> None:
    header = HALF[: HALF.index("\n<｜DSML｜parameter")].removesuffix('run">')
    length = server.says(head + header, ends=False)
    for limit in range(length - 8, length + 1):
        (told,) = tell(server.url, stream, choice, tools=[RUN], limit=limit)
        assert (told.text.strip(), told.names, told.ending) == (head.strip(), [], CUT[tell])


@whole_and_streamed
@every_endpoint
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_forced_call_that_did_not_come_is_not_announced(
    server: ScriptedServer, tell: Tell, stream: bool, choice: str
) -> None:
    server.says("I would rather not.")
    (told,) = tell(server.url, stream, choice, tools=[WEATHER])
    assert (told.text, told.names, told.ending) == ("I would rather not.", [], ENDED[tell])


@whole_and_streamed
def test_completions_of_text_are_as_they_were(server: ScriptedServer, stream: bool) -> None:
    server.says("One, two.")
    made = openai_client(server.url).completions.create(model="tiny", prompt="Count.", stream=stream)
    choices = [chunk.choices[0] for chunk in (made if stream else [made])]
    assert "".join(choice.text for choice in choices) == "One, two."
    assert choices[-1].finish_reason == "stop"


def test_a_text_generated_elsewhere_is_parsed(server: ScriptedServer) -> None:
    """Derendering has tokens alone: EOS is among them, or the answer was cut."""
    for text, ended in ((ANSWER, True), (HALF, False)):
        tokens = server.tokenizer.encode(text, add_special_tokens=False) + [1] * ended
        choice = {"index": 0, "token_ids": tokens, "finish_reason": "stop" if ended else "length"}
        request = {"model": "tiny", "messages": USER, "tools": [WEATHER, RUN]}
        body = {"model": "tiny", "generate_response": {"request_id": "x", "choices": [choice]}, "chat_request": request}
        response = httpx.post(f"{server.url}/v1/chat/completions/derender", json=body, timeout=60)
        assert response.status_code == httpx.codes.OK, response.text
        message = response.json()["choices"][0]["message"]
        arguments = [call["function"]["arguments"] for call in message["tool_calls"]]
        assert arguments == (ARGUMENTS if ended else [f'{{"a": "{COMMAND}'])


def test_a_response_in_the_background_ends_where_it_was_cut(server: ScriptedServer) -> None:
    serving = server.app.state.openai_serving_responses
    serving.enable_store = True
    try:
        limit = server.says(HALF, ends=False)
        (told,) = tell_responses(server.url, True, "auto", tools=[RUN], limit=limit, background=True, store=True)
        assert (told.ending, told.detail) == ("incomplete", (["incomplete"], "max_output_tokens"))
    finally:
        serving.enable_store = False


@pytest.mark.parametrize(
    ("finish", "stop_token_ids", "is_by_the_model"),
    [
        pytest.param(Finish("stop"), None, True, id="eos"),
        pytest.param(Finish("stop", 7), None, True, id="another-eos"),
        pytest.param(Finish("stop", 7), [7], False, id="stop-token"),
        pytest.param(Finish("stop", "7"), None, False, id="stop-string"),
        pytest.param(Finish("length"), None, False, id="limit"),
    ],
)
def test_who_ended_the_answer(finish: Finish, stop_token_ids: list[int] | None, is_by_the_model: bool) -> None:
    request = ChatCompletionRequest(model="m", messages=USER, stop_token_ids=stop_token_ids)
    assert finish.is_by_the_model(request) is is_by_the_model


def test_a_place_that_vllm_has_not_is_named_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, around in endpoints.HOOKS:
        hooks.at(place, around)
    with pytest.raises(
        hooks.HookError, match=r"expected vllm\.outputs\.nothing\(self, \.\.\.\) to hook into, found noth"
    ):
        hooks.hook("vllm.outputs.nothing", ("self",), print)
    with pytest.raises(hooks.HookError, match=r"RequestOutput\.add\(self, other, \.\.\.\).*found \(self, next_output"):
        hooks.hook("vllm.outputs.RequestOutput.add", ("self", "other"), print)


def test_the_page_of_patches_names_every_hook() -> None:
    page = (Path(__file__).parent.parent / "docs" / "patches.md").read_text(encoding="utf-8")
    rows = [
        line.split("`")[1] for line in page.partition("## vLLM's endpoints")[2].splitlines() if line.startswith("| `")
    ]
    assert [f"vllm.{row}" for row in rows] == [
        "vllm.parser.ParserManager.get_parser",
        *(
            target
            for place, _ in endpoints.HOOKS + endpoints.LABELS + endpoints.ASSEMBLED_LABELS
            for target in upstream.PLACES[place].targets
        ),
    ]
