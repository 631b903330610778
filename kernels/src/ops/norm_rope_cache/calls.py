"""What models launch of norm_rope_cache: bfloat16, the sizes of DeepSeek-V3.2 (GLM-5's q_a has the same block)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ...runtime.calls import Call, Spill, empty, index_cache, latent_cache

SPILLS: tuple[Spill, ...] = ()
TOKENS = 3


def calls() -> Iterator[Call]:
    for latent, index, weights, interleaved in itertools.product(
        ("fp8", "bf16"), ("fp8", "bf16", ""), ("fp32", "bf16"), (False, True)
    ):
        name = f"latent-{latent}-index-{index or 'none'}"
        if index:
            name += f"-weights-{weights}" + ("-interleaved" if interleaved else "")
            yield Call(name, "norm_rope_cache", _latent(latent) | _index(index, weights, interleaved))
        elif weights == "fp32" and not interleaved:
            yield Call(name, "norm_rope_cache", _latent(latent) | {"index_k_td": None})


def _latent(kind: str) -> dict[str, Any]:
    return {
        "q_a_tl": empty(TOKENS, 1536),
        "kv_a_tc": empty(TOKENS, 512),
        "k_pe_tr": empty(TOKENS, 64),
        "positions_t": empty(TOKENS, dtype=torch.int64),
        "slots_t": empty(TOKENS, dtype=torch.int64),
        "rope_table_pr": empty(4096, 64, dtype=torch.float32),
        "q_a_weight_l": empty(1536),
        "kv_a_weight_c": empty(512),
        "eps": 1e-6,
        "latent_cache": latent_cache(kind),
    }


def _index(kind: str, weights: str, interleaved: bool) -> dict[str, Any]:
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    return {
        "index_k_td": empty(TOKENS, 128),
        "index_k_weight_d": empty(128, dtype=dtype),
        "index_k_bias_d": empty(128, dtype=dtype),
        "index_cache": index_cache(kind),
        "interleaved": interleaved,
        "rotate": kind == "fp8",
    }
