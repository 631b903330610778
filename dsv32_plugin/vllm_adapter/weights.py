"""From a checkpoint's tensors to this rank's parameters; nothing is missed and nothing is silently dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from dsv32_plugin import block_fp8
from dsv32_plugin.vllm_adapter.latent_up import LatentUpProjection
from dsv32_plugin.vllm_adapter.quantisation import DequantisedFp8Config

if TYPE_CHECKING:
    from dsv32_plugin.vllm_adapter.model import DsaForCausalLM
    from dsv32_plugin.vllm_adapter.mtp import DsaMtp

    Model: TypeAlias = DsaForCausalLM | DsaMtp

Load = Callable[[torch.Tensor], None]

# Checkpoint names of the three matrices of an expert, and what vLLM calls them.
_EXPERT_SHARDS = (("gate_proj", "w13_", "w1"), ("up_proj", "w13_", "w3"), ("down_proj", "w2_", "w2"))
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SHOWN = 5


def load(
    model: Model, tensors: Iterable[tuple[str, torch.Tensor]], belongs_elsewhere: Callable[[str], bool]
) -> set[str]:
    """Load every tensor of the checkpoint but those that belong elsewhere. Returns the names of all parameters.

    Raises:
        ValueError: for a tensor that is missing, unknown or of the wrong shape, by its name in the checkpoint.
    """
    targets = dict(_targets(model))
    missing = set(targets)
    block = model.config.weight_block_size
    if block is not None:
        tensors = block_fp8.dequantised(tensors, block, partial(_is_dequantised, model))
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
                f"checkpoint: {name} is not a weight of {model.config.architecture}; "
                "is config.json the one of this checkpoint?"
            )
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN])
        raise ValueError(f"checkpoint: {len(missing)} weights are missing, among them {shown}; is a shard missing?")
    return {name for name, _ in model.named_parameters()}


def _is_dequantised(model: Model, name: str) -> bool:
    """Whether this fp8 weight is needed in the model's dtype: `kv_b_proj` always, all where fp8 is not computed."""
    return isinstance(model.quant_config, DequantisedFp8Config) or name.endswith(".kv_b_proj.weight")


def layer_of(name: str) -> int | None:
    """The layer that a checkpoint's tensor belongs to."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def _targets(model: Model) -> Iterator[tuple[str, Load]]:
    """For every tensor that this rank expects, its name in the checkpoint and what to do with it."""
    for prefix, module in model.named_modules():
        if isinstance(module, LatentUpProjection):
            yield f"{prefix.removesuffix('.kv_up')}.kv_b_proj.weight", module.load_kv_b_proj
        elif isinstance(module, RoutedExperts):
            yield from _expert_targets(prefix.removesuffix(".routed_experts"), module)
        elif isinstance(module, MergedColumnParallelLinear):
            parent, _, packed = prefix.rpartition(".")
            for name, parameter in module.named_parameters(recurse=False):
                for shard, part in enumerate(model.packed_modules_mapping[packed]):
                    yield f"{parent}.{part}.{name}", partial(_load_shard, parameter, shard)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                loader = getattr(parameter, "weight_loader", default_weight_loader)
                yield f"{prefix}.{name}", partial(loader, parameter)


def _load_shard(parameter: Any, shard: int, tensor: torch.Tensor) -> None:
    parameter.weight_loader(parameter, tensor, shard)


def _expert_targets(prefix: str, experts: RoutedExperts) -> Iterator[tuple[str, Load]]:
    for name, parameter in experts.named_parameters(recurse=False):
        for projection, stem, shard in _EXPERT_SHARDS:
            if name.startswith(stem):
                for expert in range(experts.global_num_experts):
                    yield (
                        f"{prefix}.{expert}.{projection}.{name.removeprefix(stem)}",
                        partial(_load_expert, parameter, name, shard, expert),
                    )


def _load_expert(parameter: Any, name: str, shard: str, expert: int, tensor: torch.Tensor) -> None:
    # With expert parallelism the loader skips the experts of other ranks.
    parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=expert)
