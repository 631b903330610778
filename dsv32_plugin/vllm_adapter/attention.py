"""One layer's attention in vLLM: where its caches are, and which batch it runs."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from dsv32_plugin.core import attention
from dsv32_plugin.core.attention import LayerCaches
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.step import DsaBatch
from dsv32_plugin.vllm_adapter.caches import index_key_cache, latent_cache, transferred
from dsv32_plugin.vllm_adapter.layers import VllmLayers


class DsaAttention(attention.DsaAttention):
    """`dsv32_plugin.core.attention` with caches that vLLM fills with memory."""

    def __init__(
        self, config: DsaConfig, vllm_config: VllmConfig, layer: int, rope_table_pr: torch.Tensor, prefix: str
    ) -> None:
        super().__init__(config, VllmLayers(vllm_config), layer, rope_table_pr, prefix)
        dtype = torch.get_default_dtype()
        if self.indexer is not None:
            self.indexer.k_cache = index_key_cache(
                f"{prefix}.indexer.k_cache", self.indexer.dim, dtype, self.indexer.quantised
            )
        self.latents = latent_cache(f"{prefix}.attn", self.latent, self.rope, vllm_config.cache_config, dtype)

    def forward(self, positions_t: torch.Tensor, hidden_th: torch.Tensor, slots_tk: torch.Tensor) -> torch.Tensor:
        """Attend, and leave this layer's selection in `slots_tk` [max tokens, K] for the layers that share it."""
        batch = self._batch()
        if batch is None:
            # A run without caches, to measure memory: `warmup` runs the attention itself, once for all layers.
            return self.project_only(hidden_th)
        num_tokens = batch.slots_t.shape[0]
        index_cache = None if self.indexer is None else self.indexer.k_cache
        caches = LayerCaches(self.latents.kv_cache, None if index_cache is None else index_cache.kv_cache)
        with transferred([self.latents] if index_cache is None else [self.latents, index_cache], batch):
            out_th = self.attend(batch, positions_t[:num_tokens], hidden_th[:num_tokens], slots_tk[:num_tokens], caches)
        if num_tokens == hidden_th.shape[0]:
            return out_th
        return torch.nn.functional.pad(out_th, (0, 0, 0, hidden_th.shape[0] - num_tokens))

    def _batch(self) -> DsaBatch | None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return None
        batch = metadata[self.latents.layer_name]
        if self.indexer is not None:
            index_pages = metadata[self.indexer.k_cache.layer_name]
            assert index_pages.data_ptr() == batch.block_table_bp.data_ptr(), "index keys must share the latents' pages"
        return batch
