"""The definition of gather_index_keys and gather_latents in plain torch."""

import torch

from ...formulas import index_rows, latent_rows, slots_of


def gather_index_keys(
    index_cache: torch.Tensor, block_table_bp: torch.Tensor, cu_seqlens_b1: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    slots_s = concatenated_slots(block_table_bp, cu_seqlens_b1, total, index_cache.shape[1])
    keys_sd, scale_s, _ = index_rows(index_cache, slots_s)
    return keys_sd, scale_s


def gather_latents(
    latent_cache: torch.Tensor,
    block_table_bp: torch.Tensor,
    cu_seqlens_b1: torch.Tensor,
    total: int,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    slots_s = concatenated_slots(block_table_bp, cu_seqlens_b1, total, latent_cache.shape[1])
    rows, _ = latent_rows(latent_cache, slots_s)
    return rows.to(dtype)


def concatenated_slots(
    block_table_bp: torch.Tensor, cu_seqlens_b1: torch.Tensor, total: int, page_size: int
) -> torch.Tensor:
    """Slots of the positions of every sequence, one sequence after the other; -1 past the last."""
    row_s = torch.arange(total, device=cu_seqlens_b1.device)
    seq_s = torch.searchsorted(cu_seqlens_b1.long(), row_s, right=True) - 1
    inside_s = (seq_s >= 0) & (seq_s < block_table_bp.shape[0])
    seq_s = seq_s.where(inside_s, 0)
    position_s = row_s - cu_seqlens_b1[seq_s]
    return slots_of(block_table_bp, seq_s, position_s, page_size).where(inside_s, -1)
