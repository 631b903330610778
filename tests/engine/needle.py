"""A checkpoint whose weights are set by formula: it answers rightly only if exactly the right keys are selected.

A prompt is a haystack of fillers that hides *needles* "key -> value" and ends with a token that asks for a key. The
answer is the needle's value, and is itself the next question, so that a chain of answers follows needle after needle.

For a question, the index scores put, from the best:
    K - 1 *guards*, whose values attention ignores,
    the needle asked for, the K-th,
    the *decoys*, whose wrong value attention prefers to any needle's,
    everything else.
So with K - 1 keys the needle is lost and with K + 1 a decoy wins; half of the index heads score with the opposite sign,
so that only the ReLU keeps the sum from vanishing. A prompt of at most K tokens selects all of them: a decoy answers.

The multi-token prediction layer, where there is one, is the same layer fed with the next token's embedding, so its
drafts are right exactly if its own selection is.

    write(folder, topk=64)
    haystack = prompt(300, topk=64, seed=0)
    haystack.tokens, haystack.answers(8)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv32_plugin.kernels.cache_layout import PAGE_SIZE
from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.tiny import VOCAB_SIZE, TinySpec

CLASSES = 16
"""Different keys, and different values."""
ASK = 6000
"""Token ASK + c asks for key c, and is the answer "value c"."""
NEEDLE = 4000
"""Token NEEDLE + CLASSES * key + value."""
DECOY = 3000
GUARD = 2000
FILLERS = (10_000, 120_000)
DECOYS = 8

HIDDEN, Q_RANK, INDEX_ROPE = 256, 128, 64
# Coordinates of the residual stream. Every embedding has the norm sqrt(HIDDEN), so that RMSNorm changes none.
QUESTION, KEY, VALUE = 0, 16, 32
IS_GUARD, IS_DECOY, ALWAYS, PADDING = 48, 49, 50, 51
NOISE, NOISES = 64, 40
ANSWER = 128
SQUARED_NORM = 4.0
# Index score of a question with: a guard, the needle asked for (KEY_SCORE + BASE_SCORE), a decoy, a filler (at most).
GUARD_SCORE, KEY_SCORE, BASE_SCORE, DECOY_SCORE, FILLER_SCORE = 0.95, 0.65, 0.2, 0.6, 0.3
ATTENTION_GAIN = 5.0
"""Attention logits: about 40 for the needle asked for, 60 for a decoy, 0 for all else."""
LOGIT_GAIN = 4.0


@dataclass(frozen=True)
class Haystack:
    tokens: list[int]
    first: int
    """The key that the last token asks for."""
    chain: tuple[int, ...]
    """For each key its needle's value."""
    decoy: int | None
    """The value that every answer has where all keys are selected, else None."""

    def answers(self, count: int) -> list[int]:
        """The right continuation."""
        if self.decoy is not None:
            return [ASK + self.decoy] * count
        asked, found = self.first, []
        for _ in range(count):
            asked = self.chain[asked]
            found.append(ASK + asked)
        return found


def prompt(length: int, *, topk: int, seed: int, steps: int = 32) -> Haystack:
    """A haystack of `length` tokens for a checkpoint that selects `topk` keys; answered for `steps` tokens at most.

    Nothing is hidden at the start of a page: where a prefill is cut, vLLM 0.26.0 gives the draft layer the last token
    of the prompt in place of the next one, and a lone request is cut at pages.

    Raises:
        ValueError: the haystack is too small for what it hides.
    """
    all_selected = length + steps <= topk
    guards = 0 if all_selected else topk - 1
    hidden = guards + CLASSES + DECOYS
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(2, length - 1)
    places = places[places % PAGE_SIZE != 0]
    if len(places) < hidden:
        raise ValueError(
            f"length: expected room for {hidden} special tokens, got {length}, which has {len(places)} places"
        )
    tokens = torch.randint(*FILLERS, (length,), generator=generator)
    tokens[0] = 0
    # One cycle through all classes, so that no answer repeats early.
    order = torch.randperm(CLASSES, generator=generator).tolist()
    chain = dict(zip(order, order[1:] + order[:1], strict=True))
    decoy = order[CLASSES // 2]
    needles = [NEEDLE + CLASSES * key + value for key, value in chain.items()]
    special = [*[GUARD] * guards, *needles, *[DECOY + decoy] * DECOYS]
    places = places[torch.randperm(len(places), generator=generator)[:hidden]]
    tokens[places] = torch.tensor(special)
    tokens[-1] = ASK + order[0]
    in_order = tuple(chain[key] for key in range(CLASSES))
    return Haystack(tokens.tolist(), order[0], in_order, decoy if all_selected else None)


def write(out: Path, *, topk: int, mtp: bool = False, dtype: str = "float32") -> None:
    """Write the checkpoint: the files of `dsv32 tiny`, every weight replaced."""
    spec = TinySpec(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        q_lora_rank=Q_RANK,
        index_topk=topk,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=128,
        rope_original=4096,
        mtp=mtp,
        dtype=dtype,
    )
    tiny.write(spec, out)
    config = json.loads((out / "config.json").read_text())
    values = _values(config)
    for shard in sorted(out.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            value = values.get(name.removeprefix("model.").removeprefix("layers.0.").removeprefix("layers.1."))
            is_norm_weight = name.endswith("norm.weight")
            tensor.fill_(1.0 if is_norm_weight else 0.0)
            if value is not None:
                tensor.copy_(value)
        save_file(tensors, shard, metadata={"format": "pt"})


def _values(config: dict) -> dict[str, torch.Tensor]:
    """The weights that are neither 0 nor, of a norm, 1. Names without the layer: both layers are the same."""
    heads, nope, value_dim = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    classes = torch.arange(CLASSES)
    embedding = _embedding()

    q_a = torch.zeros(Q_RANK, HIDDEN)
    q_a[classes, QUESTION + classes] = 1.0
    q_a[CLASSES, ALWAYS] = 2.0  # `ALWAYS` is half as long in an embedding as a question

    q_b = torch.zeros(heads, nope + config["qk_rope_head_dim"], Q_RANK)
    q_b[:, classes, classes] = ATTENTION_GAIN
    q_b[:, CLASSES, CLASSES] = ATTENTION_GAIN
    kv_a = torch.zeros(config["kv_lora_rank"] + config["qk_rope_head_dim"], HIDDEN)
    kv_a[:HIDDEN] = torch.eye(HIDDEN)
    kv_b = torch.zeros(heads, nope + value_dim, config["kv_lora_rank"])
    kv_b[:, classes, KEY + classes] = 1.0
    kv_b[:, CLASSES, IS_DECOY] = 1.0
    kv_b[:, nope + classes, VALUE + classes] = 1.0
    out = torch.zeros(HIDDEN, heads, value_dim)
    out[ANSWER + classes, :, classes] = 1.0 / heads

    # Directions of an index key: orthogonal, of mean 0 (LayerNorm takes it off), where rope leaves them alone.
    directions = torch.zeros(64, config["index_head_dim"])
    directions[:, INDEX_ROPE:] = _hadamard(64) / 8
    of_class, of_guard, of_noise = directions[1 : 1 + CLASSES], directions[17], directions[18 : 18 + NOISES]
    wk = torch.zeros(config["index_head_dim"], HIDDEN)
    wk[:, KEY : KEY + CLASSES] = of_class.T
    wk[:, IS_GUARD] = of_guard
    wk[:, NOISE : NOISE + NOISES] = of_noise.T
    index_heads = config["index_n_heads"]
    sign = torch.ones(index_heads, 1)
    sign[1::2] = -1.0
    wq_b = torch.zeros(index_heads, config["index_head_dim"], Q_RANK)
    wq_b[:, :, :CLASSES] = sign[..., None] * of_class.T
    wq_b[:, :, CLASSES] = sign * of_guard
    weights_proj = torch.zeros(index_heads, HIDDEN)
    weights_proj[:, ALWAYS] = 1.0

    lm_head = torch.zeros(VOCAB_SIZE, HIDDEN)
    lm_head[ASK + classes, ANSWER + classes] = LOGIT_GAIN
    return {
        "embed_tokens.weight": embedding,
        "lm_head.weight": lm_head,
        "shared_head.head.weight": lm_head,
        "eh_proj.weight": torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1),
        "self_attn.q_a_proj.weight": q_a,
        "self_attn.q_b_proj.weight": q_b.flatten(0, 1),
        "self_attn.kv_a_proj_with_mqa.weight": kv_a,
        "self_attn.kv_b_proj.weight": kv_b.flatten(0, 1),
        "self_attn.o_proj.weight": out.flatten(1),
        "self_attn.indexer.wk.weight": wk,
        "self_attn.indexer.wq_b.weight": wq_b.flatten(0, 1),
        "self_attn.indexer.weights_proj.weight": weights_proj,
    }


def _embedding() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(VOCAB_SIZE, HIDDEN)
    noise = torch.nn.functional.normalize(torch.randn(VOCAB_SIZE, NOISES, generator=generator), dim=1)
    rows[:, IS_GUARD] = torch.rand(VOCAB_SIZE, generator=generator) * FILLER_SCORE
    rows[:, ALWAYS] = 0.5
    classes = torch.arange(CLASSES)
    rows[GUARD, IS_GUARD] = GUARD_SCORE
    rows[ASK + classes, IS_GUARD] = 0.0
    rows[ASK + classes, QUESTION + classes] = 1.0
    rows[DECOY + classes, IS_GUARD] = DECOY_SCORE
    rows[DECOY + classes, IS_DECOY] = 1.0
    rows[DECOY + classes, VALUE + classes] = 1.0
    for key in range(CLASSES):
        needles = NEEDLE + CLASSES * key + classes
        rows[needles, KEY + key] = KEY_SCORE
        rows[needles, IS_GUARD] = BASE_SCORE
        rows[needles, VALUE + classes] = 1.0
    # The noise fills the index key up to length 1, the padding the whole up to its norm.
    index_part = rows[:, IS_GUARD] ** 2 + rows[:, KEY : KEY + CLASSES].square().sum(1)
    rows[:, NOISE : NOISE + NOISES] = noise * (1 - index_part).sqrt()[:, None]
    rows[:, PADDING] = (SQUARED_NORM - rows.square().sum(1)).sqrt()
    return rows * (HIDDEN / SQUARED_NORM) ** 0.5


def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix
