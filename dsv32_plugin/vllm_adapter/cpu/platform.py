"""vLLM on a machine without a GPU: the stock CUDA wheel, made to serve DSA checkpoints through torch on the CPU."""

import os
from typing import TYPE_CHECKING

from dsv32_plugin.kernels.cache_layout import PAGE_SIZE
from dsv32_plugin.vllm_adapter.cpu import operators
from dsv32_plugin.vllm_adapter.upstream import AttentionBackendEnum, CpuPlatform, vllm_version_matches_substr

if TYPE_CHECKING:
    from dsv32_plugin.vllm_adapter.upstream import (
        AttentionSelectorConfig,
        EngineInput,
        PoolingParams,
        SamplingParams,
        VllmConfig,
    )


class DsaCpuPlatform(CpuPlatform):
    """`CpuPlatform` that allows sparse MLA, chunked prefill and prefix caching, and compiles nothing."""

    simple_compile_backend = "eager"
    speculates = False

    @classmethod
    def import_kernels(cls) -> None:
        # Only vLLM's CPU build holds CPU kernels; with the CUDA wheel the import would fail and log a warning.
        if vllm_version_matches_substr("cpu"):
            super().import_kernels()
        # vLLM imports a package of kernels for GPUs, which would compile itself in two more processes each time.
        os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
        operators.define_missing()

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: "AttentionBackendEnum",
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        if attn_selector_config.use_mla and attn_selector_config.use_sparse:
            return AttentionBackendEnum.CUSTOM.get_path()
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        # Imported late: vllm.config itself asks for the platform.
        from dsv32_plugin.vllm_adapter.upstream import CompilationMode

        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        chunked, max_tokens = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        prefix_caching = cache.enable_prefix_caching
        page_size = cache.block_size if cache.user_specified_block_size else PAGE_SIZE
        super().check_and_update_config(vllm_config)
        # The base class switches off for MLA what its own backends cannot do on a CPU, and takes their size of pages.
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = chunked, max_tokens
        cache.enable_prefix_caching = prefix_caching
        cache.block_size = page_size
        cls.speculates = vllm_config.speculative_config is not None
        # Tracing costs 20 s of warm-up and gains nothing on reference kernels. Workers inherit the environment.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        workers = vllm_config.parallel_config.local_world_size
        if workers > 1:
            # By default vLLM binds every worker to a NUMA node of its own, which a small machine does not have.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """Keep the size of pages: from the backends of two caches vLLM would make its own default of it."""

    @classmethod
    def validate_request(cls, processed_inputs: "EngineInput", params: "SamplingParams | PoolingParams") -> None:
        # vLLM's fallbacks for a CPU lose the sampling parameters of drafted tokens (vLLM 0.26.0, expand_kernel).
        temperature = getattr(params, "temperature", 0.0)
        if cls.speculates and temperature > 0:
            raise ValueError(f"temperature: expected 0 with speculative decoding on a CPU, got {temperature}")
