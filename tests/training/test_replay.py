"""A forward pass that is handed the choices of another makes them its own, and refuses those of another model."""

from __future__ import annotations

import base64
from functools import partial

import numpy as np
import pytest
import torch
from small import lively_model, random_tokens

from dsv32_plugin.rollout.selection import encode_block, encode_selection
from dsv32_plugin.training.model import DsaModel, Experts, top_k
from dsv32_plugin.training.replay import Replay, from_answers


def chosen(model: DsaModel, tokens: torch.Tensor) -> tuple[torch.Tensor, Replay]:
    """Hidden states of a pass that chooses, and what it chose."""
    keys: dict[int, torch.Tensor] = {}
    experts: dict[int, torch.Tensor] = {}

    def keep(index: object) -> torch.Tensor:
        keys[len(keys)] = top_k(index, model.config.index_topk)
        return keys[len(keys) - 1]

    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda module, inputs, number=number: experts.update(
                {number: module.route(inputs[0]).topk(model.config.num_experts_per_tok, -1).indices}
            )
        )
        for number, layer in enumerate(model.layers)
        if isinstance(layer.mlp, Experts)
    ]
    hidden = model(tokens, select=keep).hidden
    for hook in hooks:
        hook.remove()
    return hidden, Replay(keys, experts)


@torch.no_grad()
def test_the_choices_of_a_pass_give_its_numbers_again() -> None:
    model, tokens = lively_model(), random_tokens(2, 60)
    hidden, replay = chosen(model, tokens)
    assert torch.equal(model(tokens, replay=replay).hidden, hidden)
    # They are used: a model that chooses otherwise gives other numbers without them, and these with them.
    other = lively_model()
    for layer in other.layers:
        layer.self_attn.indexer.wk.weight.neg_()
        if isinstance(layer.mlp, Experts):
            layer.mlp.bias.neg_()
    select = partial(top_k, k=other.config.index_topk)
    assert not torch.allclose(other(tokens, select=select).hidden, hidden, atol=1e-2)
    assert torch.equal(other(tokens, replay=replay).hidden, hidden)
    keys_only = Replay(replay.keys_bts)
    assert not torch.allclose(other(tokens, replay=keys_only).hidden, hidden, atol=1e-4)


def test_weights_and_gradients_of_a_replay_are_those_of_the_model() -> None:
    model, tokens = lively_model(), random_tokens(1, 40)
    with torch.no_grad():
        _, replay = chosen(model, tokens)
    model(tokens, replay=replay).hidden.square().sum().backward()
    moe = next(layer.mlp for layer in model.layers if isinstance(layer.mlp, Experts))
    assert moe.gate.weight.grad is not None
    assert moe.gate.weight.grad.abs().sum() > 0


def as_answer(model: DsaModel, keys: dict[int, torch.Tensor], row: int, positions: int) -> bytes:
    """What a server returns for the first tokens of a sequence."""
    topk, layers = model.config.index_topk, sorted(keys)
    selected = np.zeros((positions - topk, len(layers), topk), np.int32)
    for number, layer in enumerate(layers):
        for token in range(topk, positions):
            selected[token - topk, number] = np.flatnonzero(keys[layer][row, token].numpy())
    blocks = [encode_block(selected_lk, None)[0] for selected_lk in selected]
    return encode_selection(layers, topk, positions, blocks)


@torch.no_grad()
def test_answers_of_several_lengths_become_one_replay() -> None:
    model, tokens, lengths = lively_model(), random_tokens(2, 50), (50, 41)
    hidden, replay = chosen(model, tokens)
    selections, experts = [], []
    for row, length in enumerate(lengths):
        selections.append(base64.b64encode(as_answer(model, dict(replay.keys_bts), row, length - 1)).decode())
        routed = torch.zeros(length - 1, model.config.num_layers, model.config.num_experts_per_tok, dtype=torch.int32)
        for layer, experts_btn in replay.experts_btn.items():
            routed[:, layer] = experts_btn[row, : length - 1]
        experts.append(base64.b64encode(routed.numpy().tobytes()).decode())
    found = model(tokens, replay=from_answers(model.config, lengths, selections=selections, routed_experts=experts))
    for row, length in enumerate(lengths):
        assert torch.allclose(found.hidden[row, : length - 1], hidden[row, : length - 1], atol=1e-5)

    with pytest.raises(ValueError, match=r"selection: expected positions, index_topk and layers \(40, 16"):
        from_answers(model.config, (41, 41), selections=selections)
    with pytest.raises(ValueError, match=r"routed_experts: expected int32 \(40, 3, "):
        from_answers(model.config, (41, 41), routed_experts=experts)


def test_choices_of_another_length_or_model_are_refused() -> None:
    model, tokens = lively_model(), random_tokens(1, 30)
    with torch.no_grad():
        _, replay = chosen(model, tokens)
    with pytest.raises(ValueError, match=r"keys of layer 0: expected \(1, 20, 20\), got \(1, 30, 30\)"):
        model(tokens[:, :20], replay=replay)
    with pytest.raises(ValueError, match="keys of layer 9; this model chooses none there"):
        model(tokens, replay=Replay({9: replay.keys_bts[0]}))
    layer, experts_btn = next(iter(replay.experts_btn.items()))
    with pytest.raises(ValueError, match=f"experts of layer {layer}: expected 0 to"):
        model(tokens, replay=Replay(experts_btn={layer: experts_btn + 999}))
