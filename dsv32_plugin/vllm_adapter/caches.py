"""The two caches of a layer, as modules that vLLM finds by name and fills with memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsv32_plugin.kernels import cache_layout
from dsv32_plugin.vllm_adapter.backend import IndexKeyBackend
from dsv32_plugin.vllm_adapter.upstream import (
    AttentionBackend,
    AttentionBackendEnum,
    AttentionLayerBase,
    CacheConfig,
    MLAAttentionSpec,
    VllmConfig,
    get_current_vllm_config,
)

FP8_LATENTS = "fp8_ds_mla"
FP8_CACHES = ("fp8", "fp8_e4m3", FP8_LATENTS)


class PagedCache(nn.Module, AttentionLayerBase):
    """One paged cache; `kv_cache` is assigned by vLLM once memory is known.

    The layer names are those of vLLM's own model, so that what addresses caches by name (KV connectors, offload) works.
    """

    # MLAAttentionSpec.merge compares cache_dtype_str and not the width: caches of different width need different names.
    # vLLM 0.26.0; can go once merge compares head_size.
    def __init__(
        self, prefix: str, width: int, dtype: torch.dtype, spec_name: str, backend: type[AttentionBackend]
    ) -> None:
        super().__init__()
        self.layer_name = prefix
        self.width = width
        self.dtype = dtype
        self.spec_name = spec_name
        self.backend = backend
        self.kv_cache = self.pages = torch.tensor([])
        """What vLLM has assigned, and the same as [pages, page size, width]."""
        context = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"two layers are named {prefix}")
        context[prefix] = self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "kv_cache":
            assert isinstance(value, torch.Tensor)
            # vLLM 0.29 and later have a dimension for the heads, [pages, 1, page size, width].
            self.pages = value.squeeze(1) if value.dim() == 4 else value

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            dtype=self.dtype,
            cache_dtype_str=self.spec_name,
        )


def latent_cache(
    prefix: str, latent_rank: int, rope_dim: int, cache_config: CacheConfig, dtype: torch.dtype
) -> PagedCache:
    """The cache of latents and rotated keys, in the layout that `--kv-cache-dtype` names.

    Raises:
        ValueError: for a `--kv-cache-dtype` that has no layout here.
    """
    check_cache_dtype(cache_config.cache_dtype)
    backend = AttentionBackendEnum.CUSTOM.get_class()
    name = cache_config.cache_dtype
    if name in FP8_CACHES:
        return PagedCache(prefix, cache_layout.LATENT_BYTES_FP8, torch.uint8, FP8_LATENTS, backend)
    if name == "auto":
        return PagedCache(prefix, latent_rank + rope_dim, dtype, "auto", backend)
    return PagedCache(prefix, latent_rank + rope_dim, torch.bfloat16, "bfloat16", backend)


def check_cache_dtype(name: str) -> None:
    """Raise ValueError for a `--kv-cache-dtype` that has no layout here."""
    if name not in (*FP8_CACHES, "auto", "bfloat16"):
        raise ValueError(
            f"--kv-cache-dtype: expected auto, bfloat16 or fp8 (the 656-byte fp8_ds_mla layout), got {name}"
        )


def index_key_cache(prefix: str, index_dim: int, dtype: torch.dtype, quantised: bool) -> PagedCache:
    """The cache of index keys: 132 bytes a token where `quantised`, else the keys in `dtype`."""
    if quantised:
        return PagedCache(prefix, cache_layout.INDEX_BYTES, torch.uint8, "index_fp8", IndexKeyBackend)
    return PagedCache(prefix, index_dim, dtype, f"index_{dtype}", IndexKeyBackend)
