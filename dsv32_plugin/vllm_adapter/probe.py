"""What is registered in vLLM once it has loaded its plugins; `python -m` this module prints it as one line of JSON.

It runs in a process of its own because loading plugins changes the process, and may fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dsv32_plugin.admission import Installed
from dsv32_plugin.engines import VLLM
from dsv32_plugin.vllm_adapter.names import BACKEND_PATH, MODELS


def installed() -> Installed:
    """The release that this process runs, and on what."""
    from dsv32_plugin.vllm_adapter.upstream import ENGINE_VERSION

    try:
        from dsv32_plugin.vllm_adapter.upstream import current_platform

        device = current_platform.device_type
    except (ImportError, AttributeError):
        device = "unknown"  # a name of the engine is gone, and what is asked of this will say which
    return Installed(VLLM, ENGINE_VERSION, device)


def check_ours(architectures: Iterable[str]) -> None:
    """Raise RuntimeError where another plugin has taken the place of our model or backend."""
    from dsv32_plugin.vllm_adapter.upstream import AttentionBackendEnum, ModelRegistry

    backend = AttentionBackendEnum.CUSTOM
    for architecture in MODELS.keys() & architectures:
        VLLM.check_place(architecture, _path(ModelRegistry.models.get(architecture)), MODELS[architecture])
    VLLM.check_place(VLLM.backend, backend.get_path() if backend.is_overridden() else None, BACKEND_PATH)


def registered() -> dict[str, Any]:
    """Load vLLM's plugins as vLLM does, then look.

    Returns:
        `platform`, the class in use; `device_type`, empty where vLLM finds nothing to run on; `models`, the class of
        each architecture of ours, as "module:name"; `backend`, what the attention backend CUSTOM stands for, or None.
    """
    from dsv32_plugin.vllm_adapter.upstream import (
        AttentionBackendEnum,
        ModelRegistry,
        current_platform,
        load_general_plugins,
    )

    load_general_plugins()
    backend = AttentionBackendEnum.CUSTOM
    platform = type(current_platform)
    return {
        "platform": f"{platform.__module__}.{platform.__qualname__}",
        "device_type": current_platform.device_type,
        "models": {architecture: _model(ModelRegistry.models.get(architecture)) for architecture in MODELS},
        "backend": backend.get_path() if backend.is_overridden() else None,
    }


def _path(entry: Any) -> str | None:
    if entry is None:
        return None
    model = getattr(entry, "model_cls", None)  # of a class that was registered as such
    return f"{model.__module__}:{model.__qualname__}" if model else f"{entry.module_name}:{entry.class_name}"


def _model(entry: Any) -> str | None:
    path = _path(entry)
    if path in MODELS.values():
        loaded = entry.load_model_cls()  # what is named must exist
        return f"{loaded.__module__}:{loaded.__qualname__}"
    return path


if __name__ == "__main__":
    print(json.dumps(registered()))
