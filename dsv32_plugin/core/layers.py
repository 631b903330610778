"""What a model is built from: the layers that an engine has, and plain ones of torch for tests and measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """The tensor parallel ranks, each of which holds the whole indexer."""

    rank: int
    size: int
    all_gather: Callable[[torch.Tensor], torch.Tensor]
    """[T, K] of this rank -> [size * T, K] of all, in their order."""


class Layers(Protocol):
    """What an engine builds a model from. Linear layers have no bias and return a tuple that begins with the result."""

    tp_rank: int
    tp_size: int
    ranks: Ranks | None
    """With whom the selection of prefills is shared out."""

    def replicated(self, inputs: int, outputs: int, prefix: str, *, quantised: bool = True) -> nn.Module:
        """The whole matrix on every rank."""

    def merged(self, inputs: int, widths: Sequence[int], prefix: str, *, quantised: bool = True) -> nn.Module:
        """Several matrices over one input, whole on every rank, as one product."""

    def column(self, inputs: int, outputs: int, prefix: str) -> nn.Module:
        """The outputs cut over the ranks."""

    def gate_up(self, inputs: int, width: int, prefix: str) -> nn.Module:
        """Two matrices of the same width over one input as one product, each one's outputs cut over the ranks."""

    def row(self, inputs: int, outputs: int, prefix: str, *, reduce: bool = True) -> nn.Module:
        """The inputs cut over the ranks, the results added up unless told not to."""

    def silu_and_mul(self) -> nn.Module:
        """silu(first half) * second half."""

    def norm(self, size: int, eps: float) -> nn.Module:
        """RMSNorm; given a residual, too, of the sum of both, which it returns as well."""


class TorchLayers:
    """Layers of one process in plain torch: the real model without an engine."""

    tp_rank, tp_size = 0, 1
    ranks: Ranks | None = None

    def replicated(self, inputs: int, outputs: int, prefix: str, *, quantised: bool = True) -> nn.Module:
        return _Linear(inputs, outputs)

    def merged(self, inputs: int, widths: Sequence[int], prefix: str, *, quantised: bool = True) -> nn.Module:
        return _Linear(inputs, sum(widths))

    def column(self, inputs: int, outputs: int, prefix: str) -> nn.Module:
        return _Linear(inputs, outputs)

    def gate_up(self, inputs: int, width: int, prefix: str) -> nn.Module:
        return _Linear(inputs, 2 * width)

    def row(self, inputs: int, outputs: int, prefix: str, *, reduce: bool = True) -> nn.Module:
        return _Linear(inputs, outputs)

    def silu_and_mul(self) -> nn.Module:
        return _SiluAndMul()

    def norm(self, size: int, eps: float) -> nn.Module:
        return _Norm(size, eps)


class _Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class _SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class _Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size), requires_grad=False), eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        total = x + residual
        return nn.functional.rms_norm(total, self.weight.shape, self.weight, self.eps), total
