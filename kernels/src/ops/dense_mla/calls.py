"""What models launch of dense_mla: the queries of sparse_mla, over as many keys as are else selected."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...runtime.calls import Call, empty
from ..sparse_mla.calls import SPILLS, TOPK, queries, stands_for_itself

__all__ = ["SPILLS", "calls"]


def calls() -> Iterator[Call]:
    for name, tokens, query in queries():
        visible = {
            "block_table_bp": empty(tokens, TOPK // 64, dtype=torch.int32),
            "seq_t": empty(tokens, dtype=torch.int32),
            "visible_t": empty(tokens, dtype=torch.int32),
            "max_visible": TOPK,
        }
        yield Call(name, "dense_mla", query | visible, stands_for_itself)
