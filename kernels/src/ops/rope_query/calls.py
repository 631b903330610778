"""What models launch of rope_query: bfloat16 queries with 64 elements of rope."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...runtime.calls import Call, Spill, empty

SPILLS: tuple[Spill, ...] = ()


def calls() -> Iterator[Call]:
    arguments = {
        "q_pe_thr": empty(3, 16, 64),
        "positions_t": empty(3, dtype=torch.int64),
        "rope_table_pr": empty(4096, 64, dtype=torch.float32),
    }
    yield Call("bf16", "rope_query", arguments)
