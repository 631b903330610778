"""From a checkpoint's tensors to this rank's parameters; nothing is missed and nothing is silently dropped.

An engine loads a model whole when it starts, and later updates it: whole again, in buckets, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.block_fp8 import SCALE_SUFFIX, Halves, is_fp8
from dsv32_plugin.core.config import DsaConfig

Copy = Callable[[Any, torch.Tensor], None]
"""`copy(parameter, tensor)` takes this rank's part of a tensor of the checkpoint."""

PACKED_MODULES = {
    "q_index_kv_a_proj": ["q_a_proj", "indexer.wk", "kv_a_proj_with_mqa"],
    "q_kv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Our module -> the modules of the checkpoint that it joins."""

# Checkpoint names of the three matrices of an expert, and what both engines call them.
_EXPERT_SHARDS = (("gate_proj", "w13_", "w1"), ("up_proj", "w13_", "w3"), ("down_proj", "w2_", "w2"))
_SHARED_WITH_TARGET = (".embed_tokens.weight", ".shared_head.head.weight")
_SHOWN = 5
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Target(NamedTuple):
    """Where a tensor goes. By name: an engine may put other parameters in their places between two updates."""

    prefix: str
    module: nn.Module
    names: tuple[str, ...]
    """Parameters of the module that are made of the tensor."""
    copy: Copy

    def parameters(self) -> Iterator[Any]:
        return (getattr(self.module, name) for name in self.names)

    def load(self, tensor: torch.Tensor) -> None:
        for parameter in self.parameters():
            self.copy(parameter, tensor)

    def full_names(self) -> Iterator[str]:
        return (f"{self.prefix}.{name}" for name in self.names)


class Loader:
    """Loads one model, and updates it.

    Args:
        config: of the checkpoint.
        targets: of every tensor that this rank expects, by its name in the checkpoint.
        dequantise_all: where fp8 is not computed. Otherwise only `kv_b_proj` is, which attention needs in halves.
    """

    def __init__(
        self, config: DsaConfig, targets: Iterable[tuple[str, Target]], *, dequantise_all: bool = False
    ) -> None:
        self.config = config
        self._shapes = checkpoint.shapes(config)
        self._targets = dict(targets)
        self.tensors_loaded = 0
        """Ever: what a failed update has changed nothing of can stay as it is."""
        self._halves: Halves | None = None
        if config.weight_block_size is not None:
            self._halves = Halves(
                config.weight_block_size, lambda name: dequantise_all or name.endswith(".kv_b_proj.weight")
            )

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, whole: bool) -> set[str]:
        """Load tensors of the checkpoint; those of other ranks and models are left out.

        Nothing is changed by a sequence of tensors of which one is refused. A stream is loaded up to that one.

        Args:
            tensors: names and tensors, as they are stored.
            whole: whether they are all of a checkpoint, as at the start. Otherwise they are any part of one, and an
                fp8 weight that is dequantised takes effect once its scale has come, too, in this call or another.

        Returns:
            The names of the parameters that were loaded.

        Raises:
            ValueError: for a tensor that is unknown, of the wrong shape or type or, of a whole checkpoint, missing, by
                its name in the checkpoint.
        """
        if isinstance(tensors, Sequence):
            for name, tensor in tensors:
                self._check(name, tuple(tensor.shape), tensor.dtype)
        loaded: set[str] = set()
        missing = set(self._targets) if whole else set()
        stored = self._checked(tensors)
        for name, tensor in stored if self._halves is None else self._halves.dequantised(stored, keep=not whole):
            target = self._targets.get(name)
            if target is not None:
                self.tensors_loaded += 1
                target.load(tensor)
                loaded.update(target.full_names())
                missing.discard(name)
        if whole and self._halves is not None:
            missing.update(self._halves.without_partner())
        _refuse_missing(missing)
        return loaded

    def forget_halves(self) -> None:
        """A new update begins: what an earlier one has left is not to be paired with it."""
        if self._halves is not None:
            self._halves.forget()

    def check_folder(self, folder: Path, *, drafts: bool = False) -> None:
        """Raise ValueError unless a folder of safetensors holds a checkpoint that `load` takes, by its headers alone.

        Args:
            folder: of other files than safetensors nothing is said.
            drafts: whether a draft model is updated from it, too.
        """
        stored = checkpoint.headers(folder)
        if stored is None:
            return
        for name, header in stored.items():
            self._check(name, *header)
        needed = {name for name in self._targets if not name.endswith(SCALE_SUFFIX)}
        if drafts:
            needed.update(tensor.name for tensor in checkpoint.tensors(self.config) if self._is_draft(tensor.name))
        needed.update(name + SCALE_SUFFIX for name, header in stored.items() if is_fp8(header.dtype))
        _refuse_missing(needed - stored.keys())

    def _is_draft(self, name: str) -> bool:
        layer = layer_of(name)
        return layer is not None and layer >= self.config.num_layers and not name.endswith(_SHARED_WITH_TARGET)

    def _checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._check(name, tuple(tensor.shape), tensor.dtype)
            yield name, tensor

    def _check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | str) -> None:
        if name.endswith("rotary_emb.inv_freq"):
            return
        expected = self._shapes.get(name)
        if expected is None:
            raise ValueError(
                f"checkpoint: {name} is not a weight of {self.config.architecture}; "
                "is config.json the one of this checkpoint?"
            )
        if shape != expected:
            raise ValueError(
                f"checkpoint: {name} {shape} does not fit the sizes in config.json, by which it is {expected}"
            )
        _check_type(name, dtype)
        target = self._targets.get(name)
        if target is None or (self._halves is not None and self._halves.wants(name)):
            return
        for parameter in target.parameters():
            quantised = is_fp8(dtype)
            if is_fp8(parameter.dtype) != quantised:
                kinds = ("not fp8", "fp8")
                raise ValueError(
                    f"checkpoint: {name} is {kinds[quantised]}, but the model's is {kinds[not quantised]}; "
                    "send it as the checkpoint of this server stores it"
                )


def _check_type(name: str, dtype: torch.dtype | str) -> None:
    """Bytes of another type would be taken for numbers, and served."""
    is_scale = name.endswith(SCALE_SUFFIX)
    if dtype in _FLOATS or (dtype == torch.float8_e8m0fnu if is_scale else is_fp8(dtype)):
        return
    quantised = "float8_e8m0fnu" if is_scale else "float8_e4m3fn with a scale"
    raise ValueError(f"checkpoint: {name} is {dtype}; expected float32, bfloat16, float16 or {quantised}")


def _refuse_missing(missing: set[str]) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN])
        raise ValueError(f"checkpoint: {len(missing)} weights are missing, among them {shown}; is a shard missing?")


def layer_of(name: str) -> int | None:
    """The layer that a checkpoint's tensor belongs to."""
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def parameter_targets(prefix: str, module: nn.Module, default: Copy) -> Iterator[tuple[str, Target]]:
    """A module whose parameters have their names in the checkpoint."""
    for name, _ in module.named_parameters(recurse=False):
        yield f"{prefix}.{name}", Target(prefix, module, (name,), partial(_copy_whole, default))


def _copy_whole(default: Copy, parameter: Any, tensor: torch.Tensor) -> None:
    getattr(parameter, "weight_loader", default)(parameter, tensor)


def packed_targets(
    prefix: str, module: nn.Module, parts: Iterable[str], copy_part: Callable[[Any, torch.Tensor, int], None]
) -> Iterator[tuple[str, Target]]:
    """A module that packs several matrices of the checkpoint, which are named beside it."""
    parent = prefix.rpartition(".")[0]
    for name, _ in module.named_parameters(recurse=False):
        for index, part in enumerate(parts):
            copy = partial(_copy_part, copy_part, index)
            yield f"{parent}.{part}.{name}", Target(prefix, module, (name,), copy)


def _copy_part(
    copy_part: Callable[[Any, torch.Tensor, int], None], index: int, parameter: Any, tensor: torch.Tensor
) -> None:
    copy_part(parameter, tensor, index)


def expert_targets(prefix: str, experts: nn.Module, num_experts: int, path: str = "") -> Iterator[tuple[str, Target]]:
    """An engine's experts: `w13_weight`, `w2_weight` and, in fp8, their scales, with a `weight_loader` each.

    Args:
        prefix: of the experts in the checkpoint.
        path: of the module, where it is another.
    """
    for name, _ in experts.named_parameters(recurse=False):
        for projection, stem, shard in _EXPERT_SHARDS:
            if name.startswith(stem):
                for expert in range(num_experts):
                    yield (
                        f"{prefix}.{expert}.{projection}.{name.removeprefix(stem)}",
                        Target(path or prefix, experts, (name,), partial(_copy_expert, name, shard, expert)),
                    )


def _copy_expert(name: str, shard: str, expert: int, parameter: Any, tensor: torch.Tensor) -> None:
    # With expert parallelism the loader skips the experts of other ranks.
    parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=expert)


def latent_up_targets(prefix: str, module: nn.Module) -> Iterator[tuple[str, Target]]:
    """`LatentUpProjection`: both of its halves come from one matrix."""
    names = tuple(name for name, _ in module.named_parameters())
    yield f"{prefix.removesuffix('.kv_up')}.kv_b_proj.weight", Target(prefix, module, names, _copy_own)


def _copy_own(parameter: Any, tensor: torch.Tensor) -> None:
    parameter.weight_loader(parameter, tensor)
