"""The definition of masked_mha in plain torch."""

import torch

from ...formulas import chunks, softmax_lse, split_finite, weighted_sum


def masked_mha(
    q_thd: torch.Tensor,
    k_shd: torch.Tensor,
    v_shv: torch.Tensor,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    scale: float,
    *,
    selected_tk: torch.Tensor | None = None,
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
        if selected_tk is not None:
            visible_ts &= selected_keys(selected_tk[part], start_t[part], keys)
        scores_ths = scale * torch.einsum("thd,shd->ths", q_thd[part].float(), keys_shd)
        weights_ths, lse[part] = softmax_lse(scores_ths, visible_ts.unsqueeze(1))
        out[part] = weighted_sum(weights_ths, visible_ts, values_shv, spoiled_s).to(out.dtype)
    return out, lse


def selected_keys(selected_tk: torch.Tensor, start_t: torch.Tensor, keys: int) -> torch.Tensor:
    """[T, S] True at the keys start + position for every selected position; a negative position selects nothing."""
    key_tk = selected_tk.long() + start_t.long().unsqueeze(1)
    exists_tk = (selected_tk >= 0) & (key_tk >= 0) & (key_tk < keys)
    chosen = torch.zeros(len(selected_tk), keys + 1, dtype=torch.bool, device=selected_tk.device)
    return chosen.scatter_(1, key_tk.where(exists_tk, keys), True)[:, :keys]
