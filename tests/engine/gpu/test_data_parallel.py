"""Data parallel attention: two engines with a cache each, which share the experts, answer as one engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import needle
import pytest

pytest.importorskip("vllm")

import client
from client import Completion, random_prompt
from offline import ENVIRONMENT, compiled_late
from oracle import assert_same_tokens, hf_greedy

from dsv32_plugin.tools.serving import VllmServer
from dsv32_plugin.tools.tiny import TinySpec

pytestmark = [pytest.mark.engine, pytest.mark.gpu(count=2)]

RANKS, STEPS = 2, 24
TIE = 0.02
OPTIONS = [
    *("--served-model-name", "tiny"),
    *("--data-parallel-size", str(RANKS)),
    *("--max-num-seqs", "16"),
    *("--gpu-memory-utilization", "0.1"),
    *("--kv-cache-memory-bytes", str(1 << 30)),
]
START_TIMEOUT_S = 300


@contextmanager
def serve(model: Path, log_path: Path, *options: str) -> Iterator[str]:
    with VllmServer(model, [*OPTIONS, *options], log_path=log_path, env=ENVIRONMENT) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        yield server.url
        server.check_running()
        assert not compiled_late(server.log())


def ask(url: str, prompts: list[list[int]], ranks: range) -> list[list[Completion]]:
    """All prompts at once to each of `ranks`, whose answers come back apart."""
    jobs = [(prompt, {"X-data-parallel-rank": str(rank)}) for rank in ranks for prompt in prompts]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: client.complete(url, job[0], STEPS, headers=job[1]), jobs))
    return [answers[i : i + len(prompts)] for i in range(0, len(answers), len(prompts))]


def test_float32_tokens_equal_hugging_face(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> None:
    model = checkpoint(TinySpec())
    prompts = [random_prompt(length, seed=1) for length in (2, 17, 64, 65, 130, 600)]
    expected = hf_greedy(model, prompts, STEPS)
    options = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "256"]
    with serve(model, tmp_path / "server.log", *options) as url:
        # The second engine has nothing to do at first, and takes part in the experts' exchange all the same.
        answers = [*ask(url, prompts, range(1)), *ask(url, prompts, range(RANKS))]
    for found in answers:
        for answer, truth in zip(found, expected, strict=True):
            assert_same_tokens(answer.tokens, truth, tie=TIE)


def test_needle_with_whole_experts_on_each_rank(tmp_path: Path) -> None:
    needle.write(tmp_path / "model", topk=2048, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=2048, seed=length) for length in (1000, 4096, 4099, 32768)]
    options = ["--dtype", "bfloat16", "--kv-cache-dtype", "fp8", "--max-model-len", "32832", "--enable-expert-parallel"]
    with serve(tmp_path / "model", tmp_path / "server.log", *options) as url:
        answers = ask(url, [haystack.tokens for haystack in haystacks], range(RANKS))
    for rank, found in enumerate(answers):
        for haystack, answer in zip(haystacks, found, strict=True):
            assert answer.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens, rank {rank}"
