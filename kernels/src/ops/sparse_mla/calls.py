"""What models launch of sparse_mla: 16 to 128 heads of a rank, 1 to 256 tokens, in each dtype that the caches have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...runtime.ahead import Launch
from ...runtime.calls import Call, Spill, empty, latent_cache

RELOADED = "a few addresses, reloaded once a step; the accumulator fills half of the registers"
SPILLS = (
    Spill("attend", {"BLOCK_H": 64}, 80, RELOADED),
    Spill("attend", {}, 16, RELOADED),
    Spill(
        "many_heads", {"FP8": True}, 24, "a few values of the left half, with Triton 3.7 and 3.8 in the widest variant"
    ),
    Spill("few_heads_fp8", {}, 16, "a few addresses of the warps that fetch, once a step of 64 keys"),
)
TOPK = 2048


def calls() -> Iterator[Call]:
    for name, tokens, query in queries():
        slots = {"slots_tk": empty(tokens, TOPK, dtype=torch.int32)}
        yield Call(name, "sparse_mla", query | slots, stands_for_itself)


def queries() -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, tokens, arguments that sparse_mla and dense_mla have in common)."""
    for heads in (16, 32, 64, 128):
        for kind in ("fp8", "bf16", "fp32"):
            dtype = torch.float32 if kind == "fp32" else torch.bfloat16
            for tokens in (1 << n for n in range(9)):
                query = {
                    "q_latent_thc": empty(tokens, heads, 512, dtype=dtype),
                    "q_rope_thr": empty(tokens, heads, 64, dtype=dtype),
                    "latent_cache": latent_cache(kind),
                    "scale": 0.1,
                }
                yield f"{kind}-{heads}heads-{tokens}tokens", tokens, query


def stands_for_itself(launch: Launch) -> bool:
    """Of the portable kernel 1, 4 and 32 chunks stand for all: only the stride of its results differs."""
    return launch.kernel != "attend" or launch.named_constants["SPLITS"] in (1, 4, 32)
