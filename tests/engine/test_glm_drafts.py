"""GLM-5.2's draft layer as it is published: without embedding and head, and with a selection for all of its steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import client
import pytest
from checkpoints import edit_config, edit_weight
from drafts import PROMPTS
from engines import installed
from oracle import hf_greedy

from dsv32_plugin.core import checkpoint as stored
from dsv32_plugin.tools.tiny import TinySpec

ENGINE = installed()
pytestmark = pytest.mark.engine

SPEC = replace(TinySpec.glm_defaults(), num_hidden_layers=4, index_topk_pattern="FFSF", mtp=True)
STEPS = 16
DRAFTS = {
    "vllm": ("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 3})),
    "sglang": (
        *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
        *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
    ),
}


def test_the_tokens_are_the_same(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint(SPEC), tmp_path / "model"))
    edit_config(model, index_share_for_mtp_iteration=True, moe_router_dtype="float32")
    for end in stored.SHARED_WITH_TARGET:
        edit_weight(model, f"model.layers.{SPEC.num_hidden_layers}{end}", lambda weight: {})
    with ENGINE.serve(model, tmp_path / "server.log", *DRAFTS[ENGINE.name]) as url:
        answers = client.complete_together(url, PROMPTS, STEPS, ENGINE.complete)
    for answer, truth in zip(answers, hf_greedy(model, PROMPTS, STEPS), strict=True):
        assert answer.tokens == truth.tokens, f"prompt of {len(truth.prompt)} tokens"
