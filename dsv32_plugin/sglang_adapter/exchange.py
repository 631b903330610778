"""How hidden states get to the ranks of a feed-forward block and back, where attention has its own ranks.

With data-parallel attention a rank holds the tokens of its own sequences only. A block that is cut over all ranks needs
those of all; experts behind an all-to-all backend, and dense blocks that are whole on every rank, take what is there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv32_plugin.sglang_adapter import arguments
from dsv32_plugin.sglang_adapter.upstream import (
    ForwardBatch,
    dp_gather_replicate,
    dp_reduce_scatter_tensor,
    dp_scatter,
    get_global_dp_buffer,
    get_local_dp_buffer,
    get_moe_a2a_backend,
    get_parallel,
    is_dp_attention_enabled,
)

Block = Callable[[torch.Tensor], torch.Tensor]
"""[T, H] -> [T, H], each rank's part of a sum over the ranks that hold the block."""
Exchange = Callable[[Block, torch.Tensor, ForwardBatch], torch.Tensor]
"""What a block makes of this rank's tokens."""


def of_layer(is_moe: bool) -> Exchange:
    """For the block of one layer, as the start-up options say."""
    if is_moe and not get_moe_a2a_backend().is_none():
        return _each_a_share
    if not is_moe and is_whole():
        return _alone
    return _gathered if is_dp_attention_enabled() else _together


def is_whole() -> bool:
    """Whether dense blocks are whole on every rank."""
    return arguments.of_process().moe_dense_tp_size == 1


def _alone(block: Block, local_th: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """The block is here, and so are the tokens."""
    return block(local_th) if len(local_th) else local_th


def _together(block: Block, local_th: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """All ranks hold the same tokens."""
    parallel = get_parallel()
    out_th = block(local_th)
    return parallel.tp_group.all_reduce(out_th) if parallel.tp_size > 1 else out_th


def _gathered(block: Block, local_th: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """The tokens of all ranks, each share as long as SGLang says, go through the block."""
    group = get_parallel().tp_group
    all_th = get_global_dp_buffer(group)
    dp_gather_replicate(all_th, local_th, batch)
    sums_th = block(all_th) if len(all_th) else all_th
    out_th = get_local_dp_buffer(group)
    if batch.dp_padding_mode.is_max_len():
        dp_reduce_scatter_tensor(out_th, sums_th)
    else:
        dp_scatter(out_th, group.all_reduce(sums_th), batch)
    return out_th


def _each_a_share(block: Block, local_th: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """The backend brings each token to its experts; ranks that hold the same tokens send a share of them each."""
    parallel = get_parallel()
    if parallel.attn_tp_size == 1:
        return block(local_th)
    size = -(-len(local_th) // parallel.attn_tp_size)
    padded_th = torch.nn.functional.pad(local_th, (0, 0, 0, size * parallel.attn_tp_size - len(local_th)))
    own_th = block(padded_th[parallel.attn_tp_rank * size :][:size])
    return parallel.attn_tp_group.all_gather(own_th, dim=0)[: len(local_th)]
