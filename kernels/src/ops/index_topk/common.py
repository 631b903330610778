"""Index logits and their top K in bounded memory on a GPU: chunks of sequences or of tokens, scores never filled.

Keys that no token of a block sees are neither scored nor written, nor any of a decode that sees no more than K: it
selects them all. The selection reads a row's own range only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton

from ...limits import mask_words

ROWS = 8
"""Parts are multiples of this many tokens, so that no block of tokens is cut."""


def index_topk_paged(
    launch_logits: Callable[..., object],
    launch_selection: Callable[..., None],
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
    device = q_bnid.device
    if out is None:
        out = torch.empty((sequences, tokens, topk), dtype=torch.int32, device=device)
    stride = _row_stride(max_visible)
    step = min(sequences, max(1, workspace_bytes // (4 * tokens * stride)))
    workspace = torch.empty((step, tokens, stride), dtype=torch.float32, device=device)
    for begin in range(0, sequences, max(1, step)):
        part = slice(begin, min(begin + step, sequences))
        logits_bns = workspace[: part.stop - begin, :, :max_visible]
        launch_logits(
            q_bnid[part], weights_bni[part], index_cache, block_table_bp[part], visible_bn[part], logits_bns,
            fill=False, selected=topk,
        )  # fmt: skip
        launch_selection(
            logits_bns.flatten(0, 1), None, visible_bn[part].view(-1), topk, block_table_bp[part], None,
            index_cache.shape[1], tokens, 0, out[part].view(-1, topk),
        )  # fmt: skip
    return out


def _row_stride(keys: int) -> int:
    """Rows of scores begin at multiples of 16 bytes: the selection loads vectors."""
    return max(4, triton.cdiv(keys, 4) * 4)


def index_topk_ragged(
    launch_logits: Callable[..., object],
    launch_selection: Callable[..., None],
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
    tokens, keys = q_tid.shape[0], k_sd.shape[0]
    device = q_tid.device
    if out is None:
        out = torch.empty((tokens, topk), dtype=torch.int32, device=device)
    rows_per_sequence = 1 if block_table_bp is None else max(1, tokens // max(1, block_table_bp.shape[0]))
    stride = _row_stride(keys)
    parts = parts_of(tokens, max(1, workspace_bytes // (4 * stride)))
    rows = max((part.stop - part.start for part in parts), default=0)
    workspace = torch.empty((rows, stride), dtype=torch.float32, device=device)
    for part in parts:
        logits_ts = workspace[: part.stop - part.start, :keys]
        launch_logits(q_tid[part], weights_ti[part], k_sd, k_scale_s, start_t[part], end_t[part], logits_ts, fill=False)
        launch_selection(
            logits_ts, start_t[part], end_t[part], topk, block_table_bp, seq_t, page_size, rows_per_sequence,
            part.start, out[part],
        )  # fmt: skip
    return out


def index_mask_ragged(
    launch_logits: Callable[..., object],
    launch_selection: Callable[..., None],
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
    if out is None:
        words = mask_words(k_sd.shape[0])
        out = torch.empty((q_tid.shape[0], words), dtype=torch.int32, device=q_tid.device)
    return index_topk_ragged(
        launch_logits, functools.partial(launch_selection, bits=True), q_tid, weights_ti, k_sd, k_scale_s, start_t,
        end_t, topk, workspace_bytes=workspace_bytes, out=out.zero_(),
    )  # fmt: skip


def parts_of(tokens: int, rows: int) -> list[slice]:
    """As few parts of at most `rows` tokens as can be, all about as long: short ones are selected in another way."""
    unit = ROWS if rows >= ROWS else 1
    units, count = triton.cdiv(tokens, unit), triton.cdiv(tokens, rows // unit * unit)
    return [slice(unit * (units * i // count), min(tokens, unit * (units * (i + 1) // count))) for i in range(count)]
