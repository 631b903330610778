"""The tensors of `dsv32 tiny`: names and storage as in the published checkpoint, values random but not arbitrary.

The spreads are chosen so that mistakes show. Every block adds about as much to the residual stream as it finds there,
attention is peaked (a few of the selected keys carry most of the weight), index scores are spread, the router's bias
moves its choice, norms are not the identity, and the best next token is clearly ahead of the second.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from dsv32_plugin.block_fp8 import SCALE_SUFFIX, quantise
from dsv32_plugin.config import DsaConfig
from dsv32_plugin.tiny import BLOCK, TinySpec

SHARDS = 3
LOGIT_STD = 4.0


class Tensor(NamedTuple):
    """One parameter, drawn from a normal distribution."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    float32: bool = False
    """Kept in float32 whatever the checkpoint's dtype."""
    plain: bool = False
    """A matrix that a block-fp8 checkpoint does not quantise."""


def save_weights(spec: TinySpec, config: DsaConfig, out: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for tensor in _checkpoint(config):
        value = _draw(tensor, spec.seed)
        if spec.fp8 and len(tensor.shape) == 2 and not tensor.plain:
            tensors[tensor.name], tensors[tensor.name + SCALE_SUFFIX] = quantise(value, BLOCK)
        else:
            tensors[tensor.name] = value if tensor.float32 else value.to(getattr(torch, spec.dtype))
    size = sum(tensor.nbytes for tensor in tensors.values())
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=size // SHARDS)
    for shard, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, out / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _draw(tensor: Tensor, seed: int) -> torch.Tensor:
    """A tensor's values depend on the seed and its name only, not on what else the checkpoint holds."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{tensor.name}".encode()))
    return torch.empty(tensor.shape).normal_(tensor.mean, tensor.std, generator=generator)


def _checkpoint(config: DsaConfig) -> Iterator[Tensor]:
    vocabulary = (config.vocab_size, config.hidden_size)
    logits_std = LOGIT_STD * config.hidden_size**-0.5
    yield Tensor("model.embed_tokens.weight", vocabulary, 1.0, plain=True)
    for layer in range(config.num_layers + config.num_nextn_predict_layers):
        yield from _layer(f"model.layers.{layer}", config, layer)
    for layer in range(config.num_layers, config.num_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        yield Tensor(f"{prefix}.embed_tokens.weight", vocabulary, 1.0, plain=True)
        yield _norm(f"{prefix}.enorm", config.hidden_size)
        yield _norm(f"{prefix}.hnorm", config.hidden_size)
        yield _linear(f"{prefix}.eh_proj", config.hidden_size, 2 * config.hidden_size, plain=True)
        yield _norm(f"{prefix}.shared_head.norm", config.hidden_size)
        yield Tensor(f"{prefix}.shared_head.head.weight", vocabulary, logits_std, plain=True)
    yield _norm("model.norm", config.hidden_size)
    yield Tensor("lm_head.weight", vocabulary, logits_std, plain=True)


def _layer(prefix: str, config: DsaConfig, layer: int) -> Iterator[Tensor]:
    yield _norm(f"{prefix}.input_layernorm", config.hidden_size)
    yield from _attention(f"{prefix}.self_attn", config)
    if config.selects(layer):
        yield from _indexer(f"{prefix}.self_attn.indexer", config)
    yield _norm(f"{prefix}.post_attention_layernorm", config.hidden_size)
    if config.is_moe(layer):
        yield from _moe(f"{prefix}.mlp", config)
    else:
        yield from _mlp(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)


def _attention(prefix: str, config: DsaConfig) -> Iterator[Tensor]:
    heads, latent = config.num_heads, config.kv_lora_rank
    yield _linear(f"{prefix}.q_a_proj", config.q_lora_rank, config.hidden_size)
    yield _norm(f"{prefix}.q_a_layernorm", config.q_lora_rank)
    yield _linear(f"{prefix}.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
    yield _linear(f"{prefix}.kv_a_proj_with_mqa", latent + config.qk_rope_head_dim, config.hidden_size)
    yield _norm(f"{prefix}.kv_a_layernorm", latent)
    yield _linear(f"{prefix}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield _linear(f"{prefix}.o_proj", config.hidden_size, heads * config.v_head_dim)


def _indexer(prefix: str, config: DsaConfig) -> Iterator[Tensor]:
    yield _linear(f"{prefix}.wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
    yield _linear(f"{prefix}.wk", config.index_head_dim, config.hidden_size)
    yield _norm(f"{prefix}.k_norm", config.index_head_dim, float32=True)
    yield Tensor(f"{prefix}.k_norm.bias", (config.index_head_dim,), 0.1, float32=True)
    yield _linear(f"{prefix}.weights_proj", config.index_n_heads, config.hidden_size, plain=True)


def _moe(prefix: str, config: DsaConfig) -> Iterator[Tensor]:
    yield _linear(f"{prefix}.gate", config.n_routed_experts, config.hidden_size, plain=True)
    yield Tensor(f"{prefix}.gate.e_score_correction_bias", (config.n_routed_experts,), 0.1, float32=True)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{prefix}.experts.{expert}", config.hidden_size, config.moe_intermediate_size)
    shared = config.moe_intermediate_size * config.n_shared_experts
    yield from _mlp(f"{prefix}.shared_experts", config.hidden_size, shared)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[Tensor]:
    yield _linear(f"{prefix}.gate_proj", intermediate, hidden)
    yield _linear(f"{prefix}.up_proj", intermediate, hidden)
    yield _linear(f"{prefix}.down_proj", hidden, intermediate)


def _linear(name: str, outputs: int, inputs: int, *, plain: bool = False) -> Tensor:
    """A matrix that keeps the size of what it multiplies."""
    return Tensor(f"{name}.weight", (outputs, inputs), inputs**-0.5, plain=plain)


def _norm(name: str, size: int, *, float32: bool = False) -> Tensor:
    return Tensor(f"{name}.weight", (size,), 0.1, 1.0, float32=float32)
