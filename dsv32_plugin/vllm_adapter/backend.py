"""The attention backend: which caches vLLM allocates for us, and what it tells us about each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from dsv32_plugin.batch import DsaBatch, build_batch
from dsv32_plugin.cache_layout import PAGE_SIZE_MULTIPLE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


class DsaMetadataBuilder(AttentionMetadataBuilder[DsaBatch]):
    """Turns vLLM's description of a step into a `DsaBatch`, without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold: int | None = 1

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        for name, size in (
            ("decode", vllm_config.parallel_config.decode_context_parallel_size),
            ("prefill", vllm_config.parallel_config.prefill_context_parallel_size),
        ):
            if size > 1:
                raise NotImplementedError(
                    f"--{name}-context-parallel-size: the plugin supports 1, got {size}; use tensor parallelism instead"
                )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DsaBatch:
        common = common_attn_metadata
        assert common.causal is True, "DSA is causal"
        assert common.seq_lens_cpu_upper_bound is not None, "vLLM 0.26 always fills seq_lens_cpu_upper_bound"
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=1)
        assert num_decode_tokens == num_decodes, "a decode has one query token"
        return build_batch(
            slots_t=common.slot_mapping[: common.num_actual_tokens],
            block_table_bp=common.block_table_tensor[: common.num_reqs],
            seq_lens_b=common.seq_lens[: common.num_reqs],
            query_start_b1=common.query_start_loc[: common.num_reqs + 1],
            seq_lens_cpu_b=common.seq_lens_cpu_upper_bound[: common.num_reqs],
            query_start_cpu_b1=common.query_start_loc_cpu[: common.num_reqs + 1],
            max_visible=common.max_seq_len,
            num_decodes=num_decodes,
            queries_per_decode=1,
        )


class DsaBackend(AttentionBackend):
    """Backend of the latent caches, and, through `IndexKeyBackend`, of the index-key caches.

    vLLM asks it for shapes and metadata only: the computation is in `attention.DsaAttention`.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        raise NotImplementedError("dsv32_plugin computes attention in DsaAttention, not in an AttentionImpl")

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return DsaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_SIZE_MULTIPLE)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return (num_blocks, block_size, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        # Layers first: every layer has a cache of its own.
        return (0, 1, 2, 3) if include_num_layers_dimension else (0, 1, 2)

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True


class IndexKeyMetadataBuilder(DsaMetadataBuilder):
    """The index keys live in the pages of the latents, so only the page table is kept, to verify exactly that."""

    def build(  # type: ignore[override]
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> torch.Tensor:
        return common_attn_metadata.block_table_tensor


class IndexKeyBackend(DsaBackend):
    """Backend of the index-key caches."""

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return IndexKeyMetadataBuilder
