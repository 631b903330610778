"""What models launch of index_logits: 64 heads of 128, in each dtype that the caches have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...runtime.calls import DTYPES, Call, Spill, empty, index_cache

SPILLS: tuple[Spill, ...] = ()
TOKENS = 4096
"""Of a prefill."""
KEYS = 32768


def calls() -> Iterator[Call]:
    for dtype in DTYPES:
        out = empty(TOKENS, KEYS, dtype=torch.float32)
        yield Call(dtype, "index_logits_ragged", ragged(dtype) | {"out": out})
        for tokens in (1, 2, 4):
            out = empty(128 // tokens, tokens, 8192, dtype=torch.float32)
            given = paged(dtype, tokens) | {"max_visible": 8192, "out": out}
            yield Call(f"{dtype}-{tokens}tokens", "index_logits_paged", given)


def ragged(dtype: str) -> dict[str, Any]:
    """A prefill."""
    return {
        "q_tid": empty(TOKENS, 64, 128, dtype=DTYPES[dtype]),
        "weights_ti": empty(TOKENS, 64, dtype=torch.float32),
        "k_sd": empty(KEYS, 128, dtype=DTYPES[dtype]),
        "k_scale_s": empty(KEYS, dtype=torch.float32) if dtype == "fp8" else None,
        "start_t": empty(TOKENS, dtype=torch.int32),
        "end_t": empty(TOKENS, dtype=torch.int32),
    }


def paged(dtype: str, tokens: int) -> dict[str, Any]:
    """A decode of 128 tokens, `tokens` of each sequence."""
    sequences = 128 // tokens
    return {
        "q_bnid": empty(sequences, tokens, 64, 128, dtype=DTYPES[dtype]),
        "weights_bni": empty(sequences, tokens, 64, dtype=torch.float32),
        "index_cache": index_cache(dtype),
        "block_table_bp": empty(sequences, 128, dtype=torch.int32),
        "visible_bn": empty(sequences, tokens, dtype=torch.int32),
    }
