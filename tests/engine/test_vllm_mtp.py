"""Multi-token prediction changes how many tokens a step gives, never which."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import client
from drafts import PROMPTS, SPEC, STEPS, half_right
from oracle import hf_greedy

from dsv32_plugin.tools.serving import VllmServer
from dsv32_plugin.tools.tiny import TinySpec

pytestmark = pytest.mark.engine

OPTIONS = [
    "--served-model-name", "tiny",
    "--dtype", "float32",
    "--max-model-len", "512",
    "--max-num-batched-tokens", "128",
    "--max-num-seqs", "8",
    "--kv-cache-memory-bytes", "134217728",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[TinySpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_right(checkpoint(SPEC), tmp_path_factory.mktemp("mtp") / "model")


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    speculative = {"method": "mtp", "num_speculative_tokens": 3}
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    options = [*OPTIONS, "--speculative-config", json.dumps(speculative)]
    with VllmServer(model, options, log_path=log_path) as server:
        server.wait_until_ready(300)
        yield server.url
        server.check_running()


def test_the_tokens_are_the_same(url: str, model: Path) -> None:
    answers = client.complete_together(url, PROMPTS, STEPS)
    for prompt, answer, truth in zip(PROMPTS, answers, hf_greedy(model, PROMPTS, STEPS), strict=True):
        assert answer.tokens == truth.tokens, f"prompt of {len(prompt)} tokens"
    drafted = client.metric(url, "vllm:spec_decode_num_draft_tokens_total")
    accepted = client.metric(url, "vllm:spec_decode_num_accepted_tokens_total")
    assert 0.1 < accepted / drafted < 0.9, "both outcomes must have been met"
