"""What vLLM's configuration becomes for our models, before anything is built from it."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from dsv32_plugin import admission
from dsv32_plugin.vllm_adapter import grammars, probe
from dsv32_plugin.vllm_adapter.names import MTP_ARCHITECTURE
from dsv32_plugin.vllm_adapter.upstream import (
    CompilationMode,
    CUDAGraphMode,
    VerifyAndUpdateConfig,
    VllmConfig,
    current_platform,
    init_logger,
)

logger = init_logger("vllm.dsv32_plugin")
_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
_BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"


class DsaEngineConfig(VerifyAndUpdateConfig):
    """vLLM calls this for our architectures at the start of the configuration's checks."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        try:
            _verify_and_update(vllm_config)
        except ValueError as error:
            # Of a ValueError pydantic makes one of its own, whose last line is the address of a manual.
            raise Refusal(str(error)) from error


class Refusal(RuntimeError):
    """What the plugin cannot do with this checkpoint and these options, in the process that was given them."""


def _verify_and_update(vllm_config: VllmConfig) -> None:
    # Imported late: in most processes of the engine no configuration is made.
    from dsv32_plugin.vllm_adapter import guard

    guard.check_checkpoint(vllm_config)
    guard.check_given(vllm_config)
    guard.check_options(vllm_config)
    probe.check_ours(vllm_config.model_config.hf_config.architectures)
    admission.prove(probe.installed())
    # Cascade attention, for prefixes that a whole batch shares, has no counterpart here.
    vllm_config.model_config.disable_cascade_attn = True
    grammars.choose_backend(vllm_config)
    if not current_platform.is_cpu():
        _compile_nothing(vllm_config)
        _break_no_graphs()
        _sample_without_compiling()
        if vllm_config.model_config.dtype == torch.float32:
            # Triton's default, also in vLLM's mixture of experts, is tf32 with 10 bits. Read in the workers.
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method == "mtp":
        # First ours, then the name by which vLLM knows that the draft model returns two tensors.
        speculative.draft_model_config.hf_config.architectures = [MTP_ARCHITECTURE, "DeepSeekMTPModel"]


def _compile_nothing(vllm_config: VllmConfig) -> None:
    """No torch.compile; CUDA graphs for batches of decodes.

    What Inductor would fuse, our kernels and vLLM's own custom operators compute in one launch already, and it would
    add its compilation to every start. A graph of a whole decode step leaves it nothing to win. Prefills run eagerly.
    """
    compilation = vllm_config.compilation_config
    if compilation.mode not in (None, CompilationMode.NONE):
        logger.warning("dsv32: compilation mode %s has no effect, the model is not compiled", compilation.mode.name)
    compilation.mode = CompilationMode.NONE
    if compilation.cudagraph_mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE):
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    elif compilation.cudagraph_mode == CUDAGraphMode.PIECEWISE:
        raise ValueError(
            "cudagraph_mode: expected FULL_DECODE_ONLY or NONE, got PIECEWISE, which needs torch.compile; leave it out"
        )
    logger.info_once(
        "dsv32: torch.compile is off (the plugin's kernels are fused already); CUDA graphs: %s",
        compilation.cudagraph_mode.name,
    )


def _break_no_graphs() -> None:
    """No CUDA graphs of prefills that pause for the attention: ours does not ask them to, it would be captured.

    vLLM 0.29 and later have them by default for these architectures.
    """
    if os.environ.setdefault(_BREAKABLE, "0") != "0":  # read in the workers
        raise ValueError(f"{_BREAKABLE}: expected 0, got {os.environ[_BREAKABLE]}; unset it")


def _sample_without_compiling() -> None:
    """FlashInfer compiles its sampler for about 100 s in the first start on a machine; vLLM has kernels of its own."""
    if _SAMPLER not in os.environ and find_spec("flashinfer_jit_cache") is None:
        os.environ[_SAMPLER] = "0"  # read in the workers
        logger.info_once("dsv32: sampling without FlashInfer, which would have to compile; %s=1 for it", _SAMPLER)
