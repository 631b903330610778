"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalised(matrices_nrc: torch.Tensor) -> torch.Tensor:
    """About the nearest matrices with all singular values 1, by Newton-Schulz in bfloat16 ([N, rows, columns])."""
    a, b, c = NEWTON_SCHULZ
    x = matrices_nrc.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices, and stacks of matrices [..., rows, columns]; all of one shape are updated together."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for shape, parameters in same_shape.items():
                self._update(shape, parameters, group["lr"], group["momentum"])

    def _update(self, shape: torch.Size, parameters: list[torch.Tensor], lr: float, momentum: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            buffers.append(state["momentum"])
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        rows, columns = shape[-2:]
        update = orthogonalised(torch.stack(list(ahead)).reshape(-1, rows, columns)).reshape(-1, *shape)
        size = lr * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(parameters, list(update.to(parameters[0].dtype)), alpha=-size)
