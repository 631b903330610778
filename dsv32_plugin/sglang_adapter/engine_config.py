"""Start-up options: what follows from serving a DSA checkpoint with the plugin."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsv32_plugin import admission
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE
from dsv32_plugin.sglang_adapter import float32, guard, probe
from dsv32_plugin.sglang_adapter.arguments import architecture, attention_backends, decide, in_effect, model_config
from dsv32_plugin.sglang_adapter.grammars import warn_of_backend
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME, MODELS
from dsv32_plugin.sglang_adapter.upstream import without_dsa

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import ServerArgs


logger = logging.getLogger(__name__)


def serves(options: Any) -> bool:
    """Whether the checkpoint is one of ours."""
    return architecture(model_config(options)) in MODELS


def adjust_for_model(original: Callable[[ServerArgs], None], server_args: ServerArgs) -> None:
    """Goes around the step in which SGLang chooses its own backends for DSA from the GPU's generation."""
    options = in_effect(server_args)
    if not serves(options):
        original(server_args)
        return
    guard.check_given(options)
    probe.check_ours(architecture(model_config(options)))
    admission.prove(probe.installed())
    warn_of_backend(options.grammar_backend)
    if (options.speculative_eagle_topk or 1) != 1:
        raise NotImplementedError(
            f"--speculative-eagle-topk: the plugin supports 1, got {options.speculative_eagle_topk}; "
            "drafts are a chain, not a tree"
        )
    if options.speculative_algorithm is not None and options.enable_mixed_chunk:
        # On the host a mixed step knows lengths from before the last verdict. 0.5.15 never mixes them.
        logger.warning("dsv32: --enable-mixed-chunk has no effect with --speculative-algorithm")
        decide(server_args, enable_mixed_chunk=False)
    if attention_backends(options) == {None} or _is_cpu_default(options):
        decide(server_args, attention_backend=BACKEND_NAME)
    if options.page_size is None:
        decide(server_args, page_size=PAGE_SIZE)
    decide(server_args, cuda_graph_config=_graphs(options))
    float32.multiply_exactly(options)
    # A sum over the ranks that is part of a norm: the model has none, and its workspace would be made at every start.
    decide(server_args, enforce_disable_flashinfer_allreduce_fusion=True)
    # To SGLang it is a DeepSeek with MLA like any other: the DSA branch sets cache types and kernels of SGLang's own
    # backend, and needs a GPU to do it.
    with without_dsa():
        original(server_args)


def _graphs(options: Any) -> Any:
    """Decode runs in graphs on a GPU; a prefill's shape changes from step to step."""
    from dsv32_plugin.sglang_adapter.upstream import Backend

    config = options.cuda_graph_config
    without = {"prefill", "decode"} if options.device == "cpu" else {"prefill"}
    return replace(config, **{phase: replace(getattr(config, phase), backend=Backend.DISABLED) for phase in without})


def adjust_for_determinism(original: Callable[[ServerArgs], None], server_args: ServerArgs) -> None:
    """Goes around the step that puts `--enable-deterministic-inference` into effect.

    For a DeepSeek it knows a few backends that can do it, and refuses all others.
    """
    options = in_effect(server_args)
    if not (options.enable_deterministic_inference and serves(options)):
        original(server_args)
        return
    chosen = options.attention_backend
    decide(server_args, attention_backend="triton")
    try:
        original(server_args)
    finally:
        decide(server_args, attention_backend=chosen)
    # The processes that compute inherit the environment.
    os.environ["DSV32_BATCH_INVARIANT"] = "1"


def _is_cpu_default(options: Any) -> bool:
    """Whether the backend is the one that SGLang puts in on a CPU, before a platform or a model is asked."""
    from dsv32_plugin.sglang_adapter.upstream import is_host_cpu_arm64

    default = "torch_native" if is_host_cpu_arm64() else "intel_amx"
    return bool(options.device == "cpu" and attention_backends(options) == {default})
