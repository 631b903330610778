"""Checkpoints to damage, and what each damage must make an engine say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv32_plugin.tools.tiny import TinySpec

Build = Callable[..., torch.nn.Module]
"""`build(model, **options)` does what a process of the engine does up to the loaded weights."""
SPEC = TinySpec(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8)

BAD_CONFIGS = [
    pytest.param({"index_topk": 0}, "index_topk: expected an integer of at least 1, got 0", id="topk-0"),
    pytest.param({"index_topk": -5}, "index_topk: expected an integer of at least 1, got -5", id="topk-negative"),
    pytest.param({"index_topk": 8192}, "index_topk: expected an integer of at most 4096, got 8192", id="topk-8192"),
    pytest.param({"n_routed_experts": None}, "n_routed_experts: expected a value, got nothing", id="missing-key"),
    pytest.param({"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid', got 'softmax'", id="variant"),
    pytest.param({"index_topk_pattern": "SF"}, "index_topk_pattern: expected a first layer that selects", id="share"),
    pytest.param({"tie_word_embeddings": True}, "tie_word_embeddings: expected false, got True", id="tied"),
]
"""Changes of config.json, and the error."""

BAD_WEIGHTS = [
    pytest.param(
        "model.layers.1.self_attn.indexer.wk.weight",
        lambda weight: {},
        "1 weights are missing, among them model.layers.1.self_attn.indexer.wk.weight",
        id="missing",
    ),
    pytest.param(
        "model.layers.1.mlp.experts.3.down_proj.weight",
        lambda weight: {},
        "1 weights are missing, among them model.layers.1.mlp.experts.3.down_proj.weight",
        id="missing-expert",
    ),
    pytest.param(
        "model.norm.weight",
        lambda weight: {"model.norm.weight": weight, "model.norm.bias": weight.clone()},
        "model.norm.bias is not a weight of DeepseekV32ForCausalLM",
        id="unknown",
    ),
    pytest.param(
        "model.layers.0.self_attn.kv_b_proj.weight",
        lambda weight: {"model.layers.0.self_attn.kv_b_proj.weight": weight[:, :100].contiguous()},
        "model.layers.0.self_attn.kv_b_proj.weight (512, 100) does not fit the sizes in config.json",
        id="wrong-shape",
    ),
]
"""A tensor, what takes its place, and the error."""


def edit_config(model: Path, **changes: Any) -> None:
    """Set keys of config.json, or remove those given as None."""
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weight(model: Path, name: str, change: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Replace one tensor of the checkpoint by those that `change` makes of it."""
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"].pop(name)
    tensors = load_file(model / shard)
    made = change(tensors.pop(name))
    save_file({**tensors, **made}, model / shard)
    content["weight_map"].update(dict.fromkeys(made, shard))
    index.write_text(json.dumps(content))
