"""Start-up options: what follows from serving a DSA checkpoint with the plugin."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING
from unittest.mock import patch

from dsv32_plugin.cache_layout import PAGE_SIZE
from dsv32_plugin.sglang_adapter import BACKEND_NAME, MODELS, float32

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


def serves(server_args: ServerArgs) -> bool:
    """Whether the checkpoint is one of ours."""
    architectures = server_args.get_model_config().hf_config.architectures or [""]
    return architectures[0] in MODELS


def longest_sequence(server_args: ServerArgs) -> int:
    """Positions that a sequence can reach: drafts may pass the end of the context, and are dropped after it."""
    return int(server_args.get_model_config().context_len) + (server_args.speculative_num_draft_tokens or 0)


def adjust_for_model(original: Callable[[ServerArgs], None], server_args: ServerArgs) -> None:
    """Goes around the method in which SGLang chooses its own backends for DSA from the GPU's generation."""
    from sglang.srt.configs import model_config
    from sglang.srt.model_executor.cuda_graph_config import Backend

    if not serves(server_args):
        original(server_args)
        return
    if (server_args.speculative_eagle_topk or 1) != 1:
        raise NotImplementedError(
            f"--speculative-eagle-topk: the plugin supports 1, got {server_args.speculative_eagle_topk}; "
            "drafts are a chain, not a tree"
        )
    if server_args.is_attention_backend_not_set() or _is_cpu_default(server_args):
        server_args.attention_backend = BACKEND_NAME
    if server_args.page_size is None:
        server_args.page_size = PAGE_SIZE
    # Decode runs in graphs; a prefill's shape changes from step to step.
    server_args.cuda_graph_config.prefill.backend = Backend.DISABLED
    if server_args.device == "cpu":
        server_args.cuda_graph_config.decode.backend = Backend.DISABLED
    float32.multiply_exactly(server_args)
    # A sum over the ranks that is part of a norm: the model has none, and its workspace would be made at every start.
    server_args.enforce_disable_flashinfer_allreduce_fusion = True
    # To SGLang it is a DeepSeek with MLA like any other: the DSA branch sets cache types and kernels of SGLang's own
    # backend, and needs a GPU to do it.
    with patch.object(model_config, "is_deepseek_dsa", lambda config: False):
        original(server_args)


def adjust_for_determinism(original: Callable[[ServerArgs], None], server_args: ServerArgs) -> None:
    """Goes around the method that puts `--enable-deterministic-inference` into effect.

    For a DeepSeek it knows two backends that can do it, and refuses all others.
    """
    if not (server_args.enable_deterministic_inference and serves(server_args)):
        original(server_args)
        return
    chosen, server_args.attention_backend = server_args.attention_backend, "triton"
    try:
        original(server_args)
    finally:
        server_args.attention_backend = chosen
    # The processes that compute inherit the environment.
    os.environ["DSV32_BATCH_INVARIANT"] = "1"


def _is_cpu_default(server_args: ServerArgs) -> bool:
    """Whether the backend is the one that SGLang puts in on a CPU, before a platform or a model is asked."""
    from sglang.srt.utils import is_host_cpu_arm64

    default = "torch_native" if is_host_cpu_arm64() else "intel_amx"
    return bool(server_args.device == "cpu" and server_args.get_attention_backends() == (default, default))
