"""The definitions of index_topk and index_mask in plain torch: scores and selection, chunk after chunk."""

import torch

from ...limits import mask_words
from ..index_logits.reference import index_logits_paged, index_logits_ragged
from ..select_topk.reference import positions_to_slots, select_mask, select_topk


def index_topk_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    topk: int,
    *,
    max_visible: int,
    workspace_bytes: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    sequences, tokens = visible_bn.shape
    if out is None:
        out = q_bnid.new_empty(sequences, tokens, topk, dtype=torch.int32)
    step = max(1, workspace_bytes // max(4, 4 * tokens * max_visible))
    for begin in range(0, sequences, step):
        part = slice(begin, begin + step)
        table_bp, seen_bn = block_table_bp[part], visible_bn[part]
        logits_bns = index_logits_paged(
            q_bnid[part], weights_bni[part], index_cache, table_bp, seen_bn, max_visible=max_visible
        )
        select_topk(
            logits_bns.flatten(0, 1), None, seen_bn.flatten(), topk, block_table_bp=table_bp,
            page_size=index_cache.shape[1], out=out[part].flatten(0, 1),
        )  # fmt: skip
    return out


def index_topk_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    topk: int,
    *,
    block_table_bp: torch.Tensor | None = None,
    seq_t: torch.Tensor | None = None,
    page_size: int | None = None,
    workspace_bytes: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens = q_tid.shape[0]
    if out is None:
        out = q_tid.new_empty(tokens, topk, dtype=torch.int32)
    rows = max(1, workspace_bytes // max(4, 4 * k_sd.shape[0]))
    for begin in range(0, tokens, rows):
        part = slice(begin, begin + rows)
        logits_ts = index_logits_ragged(q_tid[part], weights_ti[part], k_sd, k_scale_s, start_t[part], end_t[part])
        select_topk(logits_ts, start_t[part], end_t[part], topk, out=out[part])
    if block_table_bp is not None:
        assert page_size is not None
        out.copy_(positions_to_slots(out, block_table_bp, seq_t, page_size))
    return out


def index_mask_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    topk: int,
    *,
    workspace_bytes: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, keys = q_tid.shape[0], k_sd.shape[0]
    if out is None:
        out = start_t.new_empty(tokens, mask_words(keys))
    rows = max(1, workspace_bytes // max(4, 4 * keys))
    for begin in range(0, tokens, rows):
        part = slice(begin, begin + rows)
        logits_ts = index_logits_ragged(q_tid[part], weights_ti[part], k_sd, k_scale_s, start_t[part], end_t[part])
        select_mask(logits_ts, start_t[part], end_t[part], topk, out=out[part])
    return out
