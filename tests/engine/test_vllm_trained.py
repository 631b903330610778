"""The real `vllm serve` answers from the trained tiny model exactly as the training model does, and right.

DSV32_SERVED_PROMPTS sets how many prompts (docs/notes/training.md has the result for 200).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("vllm")

import client

from dsv32_plugin.tools.demo import TRAINED
from dsv32_plugin.tools.serving import VllmServer
from dsv32_plugin.training import checkpoint, tasks
from dsv32_plugin.training.measures import greedy_gives
from dsv32_plugin.training.model import top_k
from dsv32_plugin.training.tokenizer import decode, encode

pytestmark = pytest.mark.engine

PROMPTS = int(os.environ.get("DSV32_SERVED_PROMPTS", "20"))
TOGETHER = 20
START_TIMEOUT_S = 300
OPTIONS = [
    "--served-model-name", "tiny",
    "--dtype", "float32",
    "--max-model-len", "8192",
    "--max-num-batched-tokens", "1024",
    "--kv-cache-memory-bytes", "536870912",
    "--enforce-eager",
]  # fmt: skip


def questions(count: int) -> list[tuple[str, str]]:
    """Prompts of every kind with their true answers; one list of codes in ten has 4096 tokens, the others fewer."""
    random = Random("served")
    made = []
    for number in range(count):
        if number % 2 == 0:
            length = 4096 if number % 20 == 0 else random.randint(200, 1500)
            made.append(tasks.needles_of(random, length, 1).cut(0))
        else:
            conversation = tasks.chat(random)
            turns = sum(message["role"] == "assistant" for message in conversation.messages)
            made.append(conversation.cut(random.randrange(turns)))
    return made


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path: Path = tmp_path_factory.mktemp("trained") / "server.log"
    with VllmServer(TRAINED, OPTIONS, log_path=log_path) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        assert "dsv32: serving" in server.log()
        yield server.url


def test_greedy_answers_are_the_training_models(url: str) -> None:
    asked = questions(PROMPTS)
    prompts = [encode(prompt) for prompt, _ in asked]
    answers = []
    for begin in range(0, len(prompts), TOGETHER):
        part = prompts[begin : begin + TOGETHER]
        answers += client.complete_together(url, part, 200, ignore_eos=False)
    model = checkpoint.load(TRAINED)
    select = partial(top_k, k=model.config.index_topk)
    same = [
        greedy_gives(model, [(prompt, answer.tokens)], select)[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    right = [decode(answer.tokens) == answer_text for answer, (_, answer_text) in zip(answers, asked, strict=True)]
    print(f"{sum(same)} of {PROMPTS} as the training model, {sum(right)} right")
    assert all(same), [i for i, one in enumerate(same) if not one]
    assert sum(right) >= 0.95 * PROMPTS
