"""The paged caches of latents and index keys, in the layouts of `cache_layout`, and pages without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MLATokenToKVPool

from dsv32_plugin.attention import LayerCaches, quantises_index_keys
from dsv32_plugin.kernels import cache_layout
from dsv32_plugin.sglang_adapter import BACKEND_NAME, arguments, compat


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
        self._hold_index_keys(
            [
                torch.zeros((0 if shares else pages, page_size * width), dtype=index_dtype, device=device)
                for shares in self.skip_topk_layers
            ]
        )
        self._finalize_allocation_log(size)

    def _hold_index_keys(self, buffers: list[torch.Tensor]) -> None:
        """Where SGLang looks for them."""
        if not compat.wraps_index_keys():
            self.index_k_with_scale_buffer = buffers
            return
        from sglang.srt.mem_cache.index_key_cache import IndexKeyCache

        # Its own constructor makes buffers for fp8 keys only.
        self.index_key_cache = object.__new__(IndexKeyCache)
        self.index_key_cache.pool, self.index_key_cache.buffer = self, buffers

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


def reckon_latents(original: Callable[[Any, Any, int], int], configurator: Any, runner: Any, num_layers: int) -> int:
    """Goes around SGLang's bytes of a token in all layers, by which it fills the memory that is free.

    It takes latents in fp8 for a byte an element; they have scales, too, and their rope part is bfloat16.
    """
    token_bytes = original(configurator, runner, num_layers)
    ours = BACKEND_NAME in arguments.attention_backends(arguments.of_process())
    if ours and runner.kv_cache_dtype == torch.float8_e4m3fn:
        token_bytes += num_layers * (cache_layout.LATENT_BYTES_FP8 - cache_layout.LATENT_WIDTH)
    return token_bytes


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's allocator of pages, whose two kernels are Triton's, in torch."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the tokens prefix_lens .. seq_lens - 1 of each sequence; None where too few pages are free.

        A sequence first fills the page that `last_loc`, the slot of its last token so far, is in.
        """
        held_b, total_b = _pages(prefix_lens, self.page_size), _pages(seq_lens, self.page_size)
        wanted = int((total_b - held_b).sum())
        if self.need_sort and wanted > len(self.free_pages):
            self.merge_and_sort_free()
        if wanted > len(self.free_pages):
            return None
        slots = []
        columns = (prefix_lens, seq_lens, last_loc, held_b, total_b)
        for prefix, length, last, held, total in zip(*(column.tolist() for column in columns), strict=True):
            position = torch.arange(prefix, length)
            # Row 0 is the page that is already held, if it has room; the others are new.
            pages = torch.cat((torch.tensor([last // self.page_size]), self.free_pages[: total - held]))
            self.free_pages = self.free_pages[total - held :]
            slots.append(pages[position // self.page_size - held + 1] * self.page_size + position % self.page_size)
        return torch.cat(slots)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """A slot for the last token of each sequence; None where too few pages are free."""
        return self.alloc_extend(seq_lens - 1, seq_lens_cpu - 1, seq_lens, seq_lens_cpu, last_loc, len(seq_lens))


def _pages(lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    return (lengths + page_size - 1) // page_size


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
