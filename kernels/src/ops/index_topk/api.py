"""index_topk_paged, index_topk_ragged and index_mask_ragged: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for
from ..index_logits.api import check_paged, check_ragged
from ..select_topk.api import check_mask, check_selection

WORKSPACE_BYTES = 256 << 20


def index_topk_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    topk: int,
    *,
    max_visible: int,
    workspace_bytes: int = WORKSPACE_BYTES,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score the cached index keys of each sequence and select for its query tokens, in bounded memory (decode).

        out = select_topk(index_logits_paged(q, weights, cache, table, visible), None, visible, topk, table, page_size)

    The work follows `visible`, so that a graph captured for a large max_visible serves short sequences as well.

    Args:
        q_bnid: [B, N, I, D], N query tokens a sequence; float with a float cache, float8_e4m3fn (or its bytes as uint8)
            with an fp8 cache; last dim contiguous.
        weights_bni: [B, N, I] float32 from `index_query`, last dim contiguous.
        index_cache: [pages, page_size, D] float or [pages, page_size, D+4] uint8, laid out by page; pages contiguous,
            page stride free.
        block_table_bp: [B, pages a sequence] int32, last dim contiguous.
        visible_bn: [B, N] int32, contiguous; how many keys the token sees, at most max_visible; may be 0.
        topk: K, 1 to 4096.
        max_visible: bound on visible_bn, on the host.
        workspace_bytes: bound on the scores held at a time; at least one sequence's are.
        out: [B, N, topk] int32, contiguous.

    Returns:
        [B, N, topk] int32: slots in ascending order of position, then -1.

    Raises:
        TypeError, ValueError: as `index_logits_paged` and `select_topk`.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equations 1 and 2.
    """
    device = q_bnid.device
    check_paged(q_bnid, weights_bni, index_cache, block_table_bp, visible_bn, max_visible)
    checks.contiguous("visible_bn", visible_bn)
    sequences, tokens = visible_bn.shape
    check_selection(sequences * tokens, topk, block_table_bp, None, index_cache.shape[1], None, device)
    checks.at_least("workspace_bytes", workspace_bytes, 1)
    if out is not None:
        checks.tensor("out", out, (sequences, tokens, topk), checks.INT32, device)
        checks.contiguous("out", out)
    result: torch.Tensor = function_for("index_topk_paged", device)(
        q_bnid,
        weights_bni,
        index_cache,
        block_table_bp,
        visible_bn,
        topk,
        max_visible=max_visible,
        workspace_bytes=workspace_bytes,
        out=out,
    )
    return result


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
    workspace_bytes: int = WORKSPACE_BYTES,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score and select in bounded memory, whatever T * S is (prefill).

        out = select_topk(index_logits_ragged(q, weights, k, k_scale, start, end), start, end, topk, ...)

    Args:
        q_tid: [T, I, D]; float with float keys, float8_e4m3fn (or its bytes as uint8) with fp8 keys; last dim
            contiguous.
        weights_ti: [T, I] float32 from `index_query`, last dim contiguous.
        k_sd: [S, D] float, or float8_e4m3fn (or its bytes as uint8), last dim contiguous.
        k_scale_s: [S] float32 with fp8 keys, None with float keys.
        start_t: [T] int32, first visible key.
        end_t: [T] int32, one past the last visible key.
        topk: K, 1 to 4096.
        block_table_bp: [B, pages a sequence] int32: return slots instead of positions, as `select_topk` does.
        seq_t: [T] int32, row of the block table for each t; None: T / B consecutive rows for each sequence.
        page_size: tokens a page; goes with block_table_bp.
        workspace_bytes: bound on the scores held at a time; at least one row is.
        out: [T, topk] int32, last dim contiguous.

    Returns:
        [T, topk] int32: ascending positions relative to start (or their slots), then -1.

    Raises:
        TypeError, ValueError: as `index_logits_ragged` and `select_topk`.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equations 1 and 2.
    """
    check_ragged(q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t)
    check_selection(q_tid.shape[0], topk, block_table_bp, seq_t, page_size, out, q_tid.device)
    checks.at_least("workspace_bytes", workspace_bytes, 1)
    result: torch.Tensor = function_for("index_topk_ragged", q_tid.device)(
        q_tid,
        weights_ti,
        k_sd,
        k_scale_s,
        start_t,
        end_t,
        topk,
        block_table_bp=block_table_bp,
        seq_t=seq_t,
        page_size=page_size,
        workspace_bytes=workspace_bytes,
        out=out,
    )
    return result


def index_mask_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
    topk: int,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score and select as `index_topk_ragged` does, and return a bit for every key in place of a list.

        out = select_mask(index_logits_ragged(q, weights, k, k_scale, start, end), start, end, topk)

    Args:
        q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t, topk, workspace_bytes: as `index_topk_ragged`.
        out: [T, W] int32, W >= 4 * ceil(S / 128), last dim contiguous, row stride free. All its words are written.

    Returns:
        [T, W] int32, in the order of bits that `select_mask` tells.

    Raises:
        TypeError, ValueError: as `index_logits_ragged` and `select_mask`.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equations 1 and 2; the mask is ours.
    """
    check_ragged(q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t)
    check_mask(q_tid.shape[0], k_sd.shape[0], topk, out, q_tid.device)
    checks.at_least("workspace_bytes", workspace_bytes, 1)
    result: torch.Tensor = function_for("index_mask_ragged", q_tid.device)(
        q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t, topk, workspace_bytes=workspace_bytes, out=out
    )
    return result
