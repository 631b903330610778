"""From a checkpoint's tensors to this rank's parameters; nothing is missed and nothing is silently dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dsv32_plugin import block_fp8
from dsv32_plugin.config import DsaConfig

Load = Callable[[torch.Tensor], None]

# Checkpoint names of the three matrices of an expert, and what both engines call them.
_EXPERT_SHARDS = (("gate_proj", "w13_", "w1"), ("up_proj", "w13_", "w3"), ("down_proj", "w2_", "w2"))
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_SHOWN = 5


def load(
    config: DsaConfig,
    layers: range,
    tensors: Iterable[tuple[str, torch.Tensor]],
    targets: dict[str, Load],
    *,
    dequantise_all: bool,
) -> None:
    """Load every tensor of the checkpoint.

    Args:
        config: of the checkpoint.
        layers: those that this rank holds.
        tensors: names and tensors, as they are stored.
        targets: for every tensor that this rank expects, its name in the checkpoint and what to do with it.
        dequantise_all: where fp8 is not computed. Otherwise only `kv_b_proj` is, which attention needs in halves.

    Raises:
        ValueError: for a tensor that is missing, unknown or of the wrong shape, by its name in the checkpoint.
    """
    missing = set(targets)
    if config.weight_block_size is not None:
        tensors = block_fp8.dequantised(
            tensors,
            config.weight_block_size,
            lambda name: dequantise_all or name.endswith(".kv_b_proj.weight"),
        )
    for name, tensor in tensors:
        target = targets.get(name)
        if target is not None:
            try:
                target(tensor)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"checkpoint: {name} {tuple(tensor.shape)} does not fit the sizes in config.json: {error}"
                ) from error
            missing.discard(name)
        elif not _belongs_elsewhere(config, layers, name):
            raise ValueError(
                f"checkpoint: {name} is not a weight of {config.architecture}; "
                "is config.json the one of this checkpoint?"
            )
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN])
        raise ValueError(f"checkpoint: {len(missing)} weights are missing, among them {shown}; is a shard missing?")


def _belongs_elsewhere(config: DsaConfig, layers: range, name: str) -> bool:
    """Whether a tensor is rightly not loaded: another stage's, a draft layer's, an unused indexer's, or a buffer."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    match = _LAYER.match(name)
    if match is None:
        return name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    layer, rest = int(match[1]), match[2]
    if config.num_layers <= layer < config.num_layers + config.num_nextn_predict_layers:
        return True
    if layer not in layers:
        return layer < config.num_layers
    return rest.startswith("self_attn.indexer.") and not config.selects(layer)


def parameter_targets(
    prefix: str, module: nn.Module, default: Callable[[Any, torch.Tensor], None]
) -> Iterator[tuple[str, Load]]:
    """A module whose parameters have their names in the checkpoint."""
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}.{name}", partial(getattr(parameter, "weight_loader", default), parameter)


def packed_targets(
    prefix: str, module: nn.Module, parts: Iterable[str], load_part: Callable[[Any, torch.Tensor, int], None]
) -> Iterator[tuple[str, Load]]:
    """A module that packs several matrices of the checkpoint, which are named beside it."""
    parent = prefix.rpartition(".")[0]
    for name, parameter in module.named_parameters(recurse=False):
        for index, part in enumerate(parts):
            yield f"{parent}.{part}.{name}", partial(_load_part, load_part, parameter, index)


def _load_part(
    load_part: Callable[[Any, torch.Tensor, int], None], parameter: Any, index: int, tensor: torch.Tensor
) -> None:
    load_part(parameter, tensor, index)


def expert_targets(prefix: str, experts: nn.Module, num_experts: int) -> Iterator[tuple[str, Load]]:
    """An engine's experts: `w13_weight`, `w2_weight` and, in fp8, their scales, with a `weight_loader` each."""
    for name, parameter in experts.named_parameters(recurse=False):
        for projection, stem, shard in _EXPERT_SHARDS:
            if name.startswith(stem):
                for expert in range(num_experts):
                    yield (
                        f"{prefix}.{expert}.{projection}.{name.removeprefix(stem)}",
                        partial(_load_expert, parameter, name, shard, expert),
                    )


def _load_expert(parameter: Any, name: str, shard: str, expert: int, tensor: torch.Tensor) -> None:
    # With expert parallelism the loader skips the experts of other ranks.
    parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=expert)
