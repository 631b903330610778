"""Multi-token prediction changes how many tokens a step gives, never which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import client
import torch
from client import random_prompt
from oracle import hf_greedy
from safetensors.torch import load_file, save_file

from dsv32_plugin.serving import VllmServer
from dsv32_plugin.tiny import TinySpec

pytestmark = pytest.mark.engine

STEPS = 32
PROMPTS = [random_prompt(length, seed=1) for length in (1, 3, 17, 64, 65, 130, 400)]
SPEC = TinySpec(num_hidden_layers=2, mtp=True)
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
    """A checkpoint whose draft layer guesses right about half of the time.

    Blocks add little, so the next token depends mostly on the current one, and the draft layer looks at it alone.
    """
    out = tmp_path_factory.mktemp("mtp") / "model"
    shutil.copytree(checkpoint(SPEC), out)
    draft = f"model.layers.{SPEC.num_hidden_layers}"
    shards = {path: load_file(path) for path in out.glob("*.safetensors")}
    norm = next(tensors["model.norm.weight"] for tensors in shards.values() if "model.norm.weight" in tensors)
    for path, tensors in shards.items():
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor *= 0 if name.startswith(draft) else 0.12
            elif name == f"{draft}.eh_proj.weight":
                tensor.copy_(torch.eye(*tensor.shape))
            elif name == f"{draft}.enorm.weight":
                tensor.fill_(1)
            elif name == f"{draft}.shared_head.norm.weight":
                tensor.copy_(norm)
        save_file(tensors, path, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module", params=[1, 3], ids=["1-drafted", "3-drafted"])
def url(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    speculative = {"method": "mtp", "num_speculative_tokens": request.param}
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
