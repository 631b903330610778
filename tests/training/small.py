"""A model of the full architecture that a CPU trains in seconds."""

from __future__ import annotations

from typing import Any

import torch

from dsv32_plugin.training.model import DsaModel, Experts, initialise
from dsv32_plugin.training.recipe import Recipe, Stage

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 2048,
}
STAGES = (
    Stage("dense", ((64, 2), (128, 2)), 256, 0.02, 3e-3, warmup_steps=2),
    Stage("warmup", ((128, 3),), 256, 0.0, 2e-3, warmup_steps=1, probes=16),
    Stage("sparse", ((128, 2),), 256, 0.004, 5e-4, warmup_steps=1, probes=16),
)


def recipe(**changes: Any) -> Recipe:
    return Recipe(stages=STAGES, **changes).resized(**SIZES)


def lively_model(seed: int = 0) -> DsaModel:
    """Random weights with which every part of the model matters."""
    model = DsaModel(recipe().config)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name or "o_proj" in name:  # these start at zero
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
        for module in model.modules():
            if isinstance(module, Experts):
                module.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(7, 280, (batch, length), generator=torch.Generator().manual_seed(seed))
