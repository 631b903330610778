"""Multi-token prediction in SGLang changes how many tokens a step gives, never which; on a CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("sglang")

import client
import httpx
import needle
import torch
from chats import exactly
from client import generate, random_prompt
from drafts import PROMPTS, SPEC, STEPS, half_right
from oracle import hf_greedy

from dsv32_plugin.tools.demo import TRAINED
from dsv32_plugin.tools.serving import SglangServer
from dsv32_plugin.tools.tiny import TinySpec
from dsv32_plugin.training import tasks
from dsv32_plugin.training.tokenizer import decode, encode

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 600
TOPK = 64
OPTIONS = [
    "--chunked-prefill-size", "512",
    # Has no effect with drafts.
    "--enable-mixed-chunk",
    "--max-running-requests", "16",
    "--max-total-tokens", "32768",
    "--skip-server-warmup",
    "--speculative-algorithm", "EAGLE",
]  # fmt: skip
ON_GPU = ["--mem-fraction-static", "0.5", "--sampling-backend", "pytorch"] if torch.cuda.is_available() else []
"""On a GPU, several servers at once, and no compilation of FlashInfer's sampler."""


@contextmanager
def serve(model: Path, log_path: Path, drafts: int, *options: str) -> Iterator[str]:
    """The address of a server that drafts so many tokens; it is proven to run the plugin's models."""
    chain = ["--speculative-num-steps", str(drafts), "--speculative-eagle-topk", "1"]
    chain += ["--speculative-num-draft-tokens", str(drafts + 1)]
    with SglangServer(model, [*OPTIONS, *ON_GPU, *chain, *options], log_path=log_path) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        assert "dsv32: serving" in server.log()
        assert "dsv32: drafting" in server.log()
        yield server.url
        server.check_running()


def forced_text(url: str, text: str) -> str:
    """What the model says where a grammar leaves it no choice."""
    sampling = {"max_new_tokens": 100, "temperature": 0, "ebnf": exactly(text)}
    body = {"input_ids": PROMPTS[1], "sampling_params": sampling}
    answer = httpx.post(f"{url}/generate", json=body, timeout=client.TIMEOUT_S)
    assert answer.status_code == httpx.codes.OK, answer.text
    said: str = answer.json()["text"]
    return said


def test_the_tokens_are_the_same(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> None:
    """Together, then alone with a radix-cache hit, whose draft layer must find its keys, too, and up to the end.

    SGLang keeps the room of one verdict free at the end of the context. Last, sixteen sequences grow from 2 to 3 pages
    each, of which 40 exist, so that some are retracted.
    """
    half_right_model, drafts = half_right(checkpoint(SPEC), tmp_path / "model"), 3
    to_the_end = 512 - len(PROMPTS[-1]) - (drafts + 1)
    options = ["--dtype", "float32", "--context-length", "512"]
    options += ["--max-total-tokens", "2560", "--schedule-conservativeness", "0.01"]
    crowd = [random_prompt(100, seed=1000 + i) for i in range(16)]
    with serve(half_right_model, tmp_path / "server.log", drafts, *options) as url:
        together = client.complete_together(url, PROMPTS, STEPS, generate)
        # With top_p near 0 sampling has one outcome. On a GPU it is SGLang's own, which it compiles for a minute.
        sampling = {} if torch.cuda.is_available() else {"temperature": 1.0, "top_p": 1e-6}
        sampled = generate(url, PROMPTS[3], STEPS, **sampling)
        again = generate(url, PROMPTS[-1], to_the_end)
        crowded = client.complete_together(url, crowd, 40, generate)
        forced = forced_text(url, "A grammar accepts no draft that it does not allow.")
    truths = hf_greedy(half_right_model, PROMPTS, STEPS)
    for prompt, answer, truth in zip(PROMPTS, together, truths, strict=True):
        assert answer.tokens == truth.tokens, f"prompt of {len(prompt)} tokens"
        assert answer.logprobs == pytest.approx(truth.logprobs, abs=1e-3)
    assert sampled.tokens == truths[3].tokens
    assert again.cached_tokens == 384
    assert again.tokens == hf_greedy(half_right_model, PROMPTS[-1:], to_the_end)[0].tokens
    assert sum(answer.retractions for answer in crowded) > 0
    for answer, truth in zip(crowded, hf_greedy(half_right_model, crowd, 40), strict=True):
        assert answer.tokens == truth.tokens
    assert forced == "A grammar accepts no draft that it does not allow."
    accepted, drafted = (sum(getattr(answer, name) for answer in together) for name in ("accepted", "drafted"))
    assert 0.1 < accepted / drafted < 0.9, "both outcomes must have been met"


VARIANTS = {
    "float32": ("--dtype", "float32"),
    "fp8-cache": ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e4m3"),
    "eager": ("--dtype", "float32", "--disable-cuda-graph"),
}


@pytest.mark.parametrize("name", VARIANTS if torch.cuda.is_available() else ["fp8-cache"])
def test_every_draft_of_a_needle_is_right(tmp_path: Path, name: str) -> None:
    """They are if the draft layer selects exactly the right keys; in chunks, alone, and then batched."""
    model = tmp_path / "model"
    needle.write(model, topk=TOPK, mtp=True)
    sparse = [needle.prompt(length, topk=TOPK, seed=length) for length in (95, 129, 300, 1000, 2000)]
    dense = [needle.prompt(length, topk=TOPK, seed=length) for length in (28, 32)]
    with serve(model, tmp_path / "server.log", 3, "--context-length", "2200", *VARIANTS[name]) as url:
        alone = [generate(url, haystack.tokens, STEPS) for haystack in sparse]
        together = client.complete_together(url, [haystack.tokens for haystack in sparse + dense], STEPS, generate)
    for haystack, answer in zip(sparse + sparse + dense, alone + together, strict=True):
        assert answer.tokens == haystack.answers(STEPS), f"{len(haystack.tokens)} tokens"
    for answer in alone:
        # The first token comes with the prompt; the last verdict may hold more than was asked for.
        assert answer.drafted > 0
        assert answer.drafted - answer.accepted <= 3


@pytest.mark.wide
def test_nearly_every_draft_of_the_trained_model_is_accepted(tmp_path: Path) -> None:
    random = Random("served")
    asked = [tasks.needles_of(random, random.randint(200, 1500), 1).cut(0) for _ in range(6)]
    with serve(TRAINED, tmp_path / "server.log", 1, "--dtype", "float32", "--context-length", "4096") as url:
        answers = [generate(url, encode(prompt), 60, ignore_eos=False) for prompt, _ in asked]
    right = [decode(answer.tokens) == text for answer, (_, text) in zip(answers, asked, strict=True)]
    assert sum(right) >= len(asked) - 1
    accepted, drafted = (sum(getattr(answer, name) for answer in answers) for name in ("accepted", "drafted"))
    assert accepted / drafted > 0.9
