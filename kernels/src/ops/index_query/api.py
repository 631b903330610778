"""index_query: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for


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
    """Rotate and quantise the index queries, and fold every scale into the head weights.

        q_out[t, i]       = rope(q[t, i])[first R of D], then x H / sqrt(D) if rotate, then x / q_scale[t, i]
        weights_out[t, i] = weights[t, i] * q_scale[t, i] * D**-0.5 * I**-0.5              (q_scale = 1 if not quantize)

    so that the index score is sum_i weights_out[t, i] * relu(q_out[t, i] . k). Everything between the input and the
    output is float32. q_scale is the smallest power of two with max(amax, 1e-4) <= 448 * q_scale; H is the Hadamard
    matrix in Sylvester's order.

    Args:
        q_tid: [T, I, D] float, last dim contiguous.
        weights_ti: [T, I] float, last dim contiguous; the output of weights_proj, unscaled.
        positions_t: [T] int64 or int32, in 0..P-1.
        rope_table_pr: [P, R] float32, row = cos (R/2) | sin (R/2).
        interleaved: rope in pairs (2j, 2j+1) (GLM-5) instead of (j, j+R/2) (DeepSeek-V3.2).
        rotate: apply the Hadamard rotation; D is a power of two. The index keys must agree.
        quantize: return e4m3fn, for an fp8 index cache.
        out: [T, I, D], the dtype of q_out or, if quantize, uint8 for its bytes; last dim contiguous.
        weights_out: [T, I] float32, last dim contiguous.

    Returns:
        (q_out [T, I, D] in the dtype of q, or float8_e4m3fn if quantize; weights_out [T, I] float32).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 1, and the inference code of the model repository (`Indexer`).
    """
    device = q_tid.device
    checks.tensor("q_tid", q_tid, (None, None, None), checks.FLOATS, device)
    tokens, heads, index_dim = q_tid.shape
    checks.rows("q_tid", q_tid)
    checks.tensor("weights_ti", weights_ti, (tokens, heads), checks.FLOATS, device)
    checks.rows("weights_ti", weights_ti)
    checks.vector("positions_t", positions_t, tokens, checks.INTS, device)
    checks.rope_table("rope_table_pr", rope_table_pr, None, device)
    checks.index_rope("q_tid", index_dim, rope_table_pr.shape[1], rotate)
    if out is not None:
        checks.tensor("out", out, (tokens, heads, index_dim), checks.FP8 if quantize else (q_tid.dtype,), device)
        checks.rows("out", out)
    if weights_out is not None:
        checks.tensor("weights_out", weights_out, (tokens, heads), checks.FLOAT32, device)
        checks.rows("weights_out", weights_out)
    result: tuple[torch.Tensor, torch.Tensor] = function_for("index_query", device)(
        q_tid,
        weights_ti,
        positions_t,
        rope_table_pr,
        interleaved=interleaved,
        rotate=rotate,
        quantize=quantize,
        out=out,
        weights_out=weights_out,
    )
    return result
