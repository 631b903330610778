"""The definition of select_topk in plain torch."""

import torch

from ...formulas import chunks, deliver, slots_of, to_mask
from ...limits import mask_words

INT32_MAX = torch.iinfo(torch.int32).max


def select_topk(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    *,
    block_table_bp: torch.Tensor | None = None,
    seq_t: torch.Tensor | None = None,
    page_size: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, width = logits_ts.shape
    result = torch.full((tokens, topk), -1, dtype=torch.int32, device=logits_ts.device)
    starts_t = torch.zeros_like(end_t) if start_t is None else start_t
    for part in chunks(tokens, 32 * max(1, width)):
        chosen_tk = topk_positions(logits_ts[part], starts_t[part].long(), end_t[part].long(), topk)
        result[part, : chosen_tk.shape[1]] = chosen_tk.int()
    if block_table_bp is not None:
        assert page_size is not None
        result = positions_to_slots(result, block_table_bp, seq_t, page_size)
    return deliver(result, out)


def select_mask(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, width = logits_ts.shape
    words = mask_words(width) if out is None else out.shape[1]
    result = torch.empty((tokens, words), dtype=torch.int32, device=logits_ts.device)
    starts_t = torch.zeros_like(end_t) if start_t is None else start_t.clamp(0, width)
    for part in chunks(tokens, 32 * max(1, width, 32 * words)):
        position_tk = select_topk(logits_ts[part], starts_t[part], end_t[part], topk).long()
        key_tk = (position_tk + starts_t[part].long().unsqueeze(1)).where(position_tk >= 0, 32 * words)
        selected_ts = torch.zeros(len(key_tk), 32 * words + 1, dtype=torch.bool, device=logits_ts.device)
        result[part] = to_mask(selected_ts.scatter_(1, key_tk, True)[:, :-1])
    return deliver(result, out)


def topk_positions(logits_ts: torch.Tensor, start_t: torch.Tensor, end_t: torch.Tensor, topk: int) -> torch.Tensor:
    """[T, min(topk, S)] ascending positions relative to the start, then -1."""
    width = logits_ts.shape[1]
    start_t1 = start_t.clamp(0, width).unsqueeze(1)
    count_t1 = (end_t.clamp(max=width).unsqueeze(1) - start_t1).clamp(min=0)
    position_s = torch.arange(width, device=logits_ts.device)
    candidate_ts = position_s < count_t1
    value_ts = logits_ts.gather(1, (start_t1 + position_s).where(candidate_ts, 0))
    value_ts = value_ts.where(candidate_ts & ~value_ts.isnan(), float("-inf"))
    order_ts = value_ts.sort(dim=1, descending=True, stable=True).indices
    best_tk = order_ts[:, :topk]
    # Only -inf of higher positions comes behind the candidates, so the first `count` of the order are the candidates.
    exists_tk = position_s[:topk] < count_t1
    ascending_tk = best_tk.where(exists_tk, width).sort(dim=1).values
    return ascending_tk.where(exists_tk, -1)


def positions_to_slots(
    position_tk: torch.Tensor, block_table_bp: torch.Tensor, seq_t: torch.Tensor | None, page_size: int
) -> torch.Tensor:
    if seq_t is None:
        rows_per_sequence = max(1, position_tk.shape[0] // max(1, block_table_bp.shape[0]))
        seq_t = torch.arange(position_tk.shape[0], device=position_tk.device) // rows_per_sequence
    slot_tk = slots_of(block_table_bp, seq_t.long().unsqueeze(1), position_tk.long(), page_size)
    return slot_tk.where(slot_tk <= INT32_MAX, -1).int()
