"""The definition of index_logits_paged and index_logits_ragged in plain torch."""

import torch

from ...formulas import as_float, chunks, index_rows, slots_of


def index_logits_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    *,
    max_visible: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    sequences, tokens, heads, index_dim = q_bnid.shape
    if out is None:
        out = q_bnid.new_empty(sequences, tokens, max_visible, dtype=torch.float32)
    position_s = torch.arange(max_visible, device=q_bnid.device)
    for part in chunks(sequences, 4 * max_visible * (tokens * heads + 2 * index_dim)):
        seq_b1 = torch.arange(part.start, part.stop, device=q_bnid.device).unsqueeze(1)
        slots_bs = slots_of(block_table_bp, seq_b1, position_s, index_cache.shape[1])
        keys_bsd, scale_bs, present_bs = index_rows(index_cache, slots_bs)
        dots_bnis = torch.einsum("bnid,bsd->bnis", as_float(q_bnid[part]), keys_bsd.float())
        logits_bns = torch.einsum("bni,bnis->bns", weights_bni[part], dots_bnis.relu_())
        if scale_bs is not None:
            logits_bns = logits_bns * scale_bs.unsqueeze(1)
        visible_bns = (position_s < visible_bn[part].unsqueeze(2)) & present_bs.unsqueeze(1)
        out[part] = logits_bns.masked_fill(~visible_bns, float("-inf"))
    return out


def index_logits_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, heads, _ = q_tid.shape
    keys = k_sd.shape[0]
    if out is None:
        out = q_tid.new_empty(tokens, keys, dtype=torch.float32)
    position_s = torch.arange(keys, device=q_tid.device)
    keys_sd = as_float(k_sd)
    for part in chunks(tokens, 4 * keys * (heads + 2)):
        dots_tis = torch.einsum("tid,sd->tis", as_float(q_tid[part]), keys_sd)
        logits_ts = torch.einsum("ti,tis->ts", weights_ti[part], dots_tis.relu_())
        if k_scale_s is not None:
            logits_ts = logits_ts * k_scale_s
        visible_ts = (position_s >= start_t[part].unsqueeze(1)) & (position_s < end_t[part].unsqueeze(1))
        out[part] = logits_ts.masked_fill(~visible_ts, float("-inf"))
    return out
