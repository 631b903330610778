"""The bytes that one rank of a deployment holds, from the sizes of a model and how it is cut.

Checked against the peaks in `benchmarks/results` (tests/test_plan.py).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.kernels import cache_layout

SCORES_BYTES, DECODE_SCORES_BYTES = 256 << 20, 128 << 20
"""Index scores of prefills and of decodes: docs/architecture.md."""
_STREAMS = 4
"""Hidden states that live at once: the residual, what is normalised, what a block takes and what it gives."""


@dataclass(frozen=True)
class Cut:
    """Over how many ranks each part of a model is cut."""

    attention: int
    dense: int
    """Dense blocks and shared experts."""
    experts: int
    embedding: int
    head: int


def weights(config: DsaConfig, cut: Cut, *, drafts: bool = False) -> int:
    """Of one rank; `kv_b_proj` is dequantised, draft layers share embedding and head with the target."""
    key = repr(config), drafts
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, drafts)
    counted = _COUNTED[key].items()
    return sum(count * -(-size // (getattr(cut, part) if part else 1)) for (part, size), count in counted)


_COUNTED: dict[tuple[str, bool], Counter[tuple[str, int]]] = {}
"""Of a config, which has no hash: tens of thousands of tensors of a whole model take a second to count."""


def _count(config: DsaConfig, drafts: bool) -> Counter[tuple[str, int]]:
    """(what of `Cut` says how many ranks share a tensor, its bytes) -> how many there are."""
    split, found = checkpoint.matrices(config), Counter[tuple[str, int]]()
    for tensor in checkpoint.tensors(config):
        layer = checkpoint.layer_of(tensor.name)
        is_draft = layer is not None and layer >= config.num_layers
        if tensor.unused or (is_draft and (not drafts or tensor.name.endswith(checkpoint.SHARED_WITH_TARGET))):
            continue
        module = tensor.name.removesuffix(".weight")
        is_split = module in split and len(tensor.shape) == 2 and not tensor.plain and not module.endswith("kv_b_proj")
        parts = split[module].parts(module).values() if is_split else ()
        size = sum(part.bytes for part in parts)
        found[_part(tensor.name), size or math.prod(tensor.shape) * (4 if tensor.float32 else 2)] += 1
    return found


def _part(name: str) -> str:
    """Of `Cut`; the indexer, norms, routers and what leads to the latents are whole on each rank."""
    if ".mlp.experts." in name:
        return "experts"
    if name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")):
        return "dense"
    if name.endswith(("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight")):
        return "attention"
    return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name, "")


def token_bytes(config: DsaConfig, *, fp8: bool, drafts: bool = False) -> int:
    """Of both caches, over all layers; every rank that holds a sequence holds the whole of it."""
    latents = cache_layout.LATENT_BYTES_FP8 if fp8 else 2 * cache_layout.LATENT_WIDTH
    layers = range(config.num_layers + int(drafts))
    return sum(latents + cache_layout.INDEX_BYTES * config.selects(layer) for layer in layers)


def step(config: DsaConfig, cut: Cut, rows: int, all_rows: int, *, scores: int = SCORES_BYTES) -> int:
    """The most that a step holds besides weights and caches.

    Args:
        rows: tokens of this rank.
        all_rows: tokens that its experts see, of all ranks that attend to sequences of their own.
    """
    heads = config.num_heads // cut.attention
    absorbed = config.kv_lora_rank + config.qk_rope_head_dim
    per_head = config.qk_head_dim + absorbed + config.kv_lora_rank + config.v_head_dim
    attention = 2 * rows * heads * per_head + scores
    dense = 2 * 3 * (all_rows if cut.dense > cut.attention else rows) * config.intermediate_size // cut.dense
    # Both engines keep what their experts' kernels work in.
    pairs, width = all_rows * config.num_experts_per_tok, config.moe_intermediate_size // cut.experts or 1
    experts = 2 * pairs * (max(config.hidden_size, 2 * width) + width) + 2 * all_rows * config.hidden_size
    selection = 4 * rows * config.index_topk
    return _STREAMS * 2 * rows * config.hidden_size + selection + experts + max(attention, dense)


def active(config: DsaConfig, cut: Cut) -> int:
    """Bytes of weights that one rank reads for one token: of the experts, those that it visits."""
    everything = weights(config, cut)
    without = weights(config, Cut(cut.attention, cut.dense, 1 << 62, cut.embedding, cut.head))
    visited = (everything - without) * config.num_experts_per_tok / config.n_routed_experts
    embedding = 2 * config.vocab_size * config.hidden_size // cut.embedding
    return int(without + visited - embedding)
