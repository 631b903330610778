"""select_topk: checks and dispatch."""

import torch

from ...limits import MAX_TOPK
from ...runtime import checks
from ...runtime.dispatch import function_for


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
    """Select exactly the top K of each row of scores: the same bits on every run, batch and split.

        out[t] = the positions s - start[t] of the K largest logits[t, s], start[t] <= s < end[t], ascending, then -1

    Equal scores: the lower position wins. -0.0 equals +0.0. NaN ranks as -inf, and -inf inside the range is a
    candidate, the lowest. A row with fewer than K candidates selects them all. Nothing outside the range is read for
    its value.

    With a block table the result holds slots instead, still in ascending order of position:

        slot = block_table[seq[t], position // page_size] * page_size + position % page_size

    and -1 where the table has no such page, a negative one, or one whose slots exceed int32.

    Args:
        logits_ts: [T, S] float32, last dim contiguous, row stride free; S up to 2^20, T up to 200,000.
        start_t: [T] int32, or None for 0.
        end_t: [T] int32; values are clipped to S, end <= start is an empty row.
        topk: K, 1 to 4096.
        block_table_bp: [B, pages a sequence] int32, last dim contiguous.
        seq_t: [T] int32, row of the block table for each t; None: T / B consecutive rows for each sequence.
        page_size: tokens a page; goes with block_table_bp.
        out: [T, topk] int32, last dim contiguous.

    Returns:
        [T, topk] int32 (`out` where given).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device; topk is out of range;
            block_table_bp and page_size do not come together; T is not a multiple of B and seq_t is None.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 2; the tie rule and the order are ours.
    """
    device = logits_ts.device
    checks.tensor("logits_ts", logits_ts, (None, None), checks.FLOAT32, device)
    checks.rows("logits_ts", logits_ts)
    tokens = logits_ts.shape[0]
    if start_t is not None:
        checks.vector("start_t", start_t, tokens, checks.INT32, device)
    checks.vector("end_t", end_t, tokens, checks.INT32, device)
    check_selection(tokens, topk, block_table_bp, seq_t, page_size, out, device)
    result: torch.Tensor = function_for("select_topk", device)(
        logits_ts, start_t, end_t, topk, block_table_bp=block_table_bp, seq_t=seq_t, page_size=page_size, out=out
    )
    return result


def check_selection(
    tokens: int,
    topk: int,
    block_table_bp: torch.Tensor | None,
    seq_t: torch.Tensor | None,
    page_size: int | None,
    out: torch.Tensor | None,
    device: torch.device,
) -> None:
    """The arguments that `select_topk` and `index_topk_ragged` have in common."""
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk: must be 1 to {MAX_TOPK}, got {topk}")
    checks.together({"block_table_bp": block_table_bp, "page_size": page_size})
    if block_table_bp is not None and page_size is not None:
        checks.tensor("block_table_bp", block_table_bp, (None, None), checks.INT32, device)
        checks.rows("block_table_bp", block_table_bp)
        checks.at_least("page_size", page_size, 1)
        sequences = block_table_bp.shape[0]
        if seq_t is None and (tokens % sequences if sequences else tokens):
            raise ValueError(f"seq_t: {tokens} rows do not divide among {sequences} sequences; give seq_t")
    if seq_t is not None:
        checks.vector("seq_t", seq_t, tokens, checks.INT32, device)
    if out is not None:
        checks.tensor("out", out, (tokens, topk), checks.INT32, device)
        checks.rows("out", out)
