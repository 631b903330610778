"""A forward pass that chooses nothing: keys and experts are those that a rollout chose, as its answers brought them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.rollout import Selection, decode_selection


@dataclass(frozen=True)
class Replay:
    """Choices of B sequences, padded to one length T, by the number of the layer; other layers choose by themselves."""

    keys_bts: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """bool: which keys each token attends to; padding attends to itself."""
    experts_btn: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """int64: the experts that each token visits; those of padding are any."""

    def check(self, config: DsaConfig, batch: int, length: int) -> None:
        """Raise ValueError unless the choices are of this model and of tokens [batch, length]."""
        chosen = {"keys": (self.keys_bts, length), "experts": (self.experts_btn, config.num_experts_per_tok)}
        for name, (by_layer, width) in chosen.items():
            for layer, tensor in by_layer.items():
                known = range(config.num_layers) if name == "keys" else filter(config.is_moe, range(config.num_layers))
                if layer not in known:
                    raise ValueError(f"replay: {name} of layer {layer}; this model chooses none there")
                if tensor.shape != (batch, length, width):
                    expected = (batch, length, width)
                    raise ValueError(f"replay: {name} of layer {layer}: expected {expected}, got {tuple(tensor.shape)}")
        for layer, tensor in self.experts_btn.items():
            if int(tensor.min()) < 0 or int(tensor.max()) >= config.n_routed_experts:
                raise ValueError(
                    f"replay: experts of layer {layer}: expected 0 to {config.n_routed_experts - 1}, "
                    f"got {int(tensor.min())} to {int(tensor.max())}"
                )


def from_answers(
    config: DsaConfig,
    lengths: Sequence[int],
    *,
    selections: Sequence[str | bytes] | None = None,
    routed_experts: Sequence[str | bytes] | None = None,
) -> Replay:
    """What a served engine returned for sequences of these lengths, prompts included and last tokens, too.

    Args:
        selections: `indexer_topk` of each answer.
        routed_experts: `routed_experts` of each answer: int32 [length - 1, layers, experts of a token].

    Raises:
        ValueError: an answer is of another length or model, or does not know a position.
    """
    longest = max(lengths)
    keys_bts: dict[int, torch.Tensor] = {}
    experts_btn: dict[int, torch.Tensor] = {}
    for row, selection in enumerate(map(decode_selection, selections or ())):
        _check_selection(config, selection, lengths[row])
        for layer in range(config.num_layers):
            if layer not in keys_bts:
                keys_bts[layer] = torch.eye(longest, dtype=torch.bool).repeat(len(lengths), 1, 1)
            size = selection.positions
            keys_bts[layer][row, :size, :size] = torch.from_numpy(selection.mask(_selecting(selection, layer)))
    for row, routed in enumerate(routed_experts or ()):
        data = base64.b64decode(routed) if isinstance(routed, str) else routed
        shape = (lengths[row] - 1, config.num_layers, config.num_experts_per_tok)
        if len(data) != 4 * shape[0] * shape[1] * shape[2]:
            raise ValueError(f"routed_experts: expected int32 {shape}, got {len(data)} bytes: another length or model")
        routed_tln = torch.from_numpy(np.frombuffer(data, np.int32).reshape(shape).astype(np.int64))
        for layer in filter(config.is_moe, range(config.num_layers)):
            if layer not in experts_btn:
                # Different ones, since the same expert twice is no choice.
                experts_btn[layer] = torch.arange(shape[2]).repeat(len(lengths), longest, 1)
            experts_btn[layer][row, : shape[0]] = routed_tln[:, layer]
    return Replay(keys_bts, experts_btn)


def _check_selection(config: DsaConfig, selection: Selection, length: int) -> None:
    layers = tuple(filter(config.selects, range(config.num_layers)))
    expected = (length - 1, config.index_topk, layers)
    found = (selection.positions, selection.topk, selection.layers)
    if found != expected:
        raise ValueError(f"selection: expected positions, index_topk and layers {expected}, got {found}")


def _selecting(selection: Selection, layer: int) -> int:
    """The layer whose selection this one uses."""
    return max(number for number in selection.layers if number <= layer)
