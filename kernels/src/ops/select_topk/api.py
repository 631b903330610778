"""select_topk and select_mask: checks and dispatch."""

import torch

from ...limits import MAX_TOPK, mask_words
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
    check_scores(logits_ts, start_t, end_t)
    check_selection(logits_ts.shape[0], topk, block_table_bp, seq_t, page_size, out, device)
    result: torch.Tensor = function_for("select_topk", device)(
        logits_ts, start_t, end_t, topk, block_table_bp=block_table_bp, seq_t=seq_t, page_size=page_size, out=out
    )
    return result


def select_mask(
    logits_ts: torch.Tensor,
    start_t: torch.Tensor | None,
    end_t: torch.Tensor,
    topk: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select as `select_topk` does, and return a bit for every key in place of a list.

        the bit of key s in out[t] = 1 if s - start[t] in select_topk(logits, start, end, topk)[t] else 0

    Key s is bit 2 * (s % 128 // 8) + s % 2 of word 4 * (s // 128) + s % 8 // 2.

    Args:
        logits_ts, start_t, end_t, topk: as `select_topk`.
        out: [T, W] int32, W >= 4 * ceil(S / 128), last dim contiguous, row stride free. All its words are written.

    Returns:
        [T, W] int32 (`out` where given, else W = 4 * ceil(S / 128)).

    Raises:
        TypeError, ValueError: as `select_topk`.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 2; the mask is ours.
    """
    check_scores(logits_ts, start_t, end_t)
    check_mask(logits_ts.shape[0], logits_ts.shape[1], topk, out, logits_ts.device)
    result: torch.Tensor = function_for("select_mask", logits_ts.device)(logits_ts, start_t, end_t, topk, out=out)
    return result


def check_scores(logits_ts: torch.Tensor, start_t: torch.Tensor | None, end_t: torch.Tensor) -> None:
    device = logits_ts.device
    checks.tensor("logits_ts", logits_ts, (None, None), checks.FLOAT32, device)
    checks.rows("logits_ts", logits_ts)
    tokens = logits_ts.shape[0]
    if start_t is not None:
        checks.vector("start_t", start_t, tokens, checks.INT32, device)
    checks.vector("end_t", end_t, tokens, checks.INT32, device)


def check_mask(tokens: int, keys: int, topk: int, out: torch.Tensor | None, device: torch.device) -> None:
    """The arguments that `select_mask` and `index_mask_ragged` have in common."""
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk: must be 1 to {MAX_TOPK}, got {topk}")
    if out is not None:
        check_mask_words("out", out, tokens, keys, device)


def check_mask_words(name: str, mask_tw: torch.Tensor, tokens: int, keys: int, device: torch.device) -> None:
    """A mask of `tokens` rows with a bit for each of `keys` keys at least."""
    checks.tensor(name, mask_tw, (tokens, None), checks.INT32, device)
    checks.rows(name, mask_tw)
    if mask_tw.shape[1] < mask_words(keys):
        raise ValueError(f"{name}: a row for {keys} keys has at least {mask_words(keys)} words, got {mask_tw.shape[1]}")


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
