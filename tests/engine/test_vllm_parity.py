"""The real `vllm serve` with the plugin says what Hugging Face says, token for token, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import client
import torch
from client import random_prompt
from oracle import Fault, Greedy, hf_greedy, hf_logprobs
from parity import LOGPROB_TOLERANCE, PROMPTS, STEPS, assert_same, mean_difference

from dsv32_plugin.serving import VllmServer
from dsv32_plugin.tiny import TinySpec

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 300
OPTIONS = [
    "--served-model-name", "tiny",
    "--dtype", "float32",
    "--max-model-len", "1024",
    # Longer prompts than this are prefilled in chunks, beside the decodes of others.
    "--max-num-batched-tokens", "128",
    "--max-num-seqs", "16",
    "--kv-cache-memory-bytes", "268435456",
    "--enable-prompt-tokens-details",
]  # fmt: skip

Checkpoints = Callable[[TinySpec], Path]


@contextmanager
def serve(model: Path, log_path: Path, *options: str) -> Iterator[str]:
    """The server's address; it is proven to run the plugin's model."""
    with VllmServer(model, [*OPTIONS, *options], log_path=log_path) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        assert "dsv32: serving" in server.log()
        yield server.url
        server.check_running()


@pytest.fixture(scope="module")
def v32(checkpoint: Checkpoints) -> Path:
    return checkpoint(TinySpec())


@pytest.fixture(scope="module")
def v32_answers(v32: Path) -> list[Greedy]:
    return hf_greedy(v32, PROMPTS, STEPS)


@pytest.fixture(scope="module")
def v32_url(v32: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """40 pages of 64 tokens, so that concurrent requests must preempt each other."""
    log_path = tmp_path_factory.mktemp("v32") / "server.log"
    with serve(v32, log_path, "--num-gpu-blocks-override", "40") as url:
        yield url


def test_concurrent_chunked_and_mixed_batches(v32_url: str, v32_answers: list[Greedy]) -> None:
    assert_same(client.complete_together(v32_url, PROMPTS, STEPS), v32_answers)


def test_prefix_cache_hit(v32_url: str, v32_answers: list[Greedy]) -> None:
    client.complete(v32_url, PROMPTS[-1], 1)
    answer = client.complete(v32_url, PROMPTS[-1], STEPS)
    assert answer.cached_tokens == 576, "nine whole pages of 600 tokens"
    assert answer.tokens == v32_answers[-1].tokens
    assert answer.logprobs == pytest.approx(v32_answers[-1].logprobs, abs=LOGPROB_TOLERANCE)


def test_preemption_and_recomputation(v32_url: str, v32: Path) -> None:
    # Eight sequences grow from 6 to 8 pages each: 64 pages, of which 39 exist.
    prompts = [random_prompt(370, seed=1000 + i) for i in range(8)]
    before = client.metric(v32_url, "vllm:num_preemptions_total")
    answers = client.complete_together(v32_url, prompts, 80)
    assert client.metric(v32_url, "vllm:num_preemptions_total") > before
    for answer, truth in zip(answers, hf_greedy(v32, prompts, 80), strict=True):
        assert answer.tokens == truth.tokens


def test_an_answer_does_not_depend_on_its_company(v32_url: str, v32_answers: list[Greedy]) -> None:
    assert client.complete(v32_url, PROMPTS[5], STEPS).tokens == v32_answers[5].tokens


@pytest.mark.parametrize("fault", Fault)
def test_parity_would_notice(v32: Path, v32_answers: list[Greedy], fault: Fault) -> None:
    wrong = hf_greedy(v32, PROMPTS[-2:], STEPS, fault=fault)
    assert all(bad.tokens != truth.tokens for bad, truth in zip(wrong, v32_answers[-2:], strict=True))


def test_tensor_parallel_2_and_block_fp8_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(TinySpec(fp8=True))
    with serve(model, tmp_path / "server.log", "--tensor-parallel-size", "2") as url:
        answers = client.complete_together(url, PROMPTS, STEPS)
    assert_same(answers, hf_greedy(model, PROMPTS, STEPS))


def test_bfloat16_with_fp8_caches(v32: Path, tmp_path: Path) -> None:
    """Teacher forced: no further from float32 than a few times what bfloat16 alone costs Hugging Face."""
    prompt = random_prompt(400, seed=1)
    with serve(v32, tmp_path / "server.log", "--dtype", "bfloat16", "--kv-cache-dtype", "fp8") as url:
        served = client.prompt_logprobs(url, prompt)
    exact = hf_logprobs(v32, prompt)
    plain = hf_logprobs(v32, prompt, dtype=torch.bfloat16)
    assert mean_difference(served, exact) < 3 * mean_difference(plain, exact)


def test_glm_with_shared_selections(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(replace(TinySpec.glm_defaults(), index_topk_freq=2))
    with serve(model, tmp_path / "server.log") as url:
        answers = client.complete_together(url, PROMPTS, STEPS)
        repeated = client.complete(url, PROMPTS[-1], STEPS)
    expected = hf_greedy(model, PROMPTS, STEPS)
    assert_same(answers, expected)
    assert repeated.cached_tokens > 0
    assert repeated.tokens == expected[-1].tokens
