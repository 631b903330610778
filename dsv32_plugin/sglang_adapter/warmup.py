"""Before the server is ready, and before graphs are captured: compile every kernel of the attention."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from dsv32_plugin.core import warmup
from dsv32_plugin.core.attention import DsaAttention
from dsv32_plugin.kernels.runtime import ahead
from dsv32_plugin.sglang_adapter.arguments import in_effect, model_config
from dsv32_plugin.sglang_adapter.caches import DsaTokenToKVPool
from dsv32_plugin.sglang_adapter.upstream import get_parallel

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import ModelRunner

logger = logging.getLogger(__name__)


@torch.inference_mode()
def run(runner: ModelRunner, pool: DsaTokenToKVPool, max_len: int, queries: int) -> None:
    """Run the attention of `runner.model` on made-up batches of every size that has kernels of its own.

    Args:
        max_len: tokens of the longest sequence that the server can have.
        queries: the most tokens of a decode, drafted ones included.
    """
    config, ranks = runner.model.dsa_config, get_parallel().tp_group
    most_decodes = runner.max_running_requests * queries
    most = max(most_tokens(in_effect(runner.server_args)), most_decodes)
    made_up = warmup.MadeUp(max_len, config.index_topk, torch.device(runner.device))
    hidden_th = torch.zeros(most, config.hidden_size, dtype=runner.dtype, device=runner.device)
    slots_tk = torch.empty(most, config.index_topk, dtype=torch.int32, device=runner.device)
    # One layer that selects and, where there is one, a layer that shares a selection.
    attentions = [module for module in runner.model.modules() if isinstance(module, DsaAttention)]
    kinds = {attention.indexer is not None: attention for attention in attentions}
    layers = [(attention, pool.layer_caches(attention.layer, selects)) for selects, attention in kinds.items()]
    found = warmup.WarmUp(
        layers,
        lambda: made_up.batches(most, most_decodes, queries),
        hidden_th,
        slots_tk,
        compiles=ranks.local_rank == 0,
    )
    found.load(ranks.barrier)
    logger.info("dsv32: %s", found.run(layers, hidden_th, slots_tk))
    ahead.report_late(logger)


def most_tokens(options: Any) -> int:
    """That a prefill has at most; without chunks one prompt may have more than `max_prefill_tokens`."""
    chunk = options.chunked_prefill_size or 0
    if chunk > 0:
        return chunk
    return max(options.max_prefill_tokens, model_config(options).context_len)
