"""The definition of rope_query in plain torch."""

import torch

from ...formulas import deliver, rope


def rope_query(
    q_pe_thr: torch.Tensor,
    positions_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    turned_thr = rope(q_pe_thr, rope_table_pr[positions_t].unsqueeze(1), interleaved=True)
    return deliver(turned_thr.to(q_pe_thr.dtype), out)
