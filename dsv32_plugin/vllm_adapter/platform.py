"""vLLM on a machine without a GPU: the stock CUDA wheel, made to serve DSA checkpoints through torch on the CPU."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.platforms import vllm_version_matches_substr
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from dsv32_plugin.cache_layout import PAGE_SIZE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

# The CPU worker calls these operators by name; the CUDA wheel does not hold them.
_MISSING_CPU_OPS = {
    "init_cpu_memory_env": "(SymInt[] nodes) -> str",
    "compute_slot_mapping_kernel_impl": (
        "(Tensor query_start_loc, Tensor positions, Tensor block_table, Tensor(a!) slot_mapping, "
        "SymInt block_size) -> ()"
    ),
    "silu_and_mul": "(Tensor(a!) out, Tensor x) -> ()",
}


def _init_cpu_memory_env(nodes: list[int]) -> str:
    """Do nothing: memory is not bound to a NUMA node."""
    return ""


def _compute_slot_mapping_kernel_impl(
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> None:
    """slot[t] = block_table[seq(t), position // block_size] * block_size + position % block_size; -1 past the batch."""
    num_tokens = int(query_start_loc[-1])
    seq_t = torch.repeat_interleave(
        torch.arange(query_start_loc.numel() - 1), query_start_loc.diff().long(), output_size=num_tokens
    )
    positions_t = positions[:num_tokens]
    pages_t = block_table[seq_t, positions_t // block_size].long()
    slot_mapping[:num_tokens] = pages_t * block_size + positions_t % block_size
    slot_mapping[num_tokens:] = -1


def _silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def define_missing_ops() -> None:
    """Define the operators of `torch.ops._C` that vLLM's CPU worker needs and this build of vLLM lacks."""
    implementations: dict[str, Callable[..., object]] = {
        "init_cpu_memory_env": _init_cpu_memory_env,
        "compute_slot_mapping_kernel_impl": _compute_slot_mapping_kernel_impl,
        "silu_and_mul": _silu_and_mul,
    }
    for name, schema in _MISSING_CPU_OPS.items():
        if not hasattr(torch.ops._C, name):
            torch.library.define(f"_C::{name}", schema)
            # No tensor argument decides the dispatch of init_cpu_memory_env.
            key = "CPU" if "Tensor" in schema else "CompositeExplicitAutograd"
            torch.library.impl(f"_C::{name}", key, implementations[name])


class DsaCpuPlatform(CpuPlatform):
    """`CpuPlatform` that allows sparse MLA, chunked prefill and prefix caching, and compiles nothing."""

    simple_compile_backend = "eager"

    @classmethod
    def import_kernels(cls) -> None:
        # Only vLLM's CPU build holds CPU kernels; with the CUDA wheel the import would fail and log a warning.
        if vllm_version_matches_substr("cpu"):
            super().import_kernels()
        define_missing_ops()

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
        from vllm.config import CompilationMode

        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        chunked = scheduler.enable_chunked_prefill
        max_tokens = scheduler.max_num_batched_tokens
        super().check_and_update_config(vllm_config)
        # The base class switches chunked prefill off for MLA, which its own backends cannot do on a CPU. Ours can.
        scheduler.enable_chunked_prefill = chunked
        scheduler.max_num_batched_tokens = max_tokens
        if not cache.user_specified_block_size:
            cache.block_size = PAGE_SIZE
        # Tracing costs 20 s of warm-up and gains nothing on reference kernels. Workers inherit the environment.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        workers = vllm_config.parallel_config.local_world_size
        if workers > 1:
            # By default vLLM binds every worker to a NUMA node of its own, which a small machine does not have.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
