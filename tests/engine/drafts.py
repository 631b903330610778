"""A checkpoint whose draft layer guesses right about half of the time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from client import random_prompt
from safetensors.torch import load_file, save_file

from dsv32_plugin.tools.tiny import TinySpec

STEPS = 32
PROMPTS = [random_prompt(length, seed=1) for length in (1, 3, 17, 64, 65, 130, 400)]
SPEC = TinySpec(num_hidden_layers=2, mtp=True)


def half_right(model: Path, out: Path) -> Path:
    """Write to `out` what is made of `model`, a checkpoint of `SPEC`.

    Blocks add little, so the next token depends mostly on the current one, and the draft layer looks at it alone.
    """
    shutil.copytree(model, out)
    draft = f"model.layers.{SPEC.num_hidden_layers}"
    shards = {path: load_file(path) for path in out.glob("*.safetensors")}
    norm = next(tensors["model.norm.weight"] for tensors in shards.values() if "model.norm.weight" in tensors)
    for path, tensors in shards.items():
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor *= 0 if name.startswith(draft) else 0.12
            elif name == f"{draft}.eh_proj.weight":
                tensor.copy_(torch.eye(*tensor.shape))
            elif name == f"{draft}.enorm.weight":
                tensor.fill_(1)
            elif name == f"{draft}.shared_head.norm.weight":
                tensor.copy_(norm)
        save_file(tensors, path, metadata={"format": "pt"})
    return out
