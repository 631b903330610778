"""What models launch of index_topk: the scores are those of index_logits, without the fill."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...runtime.calls import DTYPES, Call, Spill, empty
from ..index_logits.calls import TOKENS, paged, ragged
from .api import WORKSPACE_BYTES

SPILLS: tuple[Spill, ...] = ()


def calls() -> Iterator[Call]:
    for dtype in DTYPES:
        given = ragged(dtype) | {"topk": 2048, "workspace_bytes": WORKSPACE_BYTES}
        yield Call(dtype, "index_topk_ragged", given)
        yield Call(f"{dtype}-mask", "index_mask_ragged", given)
        # Engines ask for slots, and say of which sequence each token is.
        slots = {"block_table_bp": empty(16, 512, dtype=torch.int32), "seq_t": empty(TOKENS, dtype=torch.int32)}
        yield Call(f"{dtype}-slots", "index_topk_ragged", given | slots | {"page_size": 64})
        for tokens in (1, 2, 4):
            given = paged(dtype, tokens) | {"topk": 2048, "max_visible": 8192, "workspace_bytes": WORKSPACE_BYTES}
            yield Call(f"{dtype}-{tokens}tokens", "index_topk_paged", given)
