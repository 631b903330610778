"""Before the server is ready: compile every kernel, and let vLLM's memory measurement see the attention at its peak.

vLLM measures memory before there are caches, by one run of the model. The attention joins that run with batches made up
for it: some as large as any can be, and small ones of every size that has kernels of its own.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.utils.torch_utils import set_default_torch_dtype

from dsv32_plugin import warmup
from dsv32_plugin.attention import LayerCaches
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE
from dsv32_plugin.vllm_adapter.attention import DsaAttention
from dsv32_plugin.vllm_adapter.caches import PagedCache

logger = init_logger("vllm.dsv32_plugin")


class WarmUp:
    """Begun when the model is built, so that kernels compile while weights are loaded; finished in its first run."""

    def __init__(self, attentions: list[DsaAttention], slots_tk: torch.Tensor, vllm_config: VllmConfig) -> None:
        """Of each kind of layer one, and the buffer of selections, as long as a batch can be."""
        self._attentions, self._slots_tk = attentions, slots_tk
        self._most, topk = slots_tk.shape
        model_config = vllm_config.model_config
        self._hidden_size, self._dtype = model_config.get_hidden_size(), model_config.dtype
        self._made_up = warmup.MadeUp(model_config.max_model_len, topk, slots_tk.device)
        self._queries = 1 + vllm_config.num_speculative_tokens
        self._most_decodes = vllm_config.scheduler_config.max_num_seqs * self._queries
        self._running: warmup.WarmUp | None = None
        # What is allocated while the model is built belongs to the weights then, and is kept.
        if not model_config.enable_sleep_mode:
            self._begin()
            torch.accelerator.empty_cache()

    def _begin(self) -> None:
        hidden_th = self._slots_tk.new_zeros(self._most, self._hidden_size, dtype=self._dtype)
        # As in a run of the model, also while it is built.
        with torch.inference_mode(), torch.device("cpu"), set_default_torch_dtype(torch.float32):
            self._running = warmup.WarmUp(
                self._layers(),
                lambda: self._made_up.batches(self._most, self._most_decodes, self._queries),
                hidden_th,
                self._slots_tk,
                compiles=get_world_group().local_rank == 0,
            )

    def finish(self, hidden_th: torch.Tensor) -> None:
        """In the run by which vLLM measures memory: `hidden_th` has as many tokens as a batch can have."""
        if self._running is None:
            self._begin()
        assert self._running is not None
        self._running.load(get_world_group().barrier)
        layers = self._layers()
        for attention, caches in layers:
            for batch in self._made_up.largest(self._most):
                warmup.attend(attention, caches, batch, hidden_th, self._slots_tk)
        logger.info("dsv32: %s", self._running.run(layers, hidden_th, self._slots_tk))

    def _layers(self) -> list[tuple[DsaAttention, LayerCaches]]:
        return [(attention, one_page(attention)) for attention in self._attentions]


def one_page(attention: DsaAttention) -> LayerCaches:
    """A page of zeros, which stands for all."""

    def page(cache: PagedCache) -> torch.Tensor:
        return torch.zeros(1, PAGE_SIZE, cache.width, dtype=cache.dtype, device=attention.rope_table_pr.device)

    index_keys = None if attention.indexer is None else page(attention.indexer.k_cache)
    return LayerCaches(page(attention.latents), index_keys)
