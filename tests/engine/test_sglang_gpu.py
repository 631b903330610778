"""SGLang with the plugin on a GPU: what `test_sglang_parity.py` shows on a CPU, with the kernels and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("sglang")

import client
import torch
from client import generate, random_prompt
from oracle import hf_greedy, hf_logprobs
from parity import PROMPTS, STEPS, assert_same, mean_difference

from dsv32_plugin.serving import SglangServer
from dsv32_plugin.tiny import TinySpec

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

START_TIMEOUT_S = 300
OPTIONS = [
    "--context-length", "1024",
    "--chunked-prefill-size", "128",
    "--enable-mixed-chunk",
    "--max-running-requests", "16",
    "--max-total-tokens", "65536",
    "--mem-fraction-static", "0.5",
    "--sampling-backend", "pytorch",
    "--skip-server-warmup",
]  # fmt: skip

Checkpoints = Callable[[TinySpec], Path]


@contextmanager
def serve(model: Path, log_path: Path, *options: str) -> Iterator[str]:
    with SglangServer(model, [*OPTIONS, *options], log_path=log_path) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        assert "dsv32: serving" in server.log()
        yield server.url
        server.check_running()


@pytest.mark.parametrize("options", [(), ("--disable-cuda-graph",)], ids=["graphs", "eager"])
def test_float32_is_hugging_face(checkpoint: Checkpoints, tmp_path: Path, options: tuple[str, ...]) -> None:
    model = checkpoint(TinySpec())
    with serve(model, tmp_path / "server.log", "--dtype", "float32", *options) as url:
        answers = client.complete_together(url, PROMPTS, STEPS, generate)
        repeated = generate(url, PROMPTS[-1], STEPS)
    assert_same(answers, hf_greedy(model, PROMPTS, STEPS))
    assert repeated.cached_tokens == 576
    assert repeated.tokens == answers[-1].tokens


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("fp8", [False, True], ids=["plain-weights", "fp8-weights"])
def test_bfloat16_is_near(checkpoint: Checkpoints, tmp_path: Path, cache: str, fp8: bool) -> None:
    """Teacher forced: no further from float32 than a few times what bfloat16 alone costs Hugging Face."""
    model = checkpoint(TinySpec(fp8=fp8, dtype="bfloat16"))
    prompt = random_prompt(400, seed=1)
    with serve(model, tmp_path / "server.log", "--dtype", "bfloat16", "--kv-cache-dtype", cache) as url:
        served = client.input_logprobs(url, prompt)
        assert len(generate(url, prompt, STEPS).tokens) == STEPS
    exact = hf_logprobs(model, prompt)
    plain = hf_logprobs(model, prompt, dtype=torch.bfloat16)
    assert mean_difference(served, exact) < 3 * mean_difference(plain, exact)
