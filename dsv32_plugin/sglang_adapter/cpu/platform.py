"""SGLang on a machine without a GPU: the stock CUDA wheel, made to serve DSA checkpoints through torch on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch

from dsv32_plugin.kernels.cache_layout import PAGE_SIZE
from dsv32_plugin.sglang_adapter import upstream
from dsv32_plugin.sglang_adapter.cpu.devices import without_gpu
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME
from dsv32_plugin.sglang_adapter.upstream import PlatformEnum, SRTPlatform

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import ServerArgs, StandardCombineInput

DISPATCH_KEY = "dsv32_cpu"
DEFAULT_MAX_TOKENS = 32768
"""Tokens in the caches where the user names no number: SGLang would fill most of the memory."""


class DsaCpuPlatform(SRTPlatform):
    """A CPU, driven through torch alone: `sgl_kernel`'s CPU build is another wheel."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOKENS
        if server_args.page_size is None:
            server_args.page_size = PAGE_SIZE
        # Overlap hides the host's work behind a device's; here they are the same.
        server_args.disable_overlap_schedule = True
        server_args.sampling_backend = "pytorch"
        # To compile a few small functions takes longer than they ever do.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        ranks = server_args.tp_size
        if upstream.binds_every_rank():
            ranks *= server_args.pp_size * server_args.dp_size
        if ranks > 1:
            # By default SGLang wants a NUMA node for every rank, which a small machine does not have.
            cores = sorted(os.sched_getaffinity(0))
            every = ",".join(map(str, cores))
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([every] * ranks))
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // ranks)))

    def init_backend(self) -> None:
        from dsv32_plugin.sglang_adapter.upstream import UnquantizedFusedMoEMethod

        UnquantizedFusedMoEMethod.register_oot_forward(UnquantizedFusedMoEMethod, run_experts, DISPATCH_KEY)

    def get_default_attention_backend(self) -> str:
        return BACKEND_NAME

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """From 0.5.22 on; None where SGLang's own will do."""
        return self.get_dsa_kv_pool_cls() if kind == "dsa" else None

    def get_dsa_kv_pool_cls(self) -> type:
        """Before 0.5.22."""
        from dsv32_plugin.sglang_adapter.caches import DsaTokenToKVPool

        return DsaTokenToKVPool

    def get_paged_allocator_cls(self) -> type | None:
        """SGLang's own is without Triton where the platform is asked."""
        if upstream.asks_the_platform():
            return None
        from dsv32_plugin.sglang_adapter.cpu.pages import CpuPagedAllocator

        return CpuPagedAllocator

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """The guard names what is refused, and why."""
        return True

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from dsv32_plugin.sglang_adapter.cpu.speculation import assign_extend_cache_locs_func

        return assign_extend_cache_locs_func

    def get_quantization_config(self, quantization: str) -> type | None:
        from dsv32_plugin.core.quantisation import READERS
        from dsv32_plugin.sglang_adapter import arguments
        from dsv32_plugin.sglang_adapter.cpu.quantisation import DequantisedConfig
        from dsv32_plugin.sglang_adapter.engine_config import serves

        # By this ending SGLang knows its kernels for the same weights.
        is_read = quantization.removesuffix("_marlin") in READERS
        return DequantisedConfig if is_read and serves(arguments.of_process()) else None

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False


def run_experts(method: Any, layer: Any, dispatch_output: Any) -> StandardCombineInput:
    """The sum over a token's experts, those of this rank: SGLang's form for a CPU takes no numbers of absent ones."""
    from dsv32_plugin.sglang_adapter.upstream import StandardCombineInput

    x_th, (weights_tk, experts_tk, _) = dispatch_output.hidden_states, dispatch_output.topk_output
    sum_th = torch.zeros(x_th.shape, dtype=weights_tk.dtype)
    for expert in experts_tk[experts_tk >= 0].unique().tolist():
        token, choice = (experts_tk == expert).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(x_th[token], layer.w13_weight[expert]).chunk(2, dim=-1)
        value = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, layer.w2_weight[expert])
        sum_th.index_add_(0, token, value * weights_tk[token, choice, None])
    return StandardCombineInput(hidden_states=sum_th.to(x_th.dtype))


def support_triton_around(original: Callable[[str], bool], backend: str) -> bool:
    """SGLang runs small Triton kernels of its own for every backend that it does not know to be a CPU's."""
    return backend != BACKEND_NAME and original(backend)


def get_last_loc(
    req_to_token: torch.Tensor, req_pool_indices_tensor: torch.Tensor, prefix_lens_tensor: torch.Tensor
) -> torch.Tensor:
    """The slot of each sequence's last token, -1 where it has none."""
    last = req_to_token[req_pool_indices_tensor, (prefix_lens_tensor - 1).clamp(min=0)]
    return torch.where(prefix_lens_tensor > 0, last.to(prefix_lens_tensor.dtype), -1)


def apply_vocab_mask(grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Forbid the tokens that a grammar does not allow. SGLang calls Triton here, or refuses."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)


def refuse_nccl(*args: Any) -> None:
    """NCCL's library loads without a GPU and fails later; SGLang goes on without it only where it does not load."""
    raise OSError("there is no GPU for NCCL")


def copy_share(
    dst: torch.Tensor, src: torch.Tensor, dim: int, offset: torch.Tensor, sz: torch.Tensor, offset_src: bool
) -> None:
    """The rows of one rank, to where or from where they lie among those of all."""
    first, rows = int(offset), min(int(sz), len(dst), len(src))
    if offset_src:
        dst[:rows] = src[first : first + rows]
    else:
        dst[first : first + rows] = src[:rows]


def gather_rows(group: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    """The rows of all ranks, in their order. SGLang has it as an operator of GPUs."""
    torch.distributed.all_gather_into_tensor(output, input, group=group.device_group)


def scatter_sum(group: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    """This rank's rows of the sum over all ranks. SGLang has it as an operator of GPUs."""
    first = group.rank_in_group * len(output)
    output.copy_(group.all_reduce(input)[first : first + len(output)])


def pad_around(original: Callable[..., None], *arguments: Any) -> None:
    """SGLang copies the numbers of tokens from pinned memory, which there is none of without a GPU."""
    with without_gpu():
        original(*arguments)


def init_host_cache(cache: Any, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "") -> None:
    """What is captured in a step, by slot. SGLang asks CUDA for memory that a device can read."""
    cache.buffer = torch.zeros(num_tokens, num_layers, topk_size, dtype=torch.int32)
    cache.num_tokens, cache.num_layers, cache.topk_size, cache.name = num_tokens, num_layers, topk_size, name
