"""A tiny checkpoint in each format of quantised weights, and the same numbers unquantised: the recipe of both.

compressed-tensors' formats are written and read back by that library itself. AWQ's and GPTQ's libraries do not install
beside an engine: theirs are written by the published layout, and `test_quantised.py` holds them against vLLM's packers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.config import DsaConfig

Parts = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
"""A matrix -> its parts, by the suffix of their names, and what these stand for."""
GROUP = 32
PLAIN = r"lm_head|.*embed_tokens|.*shared_head\.head|.*mlp\.gate|.*eh_proj"
"""What quantisers leave as it is: names that end so."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight values comes first, second, … from the lowest bits on."""


@dataclass(frozen=True)
class Kind:
    """One way to store a checkpoint."""

    config: dict[str, Any]
    """Of config.json."""
    quantise: dict[str, Quantise] = field(compare=False)
    """The first pattern that the whole name of a module matches says how."""

    def of(self, module: str) -> Quantise | None:
        if re.fullmatch(PLAIN, module):
            return None
        return next((made for pattern, made in self.quantise.items() if re.fullmatch(pattern, module)), None)


def write(model: Path, out: Path, kind: Kind) -> tuple[Path, Path]:
    """Write `model` quantised and what it stands for; returns both folders."""
    config = DsaConfig.from_hf(json.loads((model / "config.json").read_text()))
    matrices = {tensor.name for tensor in checkpoint.tensors(config) if len(tensor.shape) == 2}
    folders = out / "quantised", out / "plain"
    for folder in folders:
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored: tuple[Parts, Parts] = ({}, {})
    for path in model.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            module = name.removesuffix(".weight")
            quantise = kind.of(module) if name in matrices else None
            parts, number = ({"weight": tensor}, tensor) if quantise is None else quantise(tensor.float())
            if name in matrices:
                stored[0].update({f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()})
            else:
                stored[0][name] = tensor
            stored[1][name] = number.to(tensor.dtype).contiguous()
    for folder, tensors in zip(folders, stored, strict=True):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folders[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | kind.config))
    return folders


def _by_library(packing: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Quantise:
    """As compressed-tensors does it, with scales in bfloat16 as published."""

    def quantise(weight_nk: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        arguments = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=packing)
        low, high = _extremes(weight_nk, weights)
        scale, zero = calculate_qparams(low, high, arguments)
        state = {"weight": weight_nk, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
        if weights.get("actorder"):
            groups = weight_nk.shape[1] // GROUP
            state["weight_g_idx"] = torch.arange(weight_nk.shape[1], dtype=torch.int32) % groups
        compressor = BaseCompressor.get_value_from_registry(packing)
        state["weight_scale"] = state["weight_scale"].float()
        parts = compressor.compress(state, scheme)
        if weights["strategy"] == "block":  # which the library writes and does not read back
            rows, columns = weights["block_structure"]
            spread = parts["weight_scale"].repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            number = parts["weight"].float() * spread[: weight_nk.shape[0], : weight_nk.shape[1]]
        else:
            number = compressor.decompress(dict(parts), scheme)["weight"]
        return {name: part for name, part in parts.items() if part is not None}, number.float()

    return quantise


def library_orders() -> bool:
    """Whether the compressed-tensors that is installed writes `weight_g_idx`."""
    from compressed_tensors.quantization import QuantizationArgs

    try:
        QuantizationArgs(**INT4_ORDERED)
    except ValueError:
        return False
    return True


def _extremes(weight_nk: torch.Tensor, weights: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest of what shares a scale."""
    n, k = weight_nk.shape
    if weights["strategy"] == "channel":
        shared = weight_nk.unsqueeze(1)
    elif weights["strategy"] == "group":
        # With an order of activations the groups are columns that are GROUPS apart.
        shared = (
            weight_nk.view(n, GROUP, -1).transpose(1, 2) if weights.get("actorder") else weight_nk.view(n, -1, GROUP)
        )
    else:
        rows, columns = weights["block_structure"]
        padded = torch.nn.functional.pad(weight_nk, (0, -k % columns, 0, -n % rows))
        shared = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).permute(0, 2, 1, 3).flatten(2)
    return shared.amin(-1), shared.amax(-1)


def _awq(weight_nk: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    value_ngi, scale_ng, zero_ng = _integers(weight_nk)
    value_kn = value_ngi.flatten(1).T
    parts = {"qweight": _pack(value_kn, AWQ_ORDER), "qzeros": _pack(zero_ng.T, AWQ_ORDER), "scales": scale_ng.T}
    return parts, _number(value_ngi, scale_ng, zero_ng)


def _gptq(offset: int) -> Quantise:
    def quantise(weight_nk: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        scale_ng = (weight_nk.unflatten(1, (-1, GROUP)).abs().amax(-1) / 7).to(torch.bfloat16).float()
        value_ngi = (weight_nk.unflatten(1, (-1, GROUP)) / scale_ng.unsqueeze(-1)).round().clamp(-8, 7).long() + 8
        zero_ng = torch.full_like(scale_ng, 8).long()
        parts = {
            "qweight": _pack(value_ngi.flatten(1)).T,
            "qzeros": _pack(zero_ng.T - offset),
            "scales": scale_ng.T,
            "g_idx": torch.arange(weight_nk.shape[1], dtype=torch.int32) // GROUP,
        }
        return parts, _number(value_ngi, scale_ng, zero_ng)

    return quantise


def _integers(weight_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four bits with a zero point for each group."""
    grouped_ngi = weight_nk.unflatten(1, (-1, GROUP))
    low_ng, high_ng = grouped_ngi.amin(-1).clamp(max=0), grouped_ngi.amax(-1).clamp(min=0)
    scale_ng = ((high_ng - low_ng) / 15).to(torch.bfloat16).float()
    zero_ng = (-low_ng / scale_ng).round().clamp(0, 15)
    value_ngi = (grouped_ngi / scale_ng.unsqueeze(-1) + zero_ng.unsqueeze(-1)).round().clamp(0, 15)
    return value_ngi.long(), scale_ng, zero_ng.long()


def _number(value_ngi: torch.Tensor, scale_ng: torch.Tensor, zero_ng: torch.Tensor) -> torch.Tensor:
    return ((value_ngi - zero_ng.unsqueeze(-1)) * scale_ng.unsqueeze(-1)).flatten(1)


def _pack(value_rx: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[R, 8 * X] of 0 to 15 -> [R, X] int32."""
    eights_rxf = value_rx.unflatten(1, (-1, 8))[..., list(order)]
    packed_rx = sum(eights_rxf[..., place] << (4 * place) for place in range(8))
    return torch.as_tensor(packed_rx).to(torch.uint32).view(torch.int32)


def _group(packing: str, targets: list[str], weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    return {
        "format": packing, "targets": targets, "weights": weights, "input_activations": activations,
        "output_activations": None,
    }  # fmt: skip


def _compressed(packing: str, ignore: list[str], **groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": packing, "ignore": ignore, "config_groups": groups,
        "kv_cache_scheme": None, "quantization_status": "compressed", "global_compression_ratio": None,
    }  # fmt: skip


def _arguments(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True, "dynamic": False} | more


INT4 = _arguments("int", 4, "group", group_size=GROUP)
INT4_ASYMMETRIC = INT4 | {"symmetric": False}
INT4_ORDERED = INT4 | {"actorder": "group"}
INT8, FP8 = _arguments("int", 8, "channel"), _arguments("float", 8, "channel")
FP8_BLOCKS = _arguments("float", 8, "block", block_structure=[128, 128])
TOKEN_INT8, TOKEN_FP8 = (_arguments(kind, 8, "token", dynamic=True) for kind in ("int", "float"))
IGNORED = ["lm_head", r"re:.*mlp\.gate$", r"re:.*eh_proj$"]
EXPERTS = r".*mlp\.experts\..*"


def _one(packing: str, weights: dict[str, Any], activations: Any = None, *ignored: str) -> Kind:
    """All linear layers alike, but for those that are left out."""
    patterns = [name.removeprefix("re:").removesuffix("$") for name in ignored]
    quantise: dict[str, Any] = dict.fromkeys(patterns)
    group = _group(packing, ["Linear"], weights, activations)
    config = _compressed(packing, [*IGNORED, *ignored], group_0=group)
    return Kind({"quantization_config": config}, quantise | {".*": _by_library(packing, weights)})


def _w4a8() -> Kind:
    """Experts int4, all else block-fp8, as GLM-5.x is published for Hopper; under the library's older key."""
    groups = {
        "group_0": _group("pack-quantized", [f"re:{EXPERTS}"], INT4, TOKEN_FP8),
        "group_1": _group("float-quantized", ["Linear"], FP8_BLOCKS, TOKEN_FP8),
    }
    quantise = {
        EXPERTS: _by_library("pack-quantized", INT4),
        ".*": _by_library("float-quantized", FP8_BLOCKS),
    }
    return Kind({"compression_config": _compressed("mixed-precision", IGNORED, **groups)}, quantise)


KINDS = {
    "w4a16": _one("pack-quantized", INT4),
    # The attention in bfloat16 but for its output, `kv_b_proj` and what is joined with an index key that is not.
    "w4a16-mixed": _one("pack-quantized", INT4, None, r"re:.*indexer\..*$", r"re:.*self_attn\.q_b_proj$"),
    "w4a16-asymmetric": _one("pack-quantized", INT4_ASYMMETRIC),
    "w4a16-ordered": _one("pack-quantized", INT4_ORDERED),
    "w8a8-int8": _one("int-quantized", INT8, TOKEN_INT8),
    "w8a8-fp8": _one("float-quantized", FP8, TOKEN_FP8),
    "w4a8": _w4a8(),
    "awq": Kind(
        {
            "quantization_config": {
                "quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True,
                "modules_to_not_convert": ["indexer.wk", "mlp.gate.", "layers.0."],
            }
        },
        {r".*layers\.0\..*|.*indexer\.wk": None, ".*": _awq},  # type: ignore[dict-item]
    ),
    "gptq": Kind(
        {
            "quantization_config": {
                "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
                "checkpoint_format": "gptq", "dynamic": {r"-:.*\.indexer\..*": {}},
            }
        },
        {r".*\.indexer\..*": None, ".*": _gptq(1)},  # type: ignore[dict-item]
    ),
    "gptq-v2": Kind(
        {
            "quantization_config": {
                "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
                "checkpoint_format": "gptq_v2",
            }
        },
        {".*": _gptq(0)},
    ),
}  # fmt: skip
