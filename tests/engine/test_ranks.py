"""Two ranks give the tokens of Hugging Face, however the work is cut between them, past 2048 tokens of context.

In float32 on a CPU, through gloo. Prompts come together, so that ranks with attention of their own have batches of
other kinds and lengths than each other, and then alone, so that all but one are idle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import client
import drafts
import pytest
import torch
from client import random_prompt
from engines import installed
from oracle import Greedy, clear_cut, hf_greedy

from dsv32_plugin.tools.tiny import TinySpec

ENGINE = installed()
pytestmark = pytest.mark.engine

STEPS = 24
LENGTHS = (2300, 1, 65, 130, 400, 2100, 17)
CONTEXT = {"vllm": "--max-model-len", "sglang": "--context-length"}
DATA_AND_EXPERTS = ("--data-parallel-size", "2", "--enable-expert-parallel")
CUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sglang": {
        "attention-and-head": (
            *("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
            *("--enable-dp-lm-head", "--moe-dense-tp-size", "1", "--ep-size", "2"),
        ),
        "experts": ("--tp-size", "2", "--ep-size", "2"),
        "stages": ("--pp-size", "2"),
    },
    "vllm": {
        "experts": ("--tensor-parallel-size", "2", "--enable-expert-parallel"),
        "data-and-experts": DATA_AND_EXPERTS,
    },
}
"""Engine -> what is cut -> its options."""
DRAFTING = {
    "sglang": (
        *("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
        *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
        *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
    ),
    "vllm": (*DATA_AND_EXPERTS, "--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}'),
}
"""Data-parallel attention with drafts."""
Checkpoints = Callable[[TinySpec], Path]


needs_gpu = pytest.mark.skipif(
    ENGINE.name == "vllm" and not torch.cuda.is_available(), reason="vLLM has expert parallelism on GPUs only"
)


def without_stages() -> bool:
    """Whether this vLLM has no pipelines without a GPU: with compilation off it leaves out what makes their buffers."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    return "CompilationMode.NONE" in inspect.getsource(CPUModelRunner.warming_up_model)


def ask(url: str, truths: list[Greedy], steps: int = STEPS) -> None:
    together = client.complete_together(url, [truth.prompt for truth in truths], steps, ENGINE.complete)
    alone = [ENGINE.complete(url, truths[i].prompt, steps) for i in (0, 3)]
    for answer, truth in zip([*together, *alone], [*truths, truths[0], truths[3]], strict=True):
        assert answer.tokens == truth.tokens, f"prompt of {len(truth.prompt)} tokens"


@pytest.fixture(scope="module")
def truths(checkpoint: Checkpoints) -> list[Greedy]:
    return clear_cut(checkpoint(TinySpec()), LENGTHS, STEPS)


@pytest.mark.wide
@needs_gpu
@pytest.mark.parametrize("cut", CUTS[ENGINE.name])
def test_the_tokens_are_the_same(checkpoint: Checkpoints, truths: list[Greedy], tmp_path: Path, cut: str) -> None:
    context = (CONTEXT[ENGINE.name], "4096")
    options = CUTS[ENGINE.name][cut]
    with ENGINE.serve(checkpoint(TinySpec()), tmp_path / "server.log", *context, *options) as url:
        ask(url, truths)


@needs_gpu
def test_drafts_change_no_token(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = drafts.half_right(checkpoint(drafts.SPEC), tmp_path / "model")
    prompts = [random_prompt(length, seed=1) for length in LENGTHS]
    options = (CONTEXT[ENGINE.name], "4096", *DRAFTING[ENGINE.name])
    with ENGINE.serve(model, tmp_path / "server.log", *options) as url:
        ask(url, hf_greedy(model, prompts, STEPS))


@pytest.mark.skipif(ENGINE.name == "sglang", reason="a test of the guard says that it is refused there")
def test_a_selection_crosses_a_border_between_stages(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Of four layers the last three share the first one's selection, two of them on the second rank."""
    if without_stages():
        pytest.skip("this vLLM has no pipelines without a GPU")
    model = checkpoint(replace(TinySpec.glm_defaults(), index_topk_pattern="FSSS"))
    found = clear_cut(model, LENGTHS, STEPS)
    with ENGINE.serve(
        model, tmp_path / "server.log", "--max-model-len", "4096", "--pipeline-parallel-size", "2"
    ) as url:
        ask(url, found)
