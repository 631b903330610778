"""Before the server is ready: compile every kernel, and let vLLM's memory measurement see the attention at its peak.

vLLM measures memory before there are caches, by one run of the model. The attention joins that run with batches made up
for it: some as large as any can be, and small ones of every size that has kernels of its own.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger

from dsv32_plugin import warmup
from dsv32_plugin.attention import LayerCaches
from dsv32_plugin.cache_layout import PAGE_SIZE
from dsv32_plugin.vllm_adapter.attention import DsaAttention
from dsv32_plugin.vllm_adapter.caches import PagedCache

logger = init_logger("vllm.dsv32_plugin")


def run(attentions: list[DsaAttention], hidden_th: torch.Tensor, slots_tk: torch.Tensor, config: VllmConfig) -> None:
    """Run each of `attentions` on made-up batches of up to as many tokens as `hidden_th` has."""
    made_up = warmup.MadeUp(config.model_config.max_model_len, slots_tk.shape[1], hidden_th.device)
    most, queries = hidden_th.shape[0], 1 + config.num_speculative_tokens
    most_decodes = config.scheduler_config.max_num_seqs * queries
    layers = [(attention, one_page(attention)) for attention in attentions]
    group = get_world_group()
    summary = warmup.run(
        layers,
        lambda: made_up.batches(most, most_decodes, queries),
        hidden_th,
        slots_tk,
        compiles=group.local_rank == 0,
        barrier=group.barrier,
    )
    for attention, caches in layers:
        for batch in made_up.largest(most):
            warmup.attend(attention, caches, batch, hidden_th, slots_tk)
    logger.info("dsv32: %s", summary)


def one_page(attention: DsaAttention) -> LayerCaches:
    """A page of zeros, which stands for all."""

    def page(cache: PagedCache) -> torch.Tensor:
        return torch.zeros(1, PAGE_SIZE, cache.width, dtype=cache.dtype, device=attention.rope_table_pr.device)

    index_keys = None if attention.indexer is None else page(attention.indexer.k_cache)
    return LayerCaches(page(attention.latents), index_keys)
