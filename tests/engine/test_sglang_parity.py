"""The real SGLang server with the plugin says what Hugging Face says, token for token, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sglang")

import client
import torch
from client import generate, random_prompt
from oracle import Greedy, hf_greedy, hf_logprobs
from parity import LOGPROB_TOLERANCE, PROMPTS, STEPS, assert_same, mean_difference

from dsv32_plugin.serving import SglangServer
from dsv32_plugin.tiny import TinySpec

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 300
OPTIONS = [
    "--dtype", "float32",
    "--context-length", "1024",
    # Longer prompts than this are prefilled in chunks, beside the decodes of others.
    "--chunked-prefill-size", "128",
    "--enable-mixed-chunk",
    "--max-running-requests", "16",
    "--skip-server-warmup",
]  # fmt: skip

Checkpoints = Callable[[TinySpec], Path]


@contextmanager
def serve(model: Path, log_path: Path, *options: str) -> Iterator[str]:
    """The server's address; it is proven to run the plugin's model."""
    with SglangServer(model, [*OPTIONS, *options], log_path=log_path) as server:
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
    """40 pages of 64 tokens and little caution, so that concurrent requests must make each other wait."""
    log_path = tmp_path_factory.mktemp("v32") / "server.log"
    with serve(v32, log_path, "--max-total-tokens", "2560", "--schedule-conservativeness", "0.01") as url:
        yield url


def test_concurrent_chunked_and_mixed_batches(v32_url: str, v32_answers: list[Greedy]) -> None:
    assert_same(client.complete_together(v32_url, PROMPTS, STEPS, generate), v32_answers)


def test_radix_cache_hit(v32_url: str, v32_answers: list[Greedy]) -> None:
    generate(v32_url, PROMPTS[-1], 1)
    answer = generate(v32_url, PROMPTS[-1], STEPS)
    assert answer.cached_tokens == 576, "nine whole pages of 600 tokens"
    assert answer.tokens == v32_answers[-1].tokens
    assert answer.logprobs == pytest.approx(v32_answers[-1].logprobs, abs=LOGPROB_TOLERANCE)


def test_retraction_and_recomputation(v32_url: str, v32: Path) -> None:
    # Sixteen sequences grow from 2 to 3 pages each: 48 pages, of which 40 exist.
    prompts = [random_prompt(100, seed=1000 + i) for i in range(16)]
    answers = client.complete_together(v32_url, prompts, 40, generate, ignore_eos=False)
    assert sum(answer.retractions for answer in answers) > 0
    for answer, truth in zip(answers, hf_greedy(v32, prompts, 40), strict=True):
        assert answer.tokens == truth.tokens


def test_an_answer_does_not_depend_on_its_company(v32_url: str, v32_answers: list[Greedy]) -> None:
    assert generate(v32_url, PROMPTS[5], STEPS).tokens == v32_answers[5].tokens


def test_tensor_parallel_2_and_block_fp8_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(TinySpec(fp8=True))
    with serve(model, tmp_path / "server.log", "--tp-size", "2") as url:
        answers = client.complete_together(url, PROMPTS, STEPS, generate)
    assert_same(answers, hf_greedy(model, PROMPTS, STEPS))


def test_bfloat16_with_fp8_caches(v32: Path, tmp_path: Path) -> None:
    """Teacher forced: no further from float32 than a few times what bfloat16 alone costs Hugging Face."""
    prompt = random_prompt(400, seed=1)
    options = ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e4m3", "--page-size", "16")
    with serve(v32, tmp_path / "server.log", *options) as url:
        served = client.input_logprobs(url, prompt)
    exact = hf_logprobs(v32, prompt)
    plain = hf_logprobs(v32, prompt, dtype=torch.bfloat16)
    assert mean_difference(served, exact) < 3 * mean_difference(plain, exact)


def test_glm_with_shared_selections(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(replace(TinySpec.glm_defaults(), index_topk_freq=2))
    with serve(model, tmp_path / "server.log") as url:
        answers = client.complete_together(url, PROMPTS, STEPS, generate)
        repeated = generate(url, PROMPTS[-1], STEPS)
    expected = hf_greedy(model, PROMPTS, STEPS)
    assert_same(answers, expected)
    assert repeated.cached_tokens > 0
    assert repeated.tokens == expected[-1].tokens
