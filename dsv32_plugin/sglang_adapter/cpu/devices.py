"""Where tensors lie that SGLang makes for a GPU without asking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_gpu() -> Iterator[None]:
    """Inside the block tensors that SGLang makes on a GPU, or to be copied there, are made here."""

    def here(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*values: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> torch.Tensor:
            return make(*values, device="cpu" if device == "cuda" else device, **options)

        return made

    originals = {name: getattr(torch, name) for name in ("tensor", "empty", "full")}
    for name, make in originals.items():
        setattr(torch, name, here(make))
    try:
        yield
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)
