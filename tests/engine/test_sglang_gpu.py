"""The real SGLang server with the plugin on a GPU: its kernels, CUDA graphs, fp8 caches, overlapped schedule.

What is asked and how it is judged is as for vLLM, in `gpu/`. Every server here has also compiled its kernels before it
was ready.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("sglang")

import client
import httpx
import needle
import torch
from client import generate, random_prompt
from judge import Errors, Judge, assert_near
from oracle import assert_same_tokens, hf_greedy
from rounding import MARGIN, Rounding

from dsv32_plugin.benchmarks import serve as bench
from dsv32_plugin.tools.serving import SglangServer
from dsv32_plugin.tools.tiny import TinySpec

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.engine, pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no GPU")]

START_TIMEOUT_S = 300
OPTIONS = [
    "--context-length", "5120",
    # Longer prompts than this are prefilled in chunks, beside the decodes of others.
    "--chunked-prefill-size", "1024",
    "--enable-mixed-chunk",
    "--max-running-requests", "16",
    "--max-total-tokens", "65536",
    "--mem-fraction-static", "0.9",
    "--skip-server-warmup",
]  # fmt: skip
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # `python -m` in a checkout would import the checkout's folder, not the installed package.
    "PYTHONSAFEPATH": "1",
    # Compile the fp8 matrix products that are used, when they are; all there are would take minutes.
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
    # Other tests may use the GPUs, too.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}
LENGTHS = (2, 17, 64, 65, 130, 600, 2100, 4000)
PROMPTS = [random_prompt(length, seed=1) for length in LENGTHS]
SEEDS = 4
JUDGED = [random_prompt(length, seed=SEEDS * length + seed) for length in LENGTHS for seed in range(SEEDS)]
"""Of eight prompts alone the mean error is chance: one of them may double it."""
STEPS = 24
FLOAT32_MARGIN = 0.01
"""Of a float32 model. Experts in TF32 or stored as float16, with 10 bits of mantissa, are at 0.03 to 0.06."""
FLOAT32_TIE = 0.02
Checkpoints = Callable[[TinySpec], Path]


@contextmanager
def serve(model: Path, log_path: Path, *options: str) -> Iterator[str]:
    """The server's address; it runs the plugin's model, and compiled nothing of it after the warm-up."""
    with SglangServer(model, [*OPTIONS, *options], log_path=log_path, env=ENVIRONMENT) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        assert "dsv32: serving" in server.log()
        yield server.url
        server.check_running()
        log = server.log()
    assert "was not ready" not in log, [line for line in log.splitlines() if "was not ready" in line]


def forget_prefixes(url: str) -> None:
    assert httpx.post(f"{url}/flush_cache", timeout=client.TIMEOUT_S).status_code == httpx.codes.OK


INDEX = Rounding(index=True)


@dataclass(frozen=True)
class Variant:
    """Server options, and what Hugging Face rounds so that its error is a fair measure."""

    options: tuple[str, ...]
    rounding: Rounding = INDEX
    spec: TinySpec = field(default_factory=TinySpec)
    margin: float = MARGIN


BFLOAT16 = ("--dtype", "bfloat16")
FP8_CACHE = (*BFLOAT16, "--kv-cache-dtype", "fp8_e4m3")
CACHE = Rounding(index=True, latents=True)
VARIANTS = {
    "bf16-graphs": Variant(BFLOAT16),
    "bf16-eager": Variant((*BFLOAT16, "--disable-cuda-graph")),
    "bf16-topk-2048": Variant(BFLOAT16, spec=TinySpec(index_topk=2048)),
    "fp8-cache-graphs": Variant(FP8_CACHE, CACHE),
    "fp8-weights": Variant(FP8_CACHE, Rounding(index=True, latents=True, activations=True), TinySpec(fp8=True)),
    "fp32-graphs": Variant(("--dtype", "float32"), margin=FLOAT32_MARGIN),
    "glm": Variant(BFLOAT16, spec=TinySpec.glm_defaults()),
}


def errors(url: str, judge: Judge) -> dict[str, Errors]:
    """Every way to the same answers: prefill alone and batched, decode alone and batched, from a cached prefix."""
    alone = [client.input_logprobs(url, prompt) for prompt in JUDGED]
    found = {"prefill alone": judge.errors_of_prompts(alone)}
    forget_prefixes(url)
    batched = client.complete_together(url, JUDGED, STEPS, generate)
    found["chunks and decodes mixed"] = judge.errors_of_answers(batched)
    hits = [generate(url, prompt, STEPS) for prompt in JUDGED]
    assert [answer.cached_tokens for answer in hits] == [(len(prompt) - 1) // 64 * 64 for prompt in JUDGED]
    found["decode alone, prefix hit"] = judge.errors_of_answers(hits)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_error_against_float32(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    variant = VARIANTS[name]
    model = checkpoint(variant.spec)
    with serve(model, tmp_path / "server.log", *variant.options) as url:
        found = errors(url, Judge(model, JUDGED, variant.rounding))
    assert_near(found, variant.margin, engine="sglang", variant=name)


@pytest.mark.parametrize("options", [(), ("--disable-cuda-graph",)], ids=["graphs", "eager"])
def test_float32_tokens_equal_hugging_face(checkpoint: Checkpoints, tmp_path: Path, options: tuple[str, ...]) -> None:
    model = checkpoint(TinySpec())
    prompts = PROMPTS[:6]
    float32 = ("--dtype", "float32", "--chunked-prefill-size", "128")
    with serve(model, tmp_path / "server.log", *float32, *options) as url:
        answers = client.complete_together(url, prompts, STEPS, generate)
    for answer, truth in zip(answers, hf_greedy(model, prompts, STEPS), strict=True):
        assert_same_tokens(answer.tokens, truth, tie=FLOAT32_TIE)


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
def test_needle_in_long_contexts(tmp_path: Path, cache: str) -> None:
    """The first prompt selects every key; a decoy then answers, because attention prefers it."""
    needle.write(tmp_path / "model", topk=2048, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=2048, seed=length) for length in (1000, 4096, 32768, 131072)]
    options = ("--context-length", "131136", "--chunked-prefill-size", "8192", "--max-total-tokens", "400000")
    prompts = [haystack.tokens for haystack in haystacks]
    with serve(tmp_path / "model", tmp_path / "server.log", *BFLOAT16, "--kv-cache-dtype", cache, *options) as url:
        ways = {"alone": [generate(url, prompt, 12) for prompt in prompts]}
        ways["prefix hits"] = client.complete_together(url, prompts, 12, generate)
        forget_prefixes(url)
        ways["together"] = client.complete_together(url, prompts, 12, generate)
    assert all(answer.cached_tokens > 0 for answer in ways["prefix hits"])
    for way, answers in ways.items():
        for haystack, answer in zip(haystacks, answers, strict=True):
            assert answer.tokens == haystack.answers(12), f"{len(haystack.tokens)} tokens, {way}"


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
def test_an_answer_does_not_depend_on_its_company(checkpoint: Checkpoints, tmp_path: Path, cache: str) -> None:
    """Bit for bit, with `--enable-deterministic-inference`, also from a cached prefix."""
    options = (*BFLOAT16, "--kv-cache-dtype", cache, "--enable-deterministic-inference")
    with serve(checkpoint(TinySpec()), tmp_path / "server.log", *options) as url:
        alone = [generate(url, prompt, STEPS) for prompt in PROMPTS]
        for seed in range(4):
            forget_prefixes(url)
            order = random.Random(seed).sample(range(len(PROMPTS)), len(PROMPTS))
            strangers = [random_prompt(length, seed=100 + seed) for length in (3, 90, 700)]
            batch = [*strangers, *(PROMPTS[i] for i in order)]
            answers = client.complete_together(url, batch, STEPS, generate)[len(strangers) :]
            for i, answer in zip(order, answers, strict=True):
                assert_identical(answer, alone[i], f"prompt of {LENGTHS[i]} tokens, batch {seed}")
        hits = client.complete_together(url, PROMPTS, STEPS, generate)
    assert all(answer.cached_tokens for answer in hits[-3:])
    for length, answer, first in zip(LENGTHS, hits, alone, strict=True):
        assert_identical(answer, first, f"prompt of {length} tokens, cached prefix")


def assert_identical(answer: client.Completion, expected: client.Completion, what: str) -> None:
    assert answer.tokens == expected.tokens, what
    assert answer.logprobs == expected.logprobs, what


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
def test_real_sizes(tmp_path: Path, cache: str) -> None:
    """DeepSeek-V3.2's, with 2 layers and dummy weights: every kernel is ready, and every probability finite."""
    bench.write_model(tmp_path / "model", bench.Plan(engine="sglang", experts=16), "plugin", layers=2)
    prompts = [random_prompt(length, seed=length) for length in (1, 700, 2048, 3000, 9000)]
    options = ("--load-format", "dummy", "--context-length", "16384", "--chunked-prefill-size", "4096")
    with serve(tmp_path / "model", tmp_path / "server.log", *BFLOAT16, "--kv-cache-dtype", cache, *options) as url:
        answers = client.complete_together(url, prompts, STEPS, generate)
    for answer in answers:
        assert len(answer.logprobs) == STEPS
        assert all(map(math.isfinite, answer.logprobs))


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
def test_two_ranks_answer_as_one_does(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(TinySpec())
    prompts = PROMPTS[:6]
    float32 = ("--dtype", "float32", "--chunked-prefill-size", "128", "--tp-size", "2")
    with serve(model, tmp_path / "server.log", *float32) as url:
        answers = client.complete_together(url, prompts, STEPS, generate)
    for answer, truth in zip(answers, hf_greedy(model, prompts, STEPS), strict=True):
        assert_same_tokens(answer.tokens, truth, tie=FLOAT32_TIE)


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
def test_two_ranks_find_the_needle(tmp_path: Path) -> None:
    """Prefills are shared out between the ranks."""
    needle.write(tmp_path / "model", topk=2048, dtype="bfloat16")
    haystacks = [needle.prompt(length, topk=2048, seed=length) for length in (1000, 4096, 4099, 32768)]
    options = ("--context-length", "32832", "--chunked-prefill-size", "8192", "--tp-size", "2")
    with serve(tmp_path / "model", tmp_path / "server.log", *FP8_CACHE, *options) as url:
        answers = client.complete_together(url, [haystack.tokens for haystack in haystacks], 12, generate)
    for haystack, answer in zip(haystacks, answers, strict=True):
        assert answer.tokens == haystack.answers(12), f"{len(haystack.tokens)} tokens"
