"""The files of examples/ run as their docstrings say, with the trained tiny model in the place of a large one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from engines import START_TIMEOUT_S, installed

from dsv32_plugin.engines import ENGINES
from dsv32_plugin.tools import demo
from dsv32_plugin.training import tasks

ENGINE = installed()
EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = [*demo.COMMON_OPTIONS, *ENGINES[ENGINE.name].demo_options]
    log_path = tmp_path_factory.mktemp("examples") / "server.log"
    with ENGINE.server(demo.TRAINED, options, log_path=log_path, env=demo.ENVIRONMENT) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        assert "dsv32: serving" in server.log()
        yield f"{server.url}/v1"


def run(example: str, *arguments: str) -> list[str]:
    """What it prints."""
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_chat_with_tools(url: str) -> None:
    lines = run("chat_with_tools.py", demo.WEATHER_QUESTION, "--url", url, "--temperature", "0")
    call = f"get_weather({json.dumps(demo.WEATHER_ARGUMENTS)}) -> {json.dumps(demo.WEATHER)}"
    assert lines == [call, demo.WEATHER_ANSWER]


def test_long_document(url: str, tmp_path: Path) -> None:
    """Two codes of a list of 2000 tokens."""
    question, expected, other, also = tasks.needles_of(Random(1), 2000, 2, thinking=0).messages
    *codes, first = question["content"].splitlines()
    document = tmp_path / "codes.txt"
    document.write_text("\n".join(codes) + "\n", encoding="utf-8")
    lines = run("long_document.py", str(document), first, other["content"], "--url", url, "--temperature", "0")
    assert [line.strip() for line in lines if "first token" not in line] == [
        first, expected["content"], other["content"], also["content"],
    ]  # fmt: skip


def test_offline_batch(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    asked, answered = zip(*(tasks.copying(Random(seed)).messages[:2] for seed in range(4)), strict=True)
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(question["content"] for question in asked), encoding="utf-8")
    lines = run("offline_batch.py", str(questions), "--max-tokens", "64")
    answers = [json.loads(line)["answer"] for line in lines if line.startswith("{")]
    assert answers == [answer["content"] for answer in answered]
