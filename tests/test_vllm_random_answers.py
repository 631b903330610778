"""Random answers through vLLM's own chat endpoint, without HTTP: whole, and streamed in pieces cut anywhere."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from chats import USER, WEATHER
from scripted_vllm import ScriptedServer, serve
from told import NAME, Told
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm_names import RequestResponseMetadata

from dsv32_plugin.parsers.protocol import BOS, EOS, THINK_END, THINK_START
from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.tiny import TinySpec
from dsv32_plugin.vllm_adapter.answers import finish_text

ANSWERS = int(os.environ.get("DSV32_RANDOM_ANSWERS", "2000"))
THINK_IDS = {True: 128798, False: 128799}
SOME = {
    "type": "function",
    "function": {"name": "some", "parameters": {"type": "object", "properties": {"a": {}, "b": {"type": "object"}}}},
}
FINISHES = [("stop", None), ("stop", "END"), ("stop", 7), ("length", None), ("abort", None), ("repetition", "again")]
PROSE = ["WORD ", "WORD\n\n", "a < WORD", "`WORD`", "\n\n", " ", "<", "</", "｜", "｜DSML｜", "```\n", "é", "🙂", "\\"]
TAGS = [
    "<｜DSML｜function_calls>\n",
    "</｜DSML｜function_calls>",
    f'<｜DSML｜invoke name="{NAME}">\n',
    '<｜DSML｜invoke name="some">\n',
    '<｜DSML｜invoke name="unknown">\n',
    "</｜DSML｜invoke>\n",
    '<｜DSML｜parameter name="city" string="true">WORD',
    '<｜DSML｜parameter name="a" string="true">',
    '<｜DSML｜parameter name="b" string="false">{"WORD": [1, "WORD"]}',
    '<｜DSML｜parameter name="days" string="false">12',
    '<｜DSML｜parameter name="a">WORD',
    "</｜DSML｜parameter>\n",
]
SPECIAL = [THINK_START, THINK_END, THINK_END, BOS, EOS]
CALL = (
    f'<｜DSML｜invoke name="{NAME}">\n<｜DSML｜parameter name="city" string="true">WORD</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)


def answer(choose: random.Random) -> str:
    """Good calls with prose around them, in which some pieces are taken away, doubled or put anywhere."""
    pieces = [THINK_END] if choose.random() < 0.5 else []
    for _ in range(choose.randrange(6)):
        kind = choose.random()
        if kind < 0.35:
            pieces += ["\n\n<｜DSML｜function_calls>\n", *[CALL] * choose.randrange(1, 3), "</｜DSML｜function_calls>"]
        else:
            pieces += choose.choices(
                PROSE if kind < 0.7 else TAGS if kind < 0.95 else SPECIAL, k=choose.randrange(1, 4)
            )
    text = "".join(pieces)
    if choose.random() < 0.5:
        text = text[: choose.randrange(len(text) + 1)]
    for number in range(text.count("WORD")):
        text = text.replace("WORD", f"w{number}w", 1)
    return text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = tmp_path_factory.mktemp("models") / "special"
    tiny.write_without_weights(TinySpec(rope_original=512).config(), folder)
    with serve(folder, "--tool-call-parser", "dsv32", "--reasoning-parser", "dsv32", "--enable-auto-tool-choice") as it:
        yield it


def tell(
    server: ScriptedServer, pieces: list[str], finish: tuple[str, Any], *, thinking: bool, stream: bool, choice: str
) -> Told:
    """What vLLM's endpoint makes of these pieces of text."""
    serving = server.app.state.openai_serving_chat
    body = {"messages": USER, "tools": [WEATHER, SOME], "tool_choice": choice, "stream": stream}
    request = ChatCompletionRequest.model_validate({"model": "tiny", **body})
    kwargs = {"thinking": thinking}

    def outputs() -> Iterator[RequestOutput]:
        for number, text in enumerate(pieces):
            last = number == len(pieces) - 1
            reason, stop_reason = finish if last else (None, None)
            output = CompletionOutput(0, text, [9], None, None, finish_reason=reason, stop_reason=stop_reason)
            yield RequestOutput("id", None, [1, THINK_IDS[thinking]], None, [finish_text(output)], last)

    async def generate() -> AsyncIterator[RequestOutput]:
        for output in outputs():
            yield output

    async def ask() -> Told:
        rest = (request, generate(), "id", "tiny", USER, server.tokenizer, RequestResponseMetadata(request_id="id"))
        told = Told()
        if not stream:
            parser = serving.parser_cls(server.tokenizer, request.tools, chat_template_kwargs=kwargs)
            made = await serving.chat_completion_full_generator(*rest, parser=parser)
            parts = [(made.choices[0].message.model_dump(), made.choices[0].finish_reason)]
        else:
            chunks = [
                chunk async for chunk in serving.chat_completion_stream_generator(*rest, chat_template_kwargs=kwargs)
            ]
            assert chunks[-1] == "data: [DONE]\n\n"
            choices = [json.loads(chunk[len("data: ") :])["choices"][0] for chunk in chunks[:-1]]
            parts = [(one["delta"], one["finish_reason"]) for one in choices]
        for said, ending in parts:
            told.thoughts += said.get("reasoning") or ""
            told.text += said.get("content") or ""
            for number, call in enumerate(said.get("tool_calls") or ()):
                index = call.get("index", number)
                if index == len(told.names):
                    told.names.append(call["function"]["name"])
                    told.arguments.append("")
                told.arguments[index] += call["function"].get("arguments") or ""
            told.ending = ending or told.ending
        return told

    return asyncio.run(ask())


def cut(choose: random.Random, text: str) -> list[str]:
    """The text in some pieces, empty ones among them."""
    places = sorted(choose.choices(range(len(text) + 1), k=choose.randrange(8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def is_open(arguments: str) -> bool:
    try:
        json.loads(arguments)
    except ValueError:
        return True
    return False


def test_random_answers_do_not_depend_on_the_cut_and_show_theirs(server: ScriptedServer) -> None:
    choose = random.Random(1)
    seen: dict[str, int] = {}
    for number in range(ANSWERS):
        text, finish = answer(choose), choose.choice(FINISHES)
        options = {"thinking": choose.random() < 0.5, "choice": choose.choice(["auto", "auto", "required"])}
        whole = tell(server, [text], finish, stream=False, **options)
        streamed = tell(server, cut(choose, text), finish, stream=True, **options)
        about = f"answer {number}, {finish}, {options}: {text!r}"
        if whole.text == "" and streamed.text.isspace() and whole.names:
            streamed.text = ""  # vLLM leaves white space beside calls out of a whole message
        assert streamed == whole, about
        opened = [arguments for arguments in whole.arguments if is_open(arguments)]
        assert all(arguments.startswith("{") for arguments in whole.arguments), about
        calls = bool(whole.names) and finish[0] == "stop" and not opened
        assert whole.ending == ("tool_calls" if calls else finish[0]), about
        told = whole.thoughts + whole.text + "".join(whole.names) + "".join(whole.arguments)
        for count in range(text.count("w") // 2):
            if f"w{count}w" in text:
                assert f"w{count}w" in told, f"w{count}w is lost of {about}"
        kind = "open" if opened else "calls" if whole.names else "text"
        seen[kind] = seen.get(kind, 0) + 1
    assert set(seen) == {"open", "calls", "text"}, seen


def test_a_long_answer_takes_linear_time(server: ScriptedServer) -> None:
    def elapsed(size: int) -> float:
        text = CALL[: CALL.index("</")] + "x" * size
        pieces = [text[start : start + 16] for start in range(0, len(text), 16)]
        start = time.process_time()
        told = tell(server, pieces, ("length", None), thinking=False, stream=True, choice="auto")
        assert len(told.arguments[0]) > size
        return time.process_time() - start

    small, large = (min(elapsed(size) for _ in range(3)) for size in (1 << 14, 1 << 16))
    assert large < 6 * small, "four times the text"
