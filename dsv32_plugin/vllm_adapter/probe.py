"""What is registered in vLLM once it has loaded its plugins; `python -m` this module prints it as one line of JSON.

It runs in a process of its own because loading plugins changes the process, and may fail.
"""

from __future__ import annotations

import json
from typing import Any

from dsv32_plugin.vllm_adapter.names import MODELS


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


def _model(entry: Any) -> str | None:
    if entry is None:
        return None
    path = f"{getattr(entry, 'module_name', '')}:{getattr(entry, 'class_name', '')}"
    if path in MODELS.values():
        loaded = entry.load_model_cls()  # what is named must exist
        return f"{loaded.__module__}:{loaded.__qualname__}"
    return path


if __name__ == "__main__":
    print(json.dumps(registered()))
