"""Which step vLLM runs, and where a layer's caches are."""

from __future__ import annotations

from typing import Any

import torch

from dsv32_plugin.core.attention import quantises_index_keys
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.step import LayerCaches, Step
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE
from dsv32_plugin.vllm_adapter.caches import PagedCache, index_key_cache, latent_cache
from dsv32_plugin.vllm_adapter.upstream import (
    VllmConfig,
    get_forward_context,
    get_kv_transfer_group,
    has_kv_transfer_group,
)


class VllmSteps:
    """The `StepSource` of one model: its caches, which vLLM fills with memory, and the step in the forward context."""

    def __init__(self, config: DsaConfig, vllm_config: VllmConfig) -> None:
        self._config, self._cache_config = config, vllm_config.cache_config
        self._caches: dict[int, tuple[PagedCache, PagedCache | None]] = {}
        """Layer -> its latents and, where it selects, its index keys."""

    def add_layer(self, layer: int, prefix: str) -> None:
        """Announce the caches of a layer; `prefix` names its attention."""
        config, dtype, index_keys = self._config, torch.get_default_dtype(), None
        if config.selects(layer):
            name, quantised = f"{prefix}.indexer.k_cache", quantises_index_keys(dtype)
            index_keys = index_key_cache(name, config.index_head_dim, dtype, quantised)
        latents = latent_cache(
            f"{prefix}.attn", config.kv_lora_rank, config.qk_rope_head_dim, self._cache_config, dtype
        )
        self._caches[layer] = latents, index_keys

    def current(self, layer: int) -> tuple[Step, LayerCaches] | None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            # A run without caches, to measure memory: `warmup` runs the attention itself, once for all layers.
            return None
        latents, index_keys = self._caches[layer]
        step = metadata[latents.layer_name]
        if index_keys is not None:
            index_pages = metadata[index_keys.layer_name]
            assert index_pages.data_ptr() == step.block_table_bp.data_ptr(), "index keys must share the latents' pages"
        # A KV connector that works layer by layer fills the caches before the layer, and saves them after it. (The
        # others, vLLM's CPU offload among them, copy whole pages between steps.)
        if (connector := _connector()) is not None:
            for cache in self._of(layer):
                connector.wait_for_layer_load(cache.layer_name)
        return step, LayerCaches(latents.pages, None if index_keys is None else index_keys.pages)

    def done(self, layer: int) -> None:
        if (connector := _connector()) is not None:
            step = get_forward_context().attn_metadata[self._caches[layer][0].layer_name]
            for cache in self._of(layer):
                connector.save_kv_layer(cache.layer_name, cache.kv_cache, step)

    def one_page(self, layer: int, device: torch.device) -> LayerCaches:
        """A page of zeros, which stands for all."""
        latents, index_keys = (
            None if cache is None else torch.zeros(1, PAGE_SIZE, cache.width, dtype=cache.dtype, device=device)
            for cache in self._caches[layer]
        )
        assert latents is not None
        return LayerCaches(latents, index_keys)

    def _of(self, layer: int) -> list[PagedCache]:
        return [cache for cache in self._caches[layer] if cache is not None]


def _connector() -> Any:
    connector = get_kv_transfer_group() if has_kv_transfer_group() else None
    return None if connector is None or not connector.has_connector_metadata() else connector
