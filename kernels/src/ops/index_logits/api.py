"""index_logits_paged and index_logits_ragged: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for


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
    """Score the cached index keys of each sequence for its query tokens (decode).

        out[b, n, s] = k_scale[s] * sum_i weights[b, n, i] * relu(q[b, n, i] . k[s])    for s < visible[b, n], else -inf

    k[s] is the row at slot block_table[b, s // page_size] * page_size + s % page_size. A key whose page is not in the
    cache, or beyond the block table, scores -inf and is never read. Entries of the block table past the visible pages
    may be anything.

    Args:
        q_bnid: [B, N, I, D], N query tokens a sequence; float with a float cache, float8_e4m3fn (or its bytes as uint8)
            with an fp8 cache; last dim contiguous.
        weights_bni: [B, N, I] float32 from `index_query`, last dim contiguous.
        index_cache: [pages, page_size, D] float or [pages, page_size, D+4] uint8, laid out by page; pages contiguous,
            page stride free.
        block_table_bp: [B, pages a sequence] int32, last dim contiguous.
        visible_bn: [B, N] int32, how many keys the token sees; may be 0, or more than max_visible.
        max_visible: the last dim of the result.
        out: [B, N, max_visible] float32, last dim contiguous.

    Returns:
        [B, N, max_visible] float32 (`out` where given).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 1.
    """
    device = q_bnid.device
    check_paged(q_bnid, weights_bni, index_cache, block_table_bp, visible_bn, max_visible)
    if out is None:
        out = torch.empty((*visible_bn.shape, max_visible), dtype=torch.float32, device=device)
    else:
        checks.tensor("out", out, (*visible_bn.shape, max_visible), checks.FLOAT32, device)
        checks.rows("out", out)
    result: torch.Tensor = function_for("index_logits_paged", device)(
        q_bnid, weights_bni, index_cache, block_table_bp, visible_bn, max_visible=max_visible, out=out
    )
    return result


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
    """Score keys that lie one sequence after the other, each token its own range of them (prefill).

        out[t, s] = k_scale[s] * sum_i weights[t, i] * relu(q[t, i] . k[s])     for start[t] <= s < end[t], else -inf

    Args:
        q_tid: [T, I, D]; float with float keys, float8_e4m3fn (or its bytes as uint8) with fp8 keys; last dim
            contiguous.
        weights_ti: [T, I] float32 from `index_query`, last dim contiguous.
        k_sd: [S, D] float, or float8_e4m3fn (or its bytes as uint8), last dim contiguous (`gather_index_keys`).
        k_scale_s: [S] float32 with fp8 keys, None with float keys.
        start_t: [T] int32, first visible key.
        end_t: [T] int32, one past the last visible key; end <= start sees nothing.
        out: [T, S] float32, last dim contiguous.

    Returns:
        [T, S] float32 (`out` where given).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device; k_scale_s does not fit the
            keys.

    Runs on every device. On a GPU it can be captured in a graph where its implementation is not the reference.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 1.
    """
    check_ragged(q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t)
    if out is None:
        out = torch.empty((q_tid.shape[0], k_sd.shape[0]), dtype=torch.float32, device=q_tid.device)
    else:
        checks.tensor("out", out, (q_tid.shape[0], k_sd.shape[0]), checks.FLOAT32, q_tid.device)
        checks.rows("out", out)
    result: torch.Tensor = function_for("index_logits_ragged", q_tid.device)(
        q_tid, weights_ti, k_sd, k_scale_s, start_t, end_t, out=out
    )
    return result


def check_paged(
    q_bnid: torch.Tensor,
    weights_bni: torch.Tensor,
    index_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    visible_bn: torch.Tensor,
    max_visible: int,
) -> None:
    """The arguments that `index_logits_paged` and `index_topk_paged` have in common."""
    device = q_bnid.device
    fp8 = index_cache.dtype is torch.uint8
    checks.tensor("q_bnid", q_bnid, (None, None, None, None), checks.FP8 if fp8 else checks.FLOATS, device, _STEP)
    sequences, tokens, heads, index_dim = q_bnid.shape
    checks.rows("q_bnid", q_bnid)
    checks.tensor("weights_bni", weights_bni, (sequences, tokens, heads), checks.FLOAT32, device)
    checks.rows("weights_bni", weights_bni)
    checks.index_cache("index_cache", index_cache, index_dim, device)
    checks.tensor("block_table_bp", block_table_bp, (sequences, None), checks.INT32, device)
    checks.rows("block_table_bp", block_table_bp)
    checks.tensor("visible_bn", visible_bn, (sequences, tokens), checks.INT32, device)
    checks.rows("visible_bn", visible_bn)
    checks.at_least("max_visible", max_visible, 0)


def check_ragged(
    q_tid: torch.Tensor,
    weights_ti: torch.Tensor,
    k_sd: torch.Tensor,
    k_scale_s: torch.Tensor | None,
    start_t: torch.Tensor,
    end_t: torch.Tensor,
) -> None:
    """The arguments that `index_logits_ragged` and `index_topk_ragged` have in common."""
    device = q_tid.device
    fp8 = k_scale_s is not None
    dtypes = checks.FP8 if fp8 else checks.FLOATS
    step = "give k_scale_s with fp8 keys, None with float keys"
    checks.tensor("k_sd", k_sd, (None, None), dtypes, device, step)
    keys, index_dim = k_sd.shape
    checks.rows("k_sd", k_sd)
    checks.tensor("q_tid", q_tid, (None, None, index_dim), dtypes, device, _STEP)
    tokens, heads, _ = q_tid.shape
    checks.rows("q_tid", q_tid)
    checks.tensor("weights_ti", weights_ti, (tokens, heads), checks.FLOAT32, device)
    checks.rows("weights_ti", weights_ti)
    if k_scale_s is not None:
        checks.vector("k_scale_s", k_scale_s, keys, checks.FLOAT32, device)
    checks.vector("start_t", start_t, tokens, checks.INT32, device)
    checks.vector("end_t", end_t, tokens, checks.INT32, device)


_STEP = "call index_query with quantize=True for fp8 keys and False for float keys"
