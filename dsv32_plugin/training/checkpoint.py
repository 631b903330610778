"""From the training model to a Hugging Face checkpoint and back: the names and storage of the published one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv32_plugin.core.config import DEEPSEEK_V32, ConfigError, DsaConfig
from dsv32_plugin.training import tokenizer
from dsv32_plugin.training.model import DsaModel

FILE = "model.safetensors"
_FLOAT32 = ("e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")
"""Kept in float32 as in the published checkpoint."""


def save(model: DsaModel, config: dict[str, Any], out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, tokenizer and weights into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith(_FLOAT32) else dtype).contiguous().clone()
        for name, tensor in hf_tensors(model)
    }
    save_file(tensors, out / FILE, metadata={"format": "pt"})
    _write_json(out / "config.json", dict(sorted({**config, "torch_dtype": str(dtype).removeprefix("torch.")}.items())))
    ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(out / "generation_config.json", {**ids, "do_sample": False})
    tokenizer.save(out)


def load(folder: Path, device: str | torch.device = "cpu") -> DsaModel:
    """The training model with a checkpoint's weights, in float32.

    Raises:
        ConfigError: the checkpoint is of another architecture, or has no MTP layer.
        ValueError: a tensor is missing, superfluous or of another shape.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: expected a checkpoint folder with a config.json")
    config = DsaConfig.from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if config.architecture != DEEPSEEK_V32:
        raise ConfigError("architectures", DEEPSEEK_V32, config.architecture, "the training model is no other")
    if config.num_nextn_predict_layers != 1:
        raise ConfigError("num_nextn_predict_layers", "1", config.num_nextn_predict_layers, "it trains one MTP layer")
    stored = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    model = DsaModel(config)
    expected = dict(hf_tensors(model))
    wrong = [
        *(f"{name} is missing" for name in expected.keys() - stored.keys()),
        *(f"{name} is unknown" for name in stored.keys() - expected.keys()),
        *(
            f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected.keys() & stored.keys()
            if stored[name].shape != expected[name].shape
        ),
    ]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} tensors do not fit its config.json, such as: {'; '.join(sorted(wrong)[:3])}"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(stored[name])
    return model.to(device).eval()


def hf_tensors(model: DsaModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model (views of its storage) under its published name; shared ones appear twice."""
    mtp = f"model.layers.{model.config.num_layers}"
    yield f"{mtp}.embed_tokens.weight", model.embed.weight
    yield f"{mtp}.shared_head.head.weight", model.head.weight
    for name, tensor in model.state_dict().items():
        for prefix, published in (
            ("embed.", "model.embed_tokens."),
            ("head.", "lm_head."),
            ("mtp.norm.", f"{mtp}.shared_head.norm."),
            ("mtp.", f"{mtp}."),
            ("", "model."),
        ):
            if name.startswith(prefix):
                name = published + name.removeprefix(prefix)
                break
        name = name.replace(".mlp.bias", ".mlp.gate.e_score_correction_bias")
        if tensor.dim() < 3:
            yield name, tensor
            continue
        prefix, _, projection = name.rpartition(".")  # one tensor for all experts here, one for each there
        for expert, weight in enumerate(tensor):
            yield f"{prefix}.experts.{expert}.{projection}.weight", weight


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
