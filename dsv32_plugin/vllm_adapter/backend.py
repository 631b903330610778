"""The attention backend: which caches vLLM allocates for us, and what it tells us about each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from dsv32_plugin.core.planner import gathered_keys
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import Step, mixed_batch, uniform_decodes
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE, PAGE_SIZE_MULTIPLE
from dsv32_plugin.vllm_adapter.upstream import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
    current_platform,
    split_decodes_and_prefills,
)

if TYPE_CHECKING:
    from dsv32_plugin.vllm_adapter.upstream import AttentionSpec, VllmConfig


class DsaMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Turns vLLM's description of a step into a `Step`, without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

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

        # With speculative decoding a decode has a token for each drafted one, too.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        assert self.reorder_batch_threshold is not None
        self.max_len = vllm_config.model_config.max_model_len
        self.topk = vllm_config.model_config.hf_config.index_topk
        self.policy = Policy.from_settings()
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # What a captured graph reads lies in tensors that are never replaced: these, and those of vLLM's runner.
        token_t = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self.seq_t = {n: token_t // n for n in range(1, self.reorder_batch_threshold + 1)}
        self.tokens_after_n = {n: token_t[:n].flip(0) for n in self.seq_t}
        self.visible_t = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        common = common_attn_metadata
        assert common.causal is True, "DSA is causal"
        assert self.reorder_batch_threshold is not None
        queries, num_tokens, num_reqs = common.max_query_len, common.num_actual_tokens, common.num_reqs
        if queries <= self.reorder_batch_threshold and num_tokens == num_reqs * queries:
            return self._uniform(common, queries)
        assert common.seq_lens_cpu_upper_bound is not None, "vLLM 0.26 always fills seq_lens_cpu_upper_bound"
        max_visible = self._max_visible(common)
        num_decodes = split_decodes_and_prefills(common, decode_threshold=self.reorder_batch_threshold)[0]
        return mixed_batch(
            slots_t=common.slot_mapping[:num_tokens],
            block_table_bp=common.block_table_tensor[:num_reqs],
            seq_lens_b=common.seq_lens[:num_reqs],
            query_start_b1=common.query_start_loc[: num_reqs + 1],
            seq_lens_cpu_b=common.seq_lens_cpu_upper_bound[:num_reqs],
            query_start_cpu_b1=common.query_start_loc_cpu[: num_reqs + 1],
            max_visible=max_visible,
            num_decodes=num_decodes,
            longest=self._longest(max_visible),
            max_gathered_keys=gathered_keys(max_visible, self.topk),
        )

    def _max_visible(self, common: CommonAttentionMetadata) -> int:
        """The longest of the batch; batch-invariant, the longest there can be: it decides whether keys are selected."""
        return self.max_len if self.policy.batch_invariant else common.max_seq_len

    def _uniform(self, common: CommonAttentionMetadata, queries: int) -> Step:
        """A batch that a graph may be captured with. Padding sequences have length 0, so their tokens see nothing."""
        num_tokens, num_reqs = common.num_actual_tokens, common.num_reqs
        if queries == 1:
            visible_t = common.seq_lens[:num_reqs]
        else:
            visible_t = self.visible_t[:num_tokens]
            visible_bn = visible_t.view(num_reqs, queries)
            torch.sub(common.seq_lens[:num_reqs, None], self.tokens_after_n[queries], out=visible_bn)
            visible_bn.clamp_(min=0)
        # A graph serves every length up to the longest, so with graphs keys are always selected. Decodes outside of
        # graphs are then run alike, so that the run before a capture compiles what the capture launches.
        any_length = self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        max_visible = self.max_len if any_length else self._max_visible(common)
        return uniform_decodes(
            slots_t=common.slot_mapping[:num_tokens],
            block_table_bp=common.block_table_tensor[:num_reqs],
            seq_t=self.seq_t[queries][:num_tokens],
            visible_t=visible_t,
            max_visible=max_visible,
            queries=queries,
            longest=self._longest(max_visible),
        )

    def _longest(self, max_visible: int) -> int:
        """On a GPU decodes are given one bound for ever, so that their kernels come in few variants."""
        return max_visible if self.device.type == "cpu" else self.max_len


class DsaBackend(AttentionBackend):
    """Backend of the latent caches, and, through `IndexKeyBackend`, of the index-key caches.

    vLLM asks it for shapes and metadata only: the computation is in `core.attention`.
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
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_SIZE_MULTIPLE)] if current_platform.is_cpu() else [PAGE_SIZE]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PAGE_SIZE

    # vLLM 0.28 asks for shape and order; can go with it. Later ones ask which of their layouts can be read.
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
    def supported_kv_cache_layouts(cls) -> tuple[object, ...]:
        # One head, so that these two are the same: [layers, pages, page size, width].
        from dsv32_plugin.vllm_adapter.upstream import KVCacheLayout

        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # A step is planned by the lengths that the CPU has. vLLM 0.28 and later refuse adaptive verification then.
        return False

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
