"""From a checkpoint's tensors to this rank's parameters; nothing is missed and nothing is silently dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dsv32_plugin import block_fp8
from dsv32_plugin.config import DsaConfig

Load = Callable[[torch.Tensor], None]

PACKED_MODULES = {
    "q_index_kv_a_proj": ["q_a_proj", "indexer.wk", "kv_a_proj_with_mqa"],
    "q_kv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Our module -> the modules of the checkpoint that it joins."""

# Checkpoint names of the three matrices of an expert, and what both engines call them.
_EXPERT_SHARDS = (("gate_proj", "w13_", "w1"), ("up_proj", "w13_", "w3"), ("down_proj", "w2_", "w2"))
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SHOWN = 5


def load(
    config: DsaConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    targets: Mapping[str, Load],
    belongs_elsewhere: Callable[[str], bool],
    *,
    dequantise_all: bool,
) -> None:
    """Load every tensor of the checkpoint but those that belong elsewhere.

    Args:
        config: of the checkpoint.
        tensors: names and tensors, as they are stored.
        targets: for every tensor that this rank expects, its name in the checkpoint and what to do with it.
        belongs_elsewhere: whether a tensor without a target is rightly not loaded.
        dequantise_all: where fp8 is not computed. Otherwise only `kv_b_proj` is, which attention needs in halves.

    Raises:
        ValueError: for a tensor that is missing, unknown or of the wrong shape, by its name in the checkpoint.
    """
    missing = set(targets)
    block = config.weight_block_size
    if block is not None:
        tensors = block_fp8.dequantised(
            tensors, block, lambda name: dequantise_all or name.endswith(".kv_b_proj.weight")
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
        elif not (belongs_elsewhere(name) or name.endswith("rotary_emb.inv_freq")):
            raise ValueError(
                f"checkpoint: {name} is not a weight of {config.architecture}; "
                "is config.json the one of this checkpoint?"
            )
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN])
        raise ValueError(f"checkpoint: {len(missing)} weights are missing, among them {shown}; is a shard missing?")


def layer_of(name: str) -> int | None:
    """The layer that a checkpoint's tensor belongs to."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def is_of_target(name: str, first_draft_layer: int) -> bool:
    """Whether a draft model rightly leaves a tensor out: a target layer's, or a copy of what the target shares."""
    layer = layer_of(name)
    return layer is None or layer < first_draft_layer or name.endswith((".embed_tokens.weight", ".head.weight"))


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
