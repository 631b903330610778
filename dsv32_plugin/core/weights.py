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

from dsv32_plugin.core import block_fp8, checkpoint
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.dequantise import Gatherer, kind_of
from dsv32_plugin.core.quantisation import FLOAT, FP8, PACKED, POWER, SIZES, WEIGHT, BlockFp8

Copy = Callable[[Any, torch.Tensor], None]
"""`copy(parameter, tensor)` takes this rank's part of a tensor of the checkpoint."""

# Checkpoint names of the three matrices of an expert, and what both engines call them.
_EXPERT_SHARDS = (("gate_proj", "w13_", "w1"), ("up_proj", "w13_", "w3"), ("down_proj", "w2_", "w2"))
_SHOWN = 5


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

    A matrix whose layer is not quantised here, although the checkpoint's is, is dequantised while it loads: that of
    `kv_b_proj`, which attention needs in halves, what an engine's layer joins with a matrix that is stored otherwise,
    and all where no engine computes the format.

    Args:
        config: of the checkpoint.
        targets: of every tensor that this rank expects, by its name in the checkpoint.

    Raises:
        ValueError: a layer of the engine has no place for a part of a matrix.
        ConfigError: see `checkpoint.check_alike`.
    """

    def __init__(self, config: DsaConfig, targets: Iterable[tuple[str, Target]]) -> None:
        self.config = config
        checkpoint.check_alike(config)
        self._parts = checkpoint.parts(config)
        self._matrices = checkpoint.matrices(config)
        self._targets = dict(targets)
        self._here = {_module_of(name) for name in self._targets}
        """Modules of which this rank expects something."""
        self.tensors_loaded = 0
        """Ever: what a failed update has changed nothing of can stay as it is."""
        plain = {module: matrix for module, matrix in self._matrices.items() if self._is_plain(f"{module}.{WEIGHT}")}
        self._gatherer = Gatherer(plain)
        self._refuse_unplaced()

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, whole: bool) -> set[str]:
        """Load tensors of the checkpoint; those of other ranks and models are left out.

        Nothing is changed by a sequence of tensors of which one is refused. A stream is loaded up to that one.

        Args:
            tensors: names and tensors, as they are stored.
            whole: whether they are all of a checkpoint, as at the start. Otherwise they are any part of one: an fp8
                weight that is dequantised takes effect once its scale has come, too, in this call or another, and
                a weight in floats, as a trainer has it, is quantised where the model's is block-fp8.

        Returns:
            The names of the parameters that were loaded.

        Raises:
            ValueError: for a tensor that is unknown, of the wrong shape or type or, of a whole checkpoint, missing, by
                its name in the checkpoint.
        """
        if isinstance(tensors, Sequence):
            for item in tensors:
                self._check_tensor(*item, whole=whole)
        loaded: set[str] = set()
        missing = self._needed() if whole else set()
        taken = self._quantised(self._checked(tensors, whole=whole))
        for name, tensor in self._gatherer.dequantised(taken, keep=not whole):
            target = self._targets.get(name)
            if target is not None:
                self.tensors_loaded += 1
                target.load(tensor)
                loaded.update(target.full_names())
                missing.discard(name)
        if whole:
            missing.update(self._gatherer.incomplete())
        _refuse_missing(missing)
        return loaded

    def forget_parts(self) -> None:
        """A new update begins: what an earlier one has left is not to be put together with it."""
        self._gatherer.forget()

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
        needed = self._needed()
        if drafts:
            needed.update(tensor.name for tensor in checkpoint.tensors(self.config) if self._is_draft(tensor.name))
        for name in list(needed):
            module = _module_of(name)
            is_whole = name in stored and stored[name].kind == FLOAT
            if name == f"{module}.{WEIGHT}" and module in self._matrices and not is_whole:
                needed.discard(name)
                needed.update(self._matrices[module].parts(module))
        _refuse_missing(needed - stored.keys())

    def _needed(self) -> set[str]:
        """What `load` must be given; of a matrix that is dequantised, its plain form."""
        return {name for name in self._targets if self._is_needed(name)}

    def _is_needed(self, name: str) -> bool:
        module = _module_of(name)
        if module not in self._matrices:
            return True
        if module in self._gatherer:
            return name == f"{module}.{WEIGHT}" or name not in self._matrices[module].parts(module)
        # Besides the parts an engine's layer has parameters of its own making.
        return name in self._parts and self._parts[name].kind != SIZES

    def _is_plain(self, name: str) -> bool:
        """Whether the parameters of a matrix are numbers, not a format."""
        target = self._targets.get(name)
        return target is not None and all(kind_of(parameter.dtype) == FLOAT for parameter in target.parameters())

    def _refuse_unplaced(self) -> None:
        for module in self._here & self._matrices.keys():
            if module in self._gatherer:
                continue
            for name, part in self._matrices[module].parts(module).items():
                if name not in self._targets and part.kind != SIZES:
                    raise ValueError(
                        f"checkpoint: {name} has no place in the engine's layer, which does not take "
                        f"{self._matrices[module].scheme.name}; use the block-fp8 checkpoint or an unquantised one"
                    )

    def _is_draft(self, name: str) -> bool:
        layer = checkpoint.layer_of(name)
        return (
            layer is not None and layer >= self.config.num_layers and not name.endswith(checkpoint.SHARED_WITH_TARGET)
        )

    def _checked(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, whole: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for item in tensors:
            self._check_tensor(*item, whole=whole)
            yield item

    def _quantised(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights in floats whose places here are for block-fp8 as values and scales; all others as they are."""
        for name, tensor in tensors:
            module = _module_of(name)
            if name in self._targets and self._is_quantised_here(name) and kind_of(tensor.dtype) == FLOAT:
                scheme = self._matrices[module].scheme
                assert isinstance(scheme, BlockFp8)
                values_nk, scale_rc = block_fp8.quantise(tensor, scheme.block)
                yield name, values_nk
                yield f"{module}.{scheme.scale}", scale_rc
            else:
                yield name, tensor

    def _is_quantised_here(self, name: str) -> bool:
        """Whether this is the weight of a block-fp8 matrix that the engine computes as it is."""
        module = _module_of(name)
        matrix = self._matrices.get(module)
        if matrix is None or module in self._gatherer or name != f"{module}.{WEIGHT}":
            return False
        return isinstance(matrix.scheme, BlockFp8)

    def _check_tensor(self, name: str, tensor: torch.Tensor, *, whole: bool) -> None:
        kind = kind_of(tensor.dtype)
        if not whole and kind == FLOAT and self._is_quantised_here(name):
            kind = FP8
        self._check(name, tuple(tensor.shape), kind, str(tensor.dtype))

    def _check(self, name: str, shape: tuple[int, ...], kind: str, dtype: str) -> None:
        if name.endswith("rotary_emb.inv_freq"):
            return
        expected = self._parts.get(name)
        if expected is None:
            raise ValueError(
                f"checkpoint: {name} is not a weight of {self.config.architecture}; "
                "is config.json the one of this checkpoint?"
            )
        if shape != expected.shape:
            raise ValueError(
                f"checkpoint: {name} {shape} does not fit the sizes in config.json, by which it is {expected.shape}"
            )
        _check_type(name, kind, dtype, expected.kind)
        kind = _as_number(kind)
        module = _module_of(name)
        if module in self._gatherer and name in self._matrices[module].parts(module):
            kinds = {expected.kind, FLOAT} if name == f"{module}.{WEIGHT}" else {expected.kind}
        elif (target := self._targets.get(name)) is not None:
            kinds = {_as_number(kind_of(parameter.dtype)) for parameter in target.parameters()}
        elif module in self._here and module in self._matrices and expected.kind != SIZES:
            raise ValueError(
                f"checkpoint: {name} is {kind}, but by quantization_config {module} is "
                f"{self._matrices[module].scheme.name}; is it missing from the list of modules that are not quantised?"
            )
        else:
            return
        if kind not in kinds and not (SIZES in kinds or expected.kind == SIZES):
            raise ValueError(
                f"checkpoint: {name} is {kind}, but the model's is {' or '.join(sorted(kinds))}; "
                "send it as the checkpoint of this server stores it"
            )


def _as_number(kind: str) -> str:
    return FLOAT if kind == POWER else kind


def _check_type(name: str, kind: str, dtype: str, expected: str) -> None:
    """Bytes of another type would be taken for numbers, and served."""
    is_scale = "_scale" in name
    if kind in (FLOAT, expected) or kind == (POWER if is_scale else FP8) or (kind, expected) == (PACKED, SIZES):
        return
    other = POWER if is_scale else "float8_e4m3fn with a scale" if expected in (FLOAT, FP8) else expected
    raise ValueError(f"checkpoint: {name} is {dtype}; expected float32, bfloat16, float16 or {other}")


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _refuse_missing(missing: set[str]) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN])
        raise ValueError(f"checkpoint: {len(missing)} weights are missing, among them {shown}; is a shard missing?")


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
