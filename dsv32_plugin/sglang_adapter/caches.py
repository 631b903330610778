"""The paged caches of latents and index keys, in the layouts of `cache_layout`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dsv32_plugin.core.attention import quantises_index_keys
from dsv32_plugin.core.step import LayerCaches
from dsv32_plugin.kernels import cache_layout
from dsv32_plugin.sglang_adapter import arguments, upstream
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME
from dsv32_plugin.sglang_adapter.upstream import GPU_MEMORY_TYPE_KV_CACHE, DSATokenToKVPool, MLATokenToKVPool


class DsaTokenToKVPool(DSATokenToKVPool):
    """SGLang's pool for DSA, byte for byte, that also takes float32 models and every page size of the kernels.

    SGLang's own holds fp8 index keys only, in pages of 64. What moves, transfers or offloads pages finds the buffers
    under the names it knows.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        kv_lora_rank: int,
        dtype: torch.dtype,
        qk_rope_head_dim: int,
        layer_num: int,
        device: str,
        index_head_dim: int,
        enable_memory_saver: bool,
        kv_cache_dim: int,
        start_layer: int | None = None,
        end_layer: int | None = None,
        index_buf_size: int | None = None,
        skip_topk_layers: list[bool] | None = None,
        index_kpool: int = 1,
        **of_other_layouts: Any,
    ) -> None:
        """
        Args:
            skip_topk_layers: the layers that share a selection, where SGLang gives them no index keys.
            index_kpool: tokens that one index key stands for; a feature of other architectures.
            of_other_layouts: what SGLang needs for these, and for options that the plugin refuses.
        """
        if index_kpool != 1:
            raise NotImplementedError(f"config key index_kpool: expected 1, got {index_kpool}")
        stored_fp8 = dtype == torch.float8_e4m3fn
        MLATokenToKVPool.__init__(
            self,
            size,
            page_size,
            dtype,
            kv_lora_rank,
            qk_rope_head_dim,
            layer_num,
            device,
            enable_memory_saver,
            start_layer,
            end_layer,
            use_dsa=True,
            override_kv_cache_dim=cache_layout.LATENT_BYTES_FP8 if stored_fp8 else None,
        )
        self.index_head_dim, self.index_page_size = index_head_dim, page_size
        self.index_kpool, self.kpool_use_compress = 1, False
        self.skip_topk_layers = skip_topk_layers or [False] * layer_num
        model_dtype = arguments.model_config(arguments.of_process()).dtype
        width, index_dtype = cache_layout.INDEX_BYTES, torch.uint8
        if not quantises_index_keys(model_dtype):
            width, index_dtype = index_head_dim, model_dtype
        self.index_k_with_scale_buffer_dtype = index_dtype
        pages = ((size if index_buf_size is None else index_buf_size) + page_size + 1) // page_size
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            buffers = [
                torch.zeros((0 if shares else pages, page_size * width), dtype=index_dtype, device=device)
                for shares in self.skip_topk_layers
            ]
        self._hold_index_keys(buffers)
        self._finalize_allocation_log(size)

    def _hold_index_keys(self, buffers: list[torch.Tensor]) -> None:
        """Where SGLang looks for them."""
        if not upstream.wraps_index_keys():
            self.index_k_with_scale_buffer = buffers
            return
        from dsv32_plugin.sglang_adapter.upstream import IndexKeyCache

        class Held(IndexKeyCache):
            """Its own constructor makes buffers for fp8 keys only."""

            def __init__(self, pool: DsaTokenToKVPool, buffer: list[torch.Tensor]) -> None:
                self.pool, self.buffer = pool, buffer

        self.index_key_cache = Held(self, buffers)

    def layer_caches(self, layer: int, selects: bool) -> LayerCaches:
        """This layer's caches as the kernels take them, [pages, page size, width]."""
        latents = self.kv_buffer[layer - self.start_layer]
        if not selects:
            return LayerCaches(latents.view(-1, self.page_size, latents.shape[-1]), None)
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(layer - self.start_layer)
        index_keys = self.index_k_with_scale_buffer[layer - self.start_layer]
        return LayerCaches(
            latents.view(-1, self.page_size, latents.shape[-1]),
            index_keys.view(index_keys.shape[0], self.page_size, -1),
        )

    def get_kv_size_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in [*self.kv_buffer, *getattr(self, "index_k_with_scale_buffer", [])])


def announce_index_keys(model_dtype: torch.dtype) -> None:
    """Before SGLang sizes the caches: it reckons with 132 elements a token of the class's type, room for exact keys."""
    if not quantises_index_keys(model_dtype):
        DsaTokenToKVPool.index_k_with_scale_buffer_dtype = model_dtype


def reckon_latents(original: Callable[[Any, Any, int], int], configurator: Any, sizes: Any, num_layers: int) -> int:
    """Goes around SGLang's bytes of a token in all layers, by which it fills the memory that is free.

    It takes latents in fp8 for a byte an element; they have scales, too, and their rope part is bfloat16.
    """
    token_bytes = original(configurator, sizes, num_layers)
    ours = BACKEND_NAME in arguments.attention_backends(arguments.of_process())
    if ours and sizes.kv_cache_dtype == torch.float8_e4m3fn:
        token_bytes += num_layers * (cache_layout.LATENT_BYTES_FP8 - cache_layout.LATENT_WIDTH)
    return token_bytes


def as_dsa_pool(pool: Any, selecting: Iterable[int]) -> DsaTokenToKVPool:
    """Raise RuntimeError unless SGLang built our pool, and no kind of its own out of it, for layers that select."""
    if type(pool) is not DsaTokenToKVPool:
        found = f"{type(pool).__module__}.{type(pool).__qualname__}"
        raise RuntimeError(
            f"KV pool: expected {DsaTokenToKVPool.__module__}.DsaTokenToKVPool, got {found}; "
            "an option chose another kind of cache, which the plugin does not support"
        )
    without = [layer for layer in selecting if not len(pool.index_k_with_scale_buffer[layer - pool.start_layer])]
    if without:
        raise RuntimeError(f"KV pool: expected index keys in every layer that selects, found none in layers {without}")
    return pool
