"""The tensors of `dsv32 tiny`: names and storage as in the published checkpoint, values random but not arbitrary.

The spreads are chosen so that mistakes show. Every block adds about as much to the residual stream as it finds there,
attention is peaked (a few of the selected keys carry most of the weight), index scores are spread, the router's bias
moves its choice, norms are not the identity, and the best next token is clearly ahead of the second.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.block_fp8 import SCALE_SUFFIX, quantise
from dsv32_plugin.core.checkpoint import Stored
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.quantisation import BlockFp8

SHARDS = 3
LOGIT_STD = 4.0


def save_weights(config: DsaConfig, out: Path, *, seed: int, dtype: torch.dtype) -> None:
    """All that a model of `config` reads, with `seed`, in `dtype`; matrices in block-fp8 where the config says so."""
    tensors: dict[str, torch.Tensor] = {}
    for tensor in checkpoint.tensors(config):
        if tensor.unused:
            continue
        value = _draw(tensor, seed)
        scheme = checkpoint.scheme_of(config, tensor.name.removesuffix(".weight"))
        if isinstance(scheme, BlockFp8) and len(tensor.shape) == 2 and not tensor.plain:
            tensors[tensor.name], tensors[tensor.name + SCALE_SUFFIX] = quantise(value, scheme.block)
        else:
            tensors[tensor.name] = value if tensor.float32 else value.to(dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=size // SHARDS)
    for shard, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, out / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _draw(tensor: Stored, seed: int) -> torch.Tensor:
    """A tensor's values depend on the seed and its name only, not on what else the checkpoint holds."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{tensor.name}".encode()))
    return torch.empty(tensor.shape).normal_(*_mean_and_std(tensor), generator=generator)


def _mean_and_std(tensor: Stored) -> tuple[float, float]:
    if tensor.name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    if tensor.name.endswith(("lm_head.weight", "shared_head.head.weight")):
        return 0.0, LOGIT_STD * tensor.shape[1] ** -0.5
    if len(tensor.shape) == 2:  # a matrix keeps the size of what it multiplies
        return 0.0, tensor.shape[1] ** -0.5
    return (1.0, 0.1) if tensor.name.endswith(".weight") else (0.0, 0.1)
