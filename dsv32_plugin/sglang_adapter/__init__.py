"""The SGLang adapter: everything that knows SGLang lives in this folder.

SGLang calls the two functions below through its entry points, in every process. Nothing of torch or SGLang is imported
before the engine itself has imported it.
"""

from __future__ import annotations

import os

from dsv32_plugin import settings
from dsv32_plugin.core.config import ARCHITECTURES

BACKEND_NAME = "dsv32"
PARSER_NAME = "dsv32"
BACKEND_PATH = "dsv32_plugin.sglang_adapter.backend.DsaBackend"
CPU_PLATFORM_PATH = "dsv32_plugin.sglang_adapter.cpu.platform.DsaCpuPlatform"
MODEL_PATH = "dsv32_plugin.sglang_adapter.model:DsaForCausalLM"
DRAFT_MODEL_PATH = "dsv32_plugin.sglang_adapter.mtp:DsaMtp"
DRAFT_ARCHITECTURES = ("DeepseekV3ForCausalLMNextN", "GlmMoeDsaForCausalLMNextN")
"""What SGLang calls the draft model of every DeepSeek, V3 included; 0.5.23 that of GLM-5 by a name of its own."""
MODELS = dict.fromkeys(ARCHITECTURES.values(), MODEL_PATH)
"""Architecture in config.json -> the class that serves it."""


def register() -> None:
    """Entry point `sglang.srt.plugins`: put our model, backend, cache and chat format into SGLang.

    SGLang logs what a plugin raises and goes on without the plugin. Ours would then be replaced by in-tree code in
    silence, so a failure ends the process instead.
    """
    try:
        if settings.plugin_enabled():
            settings.check()
            from dsv32_plugin.sglang_adapter import registration

            registration.register()
    except Exception as error:
        raise SystemExit(f"dsv32-plugin: {error}; DSV32_PLUGIN=0 runs SGLang without the plugin") from error


def platform() -> str | None:
    """Entry point `sglang.srt.platforms`: our CPU platform where there is no accelerator, else None.

    Who asks for SGLang's CPU engine, another build with kernels of its own, gets that.
    """
    if not settings.plugin_enabled() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    import torch

    accelerators = (getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "mps"))
    found = any(module is not None and module.is_available() for module in accelerators)
    return None if found else CPU_PLATFORM_PATH
