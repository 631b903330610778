"""What models launch of the gathers: caches of the real widths, in fp8 and in bfloat16, gathered into bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...runtime.calls import Call, Spill, empty, index_cache, latent_cache

SPILLS: tuple[Spill, ...] = ()


def calls() -> Iterator[Call]:
    rows: dict[str, Any] = {
        "block_table_bp": empty(2, 64, dtype=torch.int32),
        "cu_seqlens_b1": empty(3, dtype=torch.int32),
        "total": 1000,
    }
    for cache in ("fp8", "bf16"):
        yield Call(cache, "gather_index_keys", {"index_cache": index_cache(cache), **rows})
        latents = {"latent_cache": latent_cache(cache), "dtype": torch.bfloat16}
        yield Call(cache, "gather_latents", latents | rows)
