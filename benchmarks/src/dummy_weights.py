"""Dummy weights that select and route as trained ones do, for every side of `dsv32 bench whole`.

Engines draw all weights from ±0.001, which in e4m3 is nearly always 0: all index scores are equal then, and all tokens
visit the same experts. `variables` puts `install` before everything else in a server's processes; where a launch says
`--load-format dummy`, `fill` draws them instead.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = ("vllm.model_executor.model_loader.weight_utils", "sglang.srt.model_loader.weight_utils")
"""Where they are drawn: all of a model, or, from vLLM 0.33 on, one by its name."""
SAID = "dsv32 bench: drew dummy weights"
"""In the log of a server that has them."""
SPREAD = 0.02
SCALE = 2.0**-5
"""Of a block of fp8, whose codes are between -1 and 1: the values spread as much."""


def variables(folder: Path) -> dict[str, str]:
    """The environment that does it, by a file in this folder."""
    (folder / "sitecustomize.py").write_text(f"from {__name__} import install\n\ninstall()\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def install() -> None:
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in MODULES:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            ours = {"initialize_dummy_weights": fill, "initialize_single_dummy_weight": fill_one}
            theirs = next((name for name in ours if hasattr(module, name)), None)
            if theirs is None:
                raise ImportError(f"{name}: expected one of {', '.join(ours)}, which dsv32 bench whole replaces")
            setattr(module, theirs, ours[theirs])

        loader.exec_module = exec_module
        return spec


@cache
def _say() -> None:
    print(SAID, flush=True)


def fill(model: Any, *given: Any, **options: Any) -> None:
    """Every weight of a module; the arguments besides are the engines' own."""
    for name, weight in model.state_dict().items():
        fill_one(weight, name=name)


def fill_one(weight: Any, *given: Any, name: str, **options: Any) -> None:
    """Norms 1, biases 0, scales of blocks all alike, the rest random; scalars stay."""
    import torch

    _say()
    if not torch.is_floating_point(weight) or weight.numel() == 1 or weight.device.type == "meta":
        return
    generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(f"{name} {weight.shape}".encode()))
    with torch.no_grad():
        if "scale" in name:
            weight.fill_(SCALE)
        elif weight.dim() < 2:
            weight.fill_(0.0 if "bias" in name else 1.0)
        elif weight.dtype.itemsize == 1:
            for part in weight if weight.dim() > 2 else (weight,):
                part.copy_(torch.empty_like(part, dtype=torch.float16).uniform_(-1, 1, generator=generator))
        else:
            weight.normal_(0.0, SPREAD, generator=generator)
