"""How a checkpoint stores its matrices, by `quantization_config` (or `compression_config`) in its config.json.

A matrix [N, K] is stored in parts: its values, and what turns them back into numbers. Each format says which parts, and
`core.dequantise` puts them together. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

WEIGHT = "weight"
FLOAT, FP8, INT8, PACKED, SIZES = "a float", "fp8", "int8", "packed in int32", "a size"
POWER = "float8_e8m0fnu"
"""What the elements of a stored tensor are."""
_WIDTHS = {FP8: 1, INT8: 1, PACKED: 4, SIZES: 4}


class Part(NamedTuple):
    """One tensor of a matrix."""

    shape: tuple[int, ...]
    kind: str

    @property
    def bytes(self) -> int:
        """With floats in bfloat16."""
        return math.prod(self.shape) * _WIDTHS.get(self.kind, 2)


class Unsupported(ValueError):
    """A key of the quantisation that no code here reads: (key, expected, got, what to do)."""

    def __init__(self, key: str, expected: str, got: Any, then: str) -> None:
        super().__init__(key, expected, got, then)


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored."""

    first_chip: ClassVar[int] = 75
    """The compute capability from which on vLLM has a kernel for it."""
    only_chip: ClassVar[int | None] = None

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Suffix of the module's name -> the tensor; the first holds the values."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """For people."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockFp8(Scheme):
    """w[n, k] = value[n, k] * scale[n // rows, k // columns]"""

    block: tuple[int, int]
    scale: str = "weight_scale_inv"
    """Despite the name that DeepSeek gave it, it multiplies."""

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        scale = Part(scale_shape((rows, columns), self.block), FLOAT)
        return {WEIGHT: Part((rows, columns), FP8), self.scale: scale}

    @property
    def name(self) -> str:
        return f"fp8 in blocks of {self.block[0]} x {self.block[1]}"


@dataclass(frozen=True)
class Rows(Scheme):
    """w[n, k] = value[n, k] * scale[n], in fp8 or int8, for activations of the same type."""

    kind: str

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        return {WEIGHT: Part((rows, columns), self.kind), "weight_scale": Part((rows, 1), FLOAT)}

    @property
    def name(self) -> str:
        return f"{self.kind} with a scale a row (W8A8)"


@dataclass(frozen=True)
class Packed(Scheme):
    """w[n, k] = (value[n, k] - zero[n, g]) * scale[n, g]: compressed-tensors' pack-quantized integers.

    g is k // group, or what `weight_g_idx` says of k. 32 / bits values of a row are in one int32, the first lowest, as
    value + 2 ** (bits - 1); so are the zeros of a column, which symmetric weights lack.
    """

    bits: int
    group: int
    """Columns that share a scale; 0 for all of a row."""
    symmetric: bool = True
    ordered: bool = False
    activations: str = "A16"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups, fold = _groups(columns, self.group), 32 // self.bits
        found = {
            "weight_packed": Part((rows, -(-columns // fold)), PACKED),
            "weight_scale": Part((rows, groups), FLOAT),
            "weight_shape": Part((2,), SIZES),
        }
        if not self.symmetric:
            found["weight_zero_point"] = Part((-(-rows // fold), groups), PACKED)
        if self.ordered:
            found["weight_g_idx"] = Part((columns,), SIZES)
        return found

    @property
    def name(self) -> str:
        return f"int{self.bits} {_in_groups(self.group)} (W{self.bits}{self.activations})"


@dataclass(frozen=True)
class PackedForFp8(Packed):
    """The same for activations in fp8, whose product Hopper alone has a kernel for."""

    only_chip: ClassVar[int | None] = 90
    activations: str = "A8"


@dataclass(frozen=True)
class Awq(Scheme):
    """w[n, k] = (value[k, n] - zero[k // group, n]) * scale[k // group, n]

    Eight values of a row of [K, N] are in one int32, in AWQ's order: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up.
    """

    group: int
    bits: int = 4

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups, fold = _groups(columns, self.group), 32 // self.bits
        return {
            "qweight": Part((columns, rows // fold), PACKED),
            "qzeros": Part((groups, rows // fold), PACKED),
            "scales": Part((groups, rows), FLOAT),
        }

    @property
    def name(self) -> str:
        return f"AWQ int{self.bits} {_in_groups(self.group)} (W{self.bits}A16)"


@dataclass(frozen=True)
class Gptq(Scheme):
    """w[n, k] = (value[k, n] - zero[g, n]) * scale[g, n] with g = g_idx[k]

    32 / bits values of a column of [K, N] are in one int32, the first lowest; so are the zeros of a row, less `offset`.
    """

    bits: int
    group: int
    offset: int
    """1 in the format of AutoGPTQ, 0 in `gptq_v2`."""

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups, fold = _groups(columns, self.group), 32 // self.bits
        return {
            "qweight": Part((columns // fold, rows), PACKED),
            "qzeros": Part((groups, rows // fold), PACKED),
            "scales": Part((groups, rows), FLOAT),
            "g_idx": Part((columns,), SIZES),
        }

    @property
    def name(self) -> str:
        return f"GPTQ int{self.bits} {_in_groups(self.group)} (W{self.bits}A16)"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Of the scales of a matrix [N, K] in blocks: the last blocks may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _groups(columns: int, group: int) -> int:
    return -(-columns // group) if group else 1


def _in_groups(group: int) -> str:
    return f"in groups of {group}" if group else "with a scale a row"


class Matcher:
    """Names of modules: whole, by a regular expression from their beginning on, or by a part of them."""

    def __init__(self, whole: Iterable[str] = (), patterns: Iterable[str] = (), parts: Iterable[str] = ()) -> None:
        self._whole, self._parts = frozenset(whole), tuple(parts)
        self._patterns = tuple(map(_compiled, patterns))

    def __call__(self, module: str) -> bool:
        return (
            module in self._whole
            or any(part in module for part in self._parts)
            or any(pattern.match(module) for pattern in self._patterns)
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        then = "fix the checkpoint's config.json"
        raise Unsupported("names of modules", "regular expressions", f"{pattern}: {error}", then) from error


@dataclass(frozen=True)
class Quantisation:
    """What is stored how: of the first rule that matches a module, or not quantised at all."""

    method: str
    """As config.json calls it."""
    source: Mapping[str, Any]
    """What was read."""
    rules: Sequence[tuple[Callable[[str], bool], Scheme | None]] = field(compare=False)
    _found: dict[str, Scheme | None] = field(default_factory=dict, compare=False, repr=False)

    def scheme(self, module: str) -> Scheme | None:
        """How the matrix of a module of the checkpoint is stored, None for as it is."""
        if module not in self._found:
            self._found[module] = next((scheme for matches, scheme in self.rules if matches(module)), None)
        return self._found[module]

    @property
    def schemes(self) -> list[Scheme]:
        """All that occur in its rules."""
        return list(dict.fromkeys(scheme for _, scheme in self.rules if scheme is not None))

    @property
    def name(self) -> str:
        return f"{self.method}: {' and '.join(scheme.name for scheme in self.schemes)}"


READERS: dict[str, Callable[[Mapping[str, Any]], Quantisation]] = {}
"""`quant_method` -> who reads the rest."""

ELSEWHERE = {
    "modelopt": "NVIDIA's ModelOpt formats (NVFP4, per-tensor fp8) have no path here; serve the block-fp8 checkpoint",
    "w4afp8": "SGLang's packing of int4 experts has no path here; serve the same weights as compressed-tensors W4A8",
    "auto-round": "export it with AutoRound as auto_gptq or auto_awq, or serve the block-fp8 checkpoint",
    "quark": "AMD Quark's formats have no path here; serve the block-fp8 checkpoint",
    "bitsandbytes": "it cannot be loaded in parts; serve the block-fp8 checkpoint",
    "mxfp4": "MXFP4 has no path here; serve the block-fp8 checkpoint",
}
"""Other formats that V3.2 and GLM-5 are published in."""


def read(config: Any) -> Quantisation | None:
    """Of what `quantization_config` holds; None where nothing is quantised.

    Raises:
        Unsupported: a format, or a variant of one, that cannot be served.
    """
    if not config:
        return None
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise Unsupported("quant_method", "an object that names one", config, "fix the checkpoint's config.json")
    method = str(config.get("quant_method") or "")
    if "quantization" in config and not method:  # hf_quant_config.json
        method = "modelopt"
    reader = READERS.get(method)
    if reader is None:
        otherwise = "use the block-fp8 checkpoint or an unquantised one"
        hint = next((hint for name, hint in ELSEWHERE.items() if method.startswith(name)), otherwise)
        raise Unsupported("quant_method", f"one of {', '.join(READERS)}", method or None, hint)
    return reader(config)


def _reads(method: str) -> Callable[[Callable[..., Quantisation]], Callable[..., Quantisation]]:
    def add(reader: Callable[..., Quantisation]) -> Callable[..., Quantisation]:
        READERS[method] = reader
        return reader

    return add


@_reads("fp8")
def _fp8(config: Mapping[str, Any]) -> Quantisation:
    block = _pair(config.get("weight_block_size"))
    if block is None:
        given = config.get("weight_block_size")
        raise Unsupported("weight_block_size", "two integers", given, "only block-fp8 is supported")
    left_out = _names(config, "modules_to_not_convert") or _names(config, "ignored_layers")
    scheme = BlockFp8(block)
    return Quantisation("fp8", config, ((Matcher(whole=left_out), None), (_all, scheme)))


@_reads("awq")
def _awq(config: Mapping[str, Any]) -> Quantisation:
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise Unsupported("bits", "4", bits, "AWQ in other widths has no kernel")
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise Unsupported("version", "'gemm'", config["version"], "no other packing is supported")
    if not config.get("zero_point", True):
        raise Unsupported("zero_point", "true", False, "export it with zero points")
    left_out = _names(config, "modules_to_not_convert")
    scheme = Awq(_group(config.get("group_size", config.get("q_group_size"))))
    return Quantisation("awq", config, ((Matcher(parts=left_out), None), (_all, scheme)))


@_reads("gptq")
def _gptq(config: Mapping[str, Any]) -> Quantisation:
    bits = config.get("bits")
    if bits not in (4, 8):
        raise Unsupported("bits", "4 or 8", bits, "GPTQ in other widths has no kernel")
    if not config.get("sym", True):
        raise Unsupported("sym", "true", False, "vLLM's kernels take symmetric GPTQ only")
    packing = config.get("checkpoint_format", "gptq")
    if packing not in ("gptq", "gptq_v2"):
        raise Unsupported("checkpoint_format", "'gptq' or 'gptq_v2'", packing, "save it again in one of them")
    dynamic = config.get("dynamic") or {}
    if changed := [rule for rule in dynamic if not rule.startswith("-:")]:
        raise Unsupported("dynamic", "rules that leave modules out ('-:…')", changed[0], "no module may differ")
    scheme = Gptq(bits, _group(config.get("group_size")), offset=1 if packing == "gptq" else 0)
    left_out = Matcher(patterns=[rule.removeprefix("-:") for rule in dynamic])
    return Quantisation("gptq", config, ((left_out, None), (_all, scheme)))


@_reads("compressed-tensors")
def _compressed_tensors(config: Mapping[str, Any]) -> Quantisation:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise Unsupported("config_groups", "one group at least", groups, "the checkpoint says of no module how it is")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise Unsupported("sparsity_config", "none", config["sparsity_config"], "sparse weights are not supported")
    if config.get("transform_config"):
        raise Unsupported("transform_config", "none", config["transform_config"], "rotated weights are not supported")
    ignored, named, by_class = _targets(_names(config, "ignore")), [], []
    for key, group in groups.items():
        if not isinstance(group, Mapping):
            raise Unsupported(f"config_groups.{key}", "an object", group, "fix the checkpoint's config.json")
        scheme = _group_scheme(f"config_groups.{key}", group, group.get("format") or config.get("format"))
        targets = list(group.get("targets") or [])
        named.append((_targets(target for target in targets if target != "Linear"), scheme))
        if "Linear" in targets:
            by_class.append((_all, scheme))
    return Quantisation("compressed-tensors", config, ((ignored, None), *named, *by_class))


def _group_scheme(key: str, group: Mapping[str, Any], packing: str | None) -> Scheme:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    if group.get("output_activations"):
        raise Unsupported(f"{key}.output_activations", "none", group["output_activations"], "they are not computed")
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    if activations and not activations.get("dynamic"):
        raise Unsupported(f"{key}.input_activations.dynamic", "true", False, "export it with dynamic activation scales")
    if packing == "pack-quantized" and kind == "int" and bits in (4, 8):
        return _packed(key, weights, activations)
    if packing == "float-quantized" and (kind, bits, strategy) == ("float", 8, "block"):
        block = _pair(weights.get("block_structure"))
        if block is None:
            given = weights.get("block_structure")
            raise Unsupported(f"{key}.weights.block_structure", "two integers", given, "fix the config")
        return BlockFp8(block, scale="weight_scale")
    eights = {"float-quantized": ("float", FP8), "int-quantized": ("int", INT8)}
    if packing in eights and (kind, bits, strategy) == (eights[packing][0], 8, "channel") and activations:
        if not weights.get("symmetric", True):
            raise Unsupported(f"{key}.weights.symmetric", "true", False, "no kernel takes zero points here")
        return Rows(eights[packing][1])
    got = f"{packing}, {kind}{bits} by {strategy}"
    expected = "pack-quantized int4 or int8, float-quantized by block or channel, or int-quantized by channel"
    raise Unsupported(key, expected, got, "use the block-fp8 checkpoint or one of these")


def _packed(key: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> Packed:
    strategy, order = weights.get("strategy"), weights.get("actorder")
    if strategy not in ("group", "channel"):
        raise Unsupported(f"{key}.weights.strategy", "'group' or 'channel'", strategy, "no kernel takes it")
    made = {
        "bits": weights["num_bits"],
        "group": _group(weights.get("group_size")) if strategy == "group" else 0,
        "symmetric": weights.get("symmetric", True),
        "ordered": order == "group",
    }
    if not activations:
        return Packed(**made)
    if activations.get("type") != "float" or activations.get("num_bits") != 8 or made["bits"] != 4:
        got = f"{activations.get('type')}{activations.get('num_bits')}"
        raise Unsupported(f"{key}.input_activations", "none, or fp8 beside int4 weights", got, "no kernel takes it")
    return PackedForFp8(**made)


def _targets(targets: Iterable[str]) -> Matcher:
    targets = list(targets)
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return Matcher(whole=[target for target in targets if not target.startswith("re:")], patterns=patterns)


def _all(module: str) -> bool:
    return True


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    found = config.get(key) or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise Unsupported(key, "a list of names", found, "fix the checkpoint's config.json")
    return list(found)


def _group(size: Any) -> int:
    if size in (None, -1):
        return 0
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise Unsupported("group_size", "a positive integer or -1", size, "fix the checkpoint's config.json")
    return size


def _pair(sizes: Any) -> tuple[int, int] | None:
    """Two positive integers, or None for anything else."""
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 2:
        return None
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        return None
    return sizes[0], sizes[1]
