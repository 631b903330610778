"""GLM-5's chats through vLLM with the plugin loaded: the checkpoint's template, and vLLM's own parsers for GLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import glm
from chats import WEATHER
from scripted_vllm import ScriptedServer, serve
from told import NAME, TELL, Tell, tell_chat

from dsv32_plugin.core import chat_format
from dsv32_plugin.core.config import GLM_MOE_DSA

whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
every_endpoint = pytest.mark.parametrize("tell", list(TELL.values()), ids=list(TELL))
CITY = "Hang<zhou> & </x>"
CALLS = glm.call(NAME, city=CITY, days="3") + glm.call(NAME, city="巴黎", days="1")
ARGUMENTS = [{"city": CITY, "days": 3}, {"city": "巴黎", "days": 1}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """With the parsers that `dsv32 check` names."""
    folder = glm.write(tmp_path_factory.mktemp("glm") / "model")
    spoken, _ = chat_format.of(GLM_MOE_DSA, chat_format.template_of(Path(folder)))
    assert spoken is not None
    tool, reasoning = spoken.parsers["vllm"]
    assert (tool, reasoning) == ("glm47", "glm45")
    options = ("--tool-call-parser", tool, "--reasoning-parser", reasoning, "--enable-auto-tool-choice")
    with serve(folder, *options) as server:
        yield server


@whole_and_streamed
@every_endpoint
@pytest.mark.parametrize("step", [1, 3])
def test_nothing_of_an_answer_is_lost(server: ScriptedServer, tell: Tell, stream: bool, step: int) -> None:
    server.says("Let me see: 1 < 2.</think>I ask.\n" + CALLS, step=step)
    (told,) = tell(server.url, stream, "auto", tools=[WEATHER])
    assert told.names == [NAME, NAME]
    assert [json.loads(arguments) for arguments in told.arguments] == ARGUMENTS
    assert told.thoughts.strip() == "Let me see: 1 < 2."
    assert told.text.strip() == "I ask."


@whole_and_streamed
@every_endpoint
def test_an_answer_without_calls(server: ScriptedServer, tell: Tell, stream: bool) -> None:
    server.says("Hm.</think>It is <b>4</b>.")
    (told,) = tell(server.url, stream, "auto")
    assert (told.thoughts, told.text) == ("Hm.", "It is <b>4</b>.")


@whole_and_streamed
def test_without_thinking(server: ScriptedServer, stream: bool) -> None:
    server.says("It is 4.")
    (told,) = tell_chat(server.url, stream, "auto", thinking={"enable_thinking": False})
    assert (told.thoughts, told.text) == ("", "It is 4.")


def test_the_prompt_is_the_template_s(server: ScriptedServer) -> None:
    server.says("Hm.</think>4")
    tell_chat(server.url, False, "auto", tools=[WEATHER])
    prompt = server.tokenizer.decode(server.script.seen[0].prompt_token_ids)
    assert prompt.startswith("[gMASK]<sop><|system|>\n# Tools\n")
    assert prompt.endswith("<|assistant|><think>")
