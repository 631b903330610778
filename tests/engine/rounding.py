"""What DeepSeek-V3.2 rounds to fp8, done to Hugging Face's model, which rounds none of it.

A bfloat16 model with fp8 caches differs from float32 by more than bfloat16 alone: that is no fault of the engine. With
these roundings Hugging Face's own error is the fair measure of the engine's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

MARGIN = 1.25
"""The most that an engine's mean error may be in units of Hugging Face's own with the same roundings."""
FP8_MAX = 448.0
AMAX_FLOOR = 1e-4
TILE = 128
PLAIN = ("weights_proj", "gate", "lm_head", "kv_b_proj")
"""Matrices that are computed in the model's dtype in a block-fp8 checkpoint, too."""


@dataclass(frozen=True)
class Rounding:
    """Which values are rounded to e4m3, with a power-of-two scale for 128 of them."""

    index: bool = False
    """Index keys and queries, after a Hadamard rotation."""
    latents: bool = False
    """The cached latents (not their rope part)."""
    activations: bool = False
    """Inputs of the matrix products of a block-fp8 checkpoint."""


EXACT = Rounding()


def mean_error(found: Sequence[float], exact: Sequence[float]) -> float:
    return statistics.mean(abs(x - y) for x, y in zip(found, exact, strict=True))


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """To e4m3 and back, tiles of 128 of the last dimension apart: scale = 2 ** ceil(log2(amax / 448))."""
    tiles = x.float().unflatten(-1, (-1, TILE))
    amax = tiles.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR)
    scale = torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))
    return ((tiles / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Times the Hadamard matrix of the last dimension's size, orthonormal."""
    size = x.shape[-1]
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (x.float() @ (matrix * size**-0.5).to(x.device)).to(x.dtype)


@contextmanager
def rounded(model: Any, modeling: ModuleType, rounding: Rounding) -> Iterator[None]:
    """Within the block `model`, of the module `modeling`, rounds."""
    with ExitStack() as stack:
        if rounding.index:
            stack.enter_context(patch.object(modeling, "torch", _RoundedScores()))
        for layer in model.model.layers:
            if rounding.latents:
                norm = layer.self_attn.kv_a_layernorm
                stack.enter_context(patch.object(norm, "forward", _after(norm.forward)))
        if rounding.activations:
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] not in PLAIN:
                    stack.enter_context(patch.object(module, "forward", _before(module.forward)))
        yield


class _RoundedScores:
    """`torch`, but for the product of index queries [B, S, I, D] with index keys [B, 1, D, T]."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dim() == 4 and b.dim() == 4 and b.shape[1] == 1 and a.shape[1] > 1:
            a = round_fp8(rotate(a))
            b = round_fp8(rotate(b.transpose(-1, -2))).transpose(-1, -2)
        return torch.matmul(a, b)


def _after(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: round_fp8(forward(x))


def _before(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: forward(round_fp8(x))
