"""The SGLang adapter: everything that knows SGLang lives in this folder.

SGLang calls the two functions below through its entry points, in every process. Nothing of torch or SGLang is imported
before the engine itself has imported it.
"""

from __future__ import annotations

import os

from dsv32_plugin import settings
from dsv32_plugin.sglang_adapter.names import CPU_PLATFORM_PATH


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
