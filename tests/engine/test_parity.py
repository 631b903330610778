"""The real server with the plugin says what Hugging Face says, token for token, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import client
import pytest
import torch
from client import Completion, random_prompt
from engines import installed
from oracle import Fault, Greedy, clear_cut, hf_greedy, hf_logprobs
from rounding import mean_error

from dsv32_plugin.tools.tiny import TinySpec

ENGINE = installed()
pytestmark = pytest.mark.engine

STEPS = 32
LENGTHS = (1, 2, 17, 63, 64, 65, 130, 257, 400, 600)
LOGPROB_TOLERANCE = 1e-3
Checkpoints = Callable[[TinySpec], Path]


def ask_together(url: str, truths: Sequence[Greedy]) -> None:
    """The server continues all of their prompts at once as they do."""
    prompts = [truth.prompt for truth in truths]
    for answer, truth in zip(client.complete_together(url, prompts, STEPS, ENGINE.complete), truths, strict=True):
        assert_same(answer, truth)


def assert_same(answer: Completion, truth: Greedy) -> None:
    assert answer.tokens == truth.tokens, f"prompt of {len(truth.prompt)} tokens"
    assert answer.logprobs == pytest.approx(truth.logprobs, abs=LOGPROB_TOLERANCE), (
        f"prompt of {len(truth.prompt)} tokens"
    )


@pytest.fixture(scope="module")
def v32(checkpoint: Checkpoints) -> Path:
    return checkpoint(TinySpec())


@pytest.fixture(scope="module")
def v32_truths(v32: Path) -> list[Greedy]:
    return clear_cut(v32, LENGTHS, STEPS)


@pytest.fixture(scope="module")
def v32_url(v32: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ENGINE.serve(v32, tmp_path_factory.mktemp("v32") / "server.log", *ENGINE.few_pages) as url:
        yield url


def test_concurrent_chunked_and_mixed_batches(v32_url: str, v32_truths: list[Greedy]) -> None:
    ask_together(v32_url, v32_truths)


def test_prefix_cache_hit(v32_url: str, v32_truths: list[Greedy]) -> None:
    ENGINE.complete(v32_url, v32_truths[-1].prompt, 1)
    answer = ENGINE.complete(v32_url, v32_truths[-1].prompt, STEPS)
    assert answer.cached_tokens == 576, "nine whole pages of 600 tokens"
    assert_same(answer, v32_truths[-1])


def test_preemption_and_recomputation(v32_url: str, v32: Path) -> None:
    # Sixteen sequences grow from 2 to 3 pages each: 48 pages, of which 40 exist. The first must still be there when the
    # last, which is prefilled some 30 steps later, has grown, too.
    prompts = [random_prompt(100, seed=1000 + i) for i in range(16)]
    before = ENGINE.preemptions(v32_url, [])
    # SGLang plans with the whole answer of a request that ignores its end, and would let fewer of them start.
    answers = client.complete_together(v32_url, prompts, 64, ENGINE.complete, ignore_eos=False)
    assert ENGINE.preemptions(v32_url, answers) > before
    for answer, truth in zip(answers, hf_greedy(v32, prompts, 64), strict=True):
        assert answer.tokens == truth.tokens


def test_an_answer_does_not_depend_on_its_company(v32_url: str, v32_truths: list[Greedy]) -> None:
    assert ENGINE.complete(v32_url, v32_truths[5].prompt, STEPS).tokens == v32_truths[5].tokens


@pytest.mark.parametrize("fault", Fault)
def test_parity_would_notice(v32: Path, v32_truths: list[Greedy], fault: Fault) -> None:
    long = v32_truths[-2:]
    wrong = hf_greedy(v32, [truth.prompt for truth in long], STEPS, fault=fault)
    assert all(bad.tokens != truth.tokens for bad, truth in zip(wrong, long, strict=True))


def test_two_ranks_block_fp8_weights_and_prefills_under_a_mask(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Together, in chunks and beside decodes, and behind a prefix that the cache has."""
    model = checkpoint(TinySpec(fp8=True))
    truths = clear_cut(model, LENGTHS, STEPS)
    masked = {"DSV32_MASKED_PREFILL": "1"}
    with ENGINE.serve(model, tmp_path / "server.log", *ENGINE.two_ranks, env=masked) as url:
        ask_together(url, truths)
        answer = ENGINE.complete(url, truths[-1].prompt, STEPS)
    assert answer.cached_tokens > 0
    assert_same(answer, truths[-1])


@pytest.mark.wide
def test_bfloat16_with_fp8_caches(v32: Path, tmp_path: Path) -> None:
    """Teacher forced: no further from float32 than a few times what bfloat16 alone costs Hugging Face."""
    prompt = random_prompt(400, seed=1)
    with ENGINE.serve(v32, tmp_path / "server.log", "--dtype", "bfloat16", *ENGINE.fp8_caches) as url:
        served = ENGINE.prompt_logprobs(url, prompt)
    exact = hf_logprobs(v32, prompt)
    plain = hf_logprobs(v32, prompt, dtype=torch.bfloat16)
    assert mean_error(served, exact) < 3 * mean_error(plain, exact)


def test_glm_with_shared_selections(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(replace(TinySpec.glm_defaults(), index_topk_freq=2))
    truths = clear_cut(model, LENGTHS, STEPS)
    with ENGINE.serve(model, tmp_path / "server.log") as url:
        ask_together(url, truths)
        repeated = ENGINE.complete(url, truths[-1].prompt, STEPS)
    assert repeated.cached_tokens > 0
    assert repeated.tokens == truths[-1].tokens
