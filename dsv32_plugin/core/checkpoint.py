"""What a checkpoint stores, by its config.json: the name and the shape of every tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from dsv32_plugin.core.block_fp8 import SCALE_SUFFIX, scale_shape
from dsv32_plugin.core.config import DsaConfig

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Types of weights and scales, as safetensors call them."""


class Stored(NamedTuple):
    """One tensor as the published checkpoints have it."""

    name: str
    shape: tuple[int, ...]
    float32: bool = False
    """In float32 whatever the checkpoint's dtype."""
    plain: bool = False
    """A matrix that a block-fp8 checkpoint does not quantise."""
    unused: bool = False
    """A checkpoint may have it, and no model reads it: the indexer of a layer that shares a selection."""


def shapes(config: DsaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint may have, the scales of fp8 matrices included."""
    found = {tensor.name: tensor.shape for tensor in tensors(config)}
    block = config.weight_block_size
    if block is None:
        return found
    matrices = {name: shape for name, shape in found.items() if len(shape) == 2}
    return found | {name + SCALE_SUFFIX: scale_shape(shape, block) for name, shape in matrices.items()}


def tensors(config: DsaConfig) -> Iterator[Stored]:
    """Every tensor of a checkpoint that is not quantised, in the order of the layers."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Stored("model.embed_tokens.weight", vocabulary, plain=True)
    for layer in range(config.num_layers + config.num_nextn_predict_layers):
        yield from _layer(f"model.layers.{layer}", config, layer)
    for layer in range(config.num_layers, config.num_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        yield Stored(f"{prefix}.embed_tokens.weight", vocabulary, plain=True)
        yield _norm(f"{prefix}.enorm", config.hidden_size)
        yield _norm(f"{prefix}.hnorm", config.hidden_size)
        yield _linear(f"{prefix}.eh_proj", config.hidden_size, 2 * config.hidden_size, plain=True)
        yield _norm(f"{prefix}.shared_head.norm", config.hidden_size)
        yield Stored(f"{prefix}.shared_head.head.weight", vocabulary, plain=True)
    yield _norm("model.norm", config.hidden_size)
    yield Stored("lm_head.weight", vocabulary, plain=True)


def _layer(prefix: str, config: DsaConfig, layer: int) -> Iterator[Stored]:
    yield _norm(f"{prefix}.input_layernorm", config.hidden_size)
    yield from _attention(f"{prefix}.self_attn", config)
    for tensor in _indexer(f"{prefix}.self_attn.indexer", config):
        yield tensor._replace(unused=not config.selects(layer))
    yield _norm(f"{prefix}.post_attention_layernorm", config.hidden_size)
    if config.is_moe(layer):
        yield from _moe(f"{prefix}.mlp", config)
    else:
        yield from _mlp(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)


def _attention(prefix: str, config: DsaConfig) -> Iterator[Stored]:
    heads, latent = config.num_heads, config.kv_lora_rank
    yield _linear(f"{prefix}.q_a_proj", config.q_lora_rank, config.hidden_size)
    yield _norm(f"{prefix}.q_a_layernorm", config.q_lora_rank)
    yield _linear(f"{prefix}.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
    yield _linear(f"{prefix}.kv_a_proj_with_mqa", latent + config.qk_rope_head_dim, config.hidden_size)
    yield _norm(f"{prefix}.kv_a_layernorm", latent)
    yield _linear(f"{prefix}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield _linear(f"{prefix}.o_proj", config.hidden_size, heads * config.v_head_dim)


def _indexer(prefix: str, config: DsaConfig) -> Iterator[Stored]:
    yield _linear(f"{prefix}.wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
    yield _linear(f"{prefix}.wk", config.index_head_dim, config.hidden_size)
    yield _norm(f"{prefix}.k_norm", config.index_head_dim, float32=True)
    yield Stored(f"{prefix}.k_norm.bias", (config.index_head_dim,), float32=True)
    yield _linear(f"{prefix}.weights_proj", config.index_n_heads, config.hidden_size, plain=True)


def _moe(prefix: str, config: DsaConfig) -> Iterator[Stored]:
    yield _linear(f"{prefix}.gate", config.n_routed_experts, config.hidden_size, plain=True)
    yield Stored(f"{prefix}.gate.e_score_correction_bias", (config.n_routed_experts,), float32=True)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{prefix}.experts.{expert}", config.hidden_size, config.moe_intermediate_size)
    shared = config.moe_intermediate_size * config.n_shared_experts
    yield from _mlp(f"{prefix}.shared_experts", config.hidden_size, shared)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[Stored]:
    yield _linear(f"{prefix}.gate_proj", intermediate, hidden)
    yield _linear(f"{prefix}.up_proj", intermediate, hidden)
    yield _linear(f"{prefix}.down_proj", hidden, intermediate)


def _linear(name: str, outputs: int, inputs: int, *, plain: bool = False) -> Stored:
    return Stored(f"{name}.weight", (outputs, inputs), plain=plain)


def _norm(name: str, size: int, *, float32: bool = False) -> Stored:
    return Stored(f"{name}.weight", (size,), float32=float32)


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """The file's word for a type that no weight has."""


def headers(folder: Path) -> dict[str, Header] | None:
    """Every tensor of a folder of safetensors, from the headers alone; None where there are no such files.

    Raises:
        ValueError: the index is no index, a shard is missing, is cut off or is no safetensors file, or a tensor is not
            where the index says.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    where: Mapping[str, str] = {}
    if index.exists():
        where = _read_index(index)
    shards = sorted(set(where.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        return None
    found = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dict
                    part = file.get_slice(name)
                    found[name] = Header(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint: {folder / shard} cannot be read: {error}; copy the shard again") from error
    if absent := where.keys() - found.keys():
        raise ValueError(
            f"checkpoint: {len(absent)} tensors of {INDEX} are in no shard, among them {min(absent)}; "
            "do index and shards belong together?"
        )
    return found


def _read_index(index: Path) -> Mapping[str, str]:
    """The shard of every tensor."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"checkpoint: {index} cannot be read: {error!r}; copy the index again") from error
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"checkpoint: {index}: expected a weight_map of file names; copy the index again")
    return where
