"""masked_mha: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for
from ..select_topk.api import check_mask_words


def masked_mha(
    q_thd: torch.Tensor,
    k_shd: torch.Tensor,
    v_shv: torch.Tensor,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    scale: float,
    *,
    mask_tw: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with expanded heads to ragged keys (short prefill), optionally only to a selection of them.

        visible   = {s : start[t] <= s < end[t]}, with a mask those of them whose bit is set in mask[t]
        score     = scale * q[t, h] . k[s, h]     over visible s
        out[t, h] = sum_s softmax_s(score) * v[s, h],     lse[t, h] = ln sum_s exp(score)

    A token that sees nothing gives out 0 and lse -inf. What lies in rows a token does not see, NaN included, never
    reaches its result.

    Args:
        q_thd: [T, H, D] float; q, k and v have one dtype, their last dim contiguous, other strides free.
        k_shd: [S, H, D], the keys of every sequence, one sequence after the other.
        v_shv: [S, H, V].
        start_t: [T] int32, first visible key.
        end_t: [T] int32, one past the last visible key.
        scale: of the scores, positive.
        mask_tw: [T, W] int32 as `select_mask` writes it, W >= 4 * ceil(S / 128); last dim contiguous, row stride free.
            Bits of keys outside start .. end - 1 must be 0.
        out: [T, H, V], the dtype of q, last dim contiguous.
        lse: [T, H] float32, last dim contiguous.

    Returns:
        (out [T, H, V] in the dtype of q, lse [T, H] float32).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1 (masked multi-head attention for short prefills) and equation
    2.
    """
    device = q_thd.device
    checks.tensor("q_thd", q_thd, (None, None, None), checks.FLOATS, device)
    tokens, heads, head_dim = q_thd.shape
    checks.rows("q_thd", q_thd)
    checks.tensor("k_shd", k_shd, (None, heads, head_dim), (q_thd.dtype,), device)
    checks.rows("k_shd", k_shd)
    checks.tensor("v_shv", v_shv, (k_shd.shape[0], heads, None), (q_thd.dtype,), device)
    checks.rows("v_shv", v_shv)
    checks.vector("start_t", start_t, tokens, checks.INT32, device)
    checks.vector("end_t", end_t, tokens, checks.INT32, device)
    if mask_tw is not None:
        check_mask_words("mask_tw", mask_tw, tokens, k_shd.shape[0], device)
    checks.attention_outputs(out, lse, (tokens, heads, v_shv.shape[2]), q_thd.dtype, device)
    result: tuple[torch.Tensor, torch.Tensor] = function_for("masked_mha", device)(
        q_thd, k_shd, v_shv, start_t, end_t, scale, mask_tw=mask_tw, out=out, lse=lse
    )
    return result
