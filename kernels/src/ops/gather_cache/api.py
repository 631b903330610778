"""gather_index_keys and gather_latents: checks and dispatch."""

import torch

from ...runtime import checks
from ...runtime.dispatch import function_for


def gather_index_keys(
    index_cache: torch.Tensor, block_table_bp: torch.Tensor, cu_seqlens_b1: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Collect the index keys of B sequences, one sequence after the other.

        k[cu_seqlens[b] + s] = the cached row of position s of sequence b,     s < cu_seqlens[b+1] - cu_seqlens[b]

    Rows past the last sequence, and rows whose page is not in the cache or beyond the block table, are zero with scale
    zero.

    Args:
        index_cache: [pages, page_size, D] float or [pages, page_size, D+4] uint8, laid out by page; page stride free.
        block_table_bp: [B, pages a sequence] int32, last dim contiguous.
        cu_seqlens_b1: [B+1] int32, 0 then the running sum of the lengths.
        total: rows of the result, on the host: cu_seqlens[B], or more.

    Returns:
        (k_sd [total, D] in the cache's dtype, or float8_e4m3fn from an fp8 cache;
        k_scale_s [total] float32 from an fp8 cache, else None).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. It allocates its result, and `total` is fixed on the host: used in prefill, outside graphs.
    """
    device = index_cache.device
    checks.index_cache("index_cache", index_cache, None, device)
    _check_sequences(block_table_bp, cu_seqlens_b1, total, device)
    result: tuple[torch.Tensor, torch.Tensor | None] = function_for("gather_index_keys", device)(
        index_cache, block_table_bp, cu_seqlens_b1, total
    )
    return result


def gather_latents(
    latent_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    cu_seqlens_b1: torch.Tensor,
    total: int,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Collect the latent rows of B sequences, one sequence after the other, dequantised.

        rows[cu_seqlens[b] + s] = [latent (C) | rope key (R)] of position s of sequence b

    Rows past the last sequence, and rows whose page is not in the cache or beyond the block table, are zero. From an
    fp8 cache a latent is value * scale, exact in float32, then rounded once to `dtype`.

    Args:
        latent_cache: [pages, page_size, C+R] float or [pages, page_size, 656] uint8; pages contiguous, page stride
            free.
        block_table_bp: [B, pages a sequence] int32, last dim contiguous.
        cu_seqlens_b1: [B+1] int32, 0 then the running sum of the lengths.
        total: rows of the result, on the host: cu_seqlens[B], or more.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        [total, C+R] in `dtype`.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, stride or device.

    Runs on every device. It allocates its result, and `total` is fixed on the host: used in prefill, outside graphs.
    """
    device = latent_cache.device
    checks.latent_cache("latent_cache", latent_cache, None, None, device)
    _check_sequences(block_table_bp, cu_seqlens_b1, total, device)
    checks.one_of("dtype", dtype, checks.FLOATS)
    result: torch.Tensor = function_for("gather_latents", device)(
        latent_cache, block_table_bp, cu_seqlens_b1, total, dtype=dtype
    )
    return result


def _check_sequences(
    block_table_bp: torch.Tensor, cu_seqlens_b1: torch.Tensor, total: int, device: torch.device
) -> None:
    checks.tensor("block_table_bp", block_table_bp, (None, None), checks.INT32, device)
    checks.rows("block_table_bp", block_table_bp)
    checks.vector("cu_seqlens_b1", cu_seqlens_b1, block_table_bp.shape[0] + 1, checks.INT32, device)
    checks.at_least("total", total, 0)
