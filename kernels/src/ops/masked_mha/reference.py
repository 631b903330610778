"""The definition of masked_mha in plain torch."""

import torch

from ...formulas import chunks, from_mask, softmax_lse, split_finite, weighted_sum


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
    tokens, heads, _ = q_thd.shape
    keys, _, value_dim = v_shv.shape
    if out is None:
        out = q_thd.new_empty(tokens, heads, value_dim)
    if lse is None:
        lse = q_thd.new_empty(tokens, heads, dtype=torch.float32)
    keys_shd = k_shd.float()
    values_shv, spoiled_s = split_finite(v_shv.float())
    position_s = torch.arange(keys, device=q_thd.device)
    for part in chunks(tokens, 12 * heads * max(1, keys)):
        visible_ts = (position_s >= start_t[part].unsqueeze(1)) & (position_s < end_t[part].unsqueeze(1))
        if mask_tw is not None:
            visible_ts &= from_mask(mask_tw[part])[:, :keys]
        scores_ths = scale * torch.einsum("thd,shd->ths", q_thd[part].float(), keys_shd)
        weights_ths, lse[part] = softmax_lse(scores_ths, visible_ts.unsqueeze(1))
        out[part] = weighted_sum(weights_ths, visible_ts, values_shv, spoiled_s).to(out.dtype)
    return out, lse
