"""The definition of index_query in plain torch."""

import torch

from ...formulas import deliver, rope
from ...formulas import quantize as quantized
from ...formulas import rotate as rotated


def index_query(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    positions_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    *,
    interleaved: bool = False,
    rotate: bool = False,
    quantize: bool = False,
    out: torch.Tensor | None = None,
    weights_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _, heads, index_dim = q_tid.shape
    cos_sin_t1r = rope_table_pr[positions_t].unsqueeze(1)
    query_tid = rope(q_tid, cos_sin_t1r, interleaved=interleaved)
    query_tid = rotated(query_tid) if rotate else query_tid
    weights = weights_ti.float() * (index_dim**-0.5 * heads**-0.5)
    if quantize:
        query_tid, scale_ti1 = quantized(query_tid, index_dim)
        weights = weights * scale_ti1.squeeze(2)
        result = query_tid if out is None else query_tid.view(out.dtype)
    else:
        result = query_tid.to(q_tid.dtype)
    return deliver(result, out), deliver(weights, weights_out)
