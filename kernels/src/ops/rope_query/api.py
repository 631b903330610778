"""rope_query: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for


def rope_query(
    q_pe_thr: torch.Tensor,
    positions_t: torch.Tensor,
    rope_table_pr: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate the rope part of the attention queries, in pairs (2j, 2j+1), as `norm_rope_cache` rotates the keys.

        out[t, h] = rope(q_pe[t, h], positions[t])

    Args:
        q_pe_thr: [T, H, R] float, last dim contiguous; may be a slice of the query projection.
        positions_t: [T] int64 or int32, in 0..P-1.
        rope_table_pr: [P, R] float32, row = cos (R/2) | sin (R/2). All arithmetic is float32.
        out: [T, H, R] in the dtype of q_pe, last dim contiguous; may be q_pe.

    Returns:
        [T, H, R] in the dtype of q_pe.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. On a GPU it can be captured in a graph.
    Source: DeepSeek-V2 (arXiv 2405.04434), equation 15.
    """
    device = q_pe_thr.device
    checks.tensor("q_pe_thr", q_pe_thr, (None, None, None), checks.FLOATS, device)
    tokens, heads, rope_dim = q_pe_thr.shape
    checks.rows("q_pe_thr", q_pe_thr)
    checks.vector("positions_t", positions_t, tokens, checks.INTS, device)
    checks.rope_table("rope_table_pr", rope_table_pr, rope_dim, device)
    if out is not None:
        checks.tensor("out", out, (tokens, heads, rope_dim), (q_pe_thr.dtype,), device)
        checks.rows("out", out)
    result: torch.Tensor = function_for("rope_query", device)(q_pe_thr, positions_t, rope_table_pr, out=out)
    return result
