"""What is registered in SGLang once it has loaded its plugins; `python -m` this module prints it as one line of JSON.

It runs in a process of its own because loading plugins changes the process, and may fail.
"""

from __future__ import annotations

import json
from typing import Any

from dsv32_plugin.admission import Installed
from dsv32_plugin.engines import SGLANG
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME, BACKEND_PATH, MODELS


def installed() -> Installed:
    """The release that this process runs, and on what."""
    from dsv32_plugin.sglang_adapter.upstream import installed_version

    try:
        from dsv32_plugin.sglang_adapter.upstream import current_platform

        device = current_platform.device_type
    except (ImportError, AttributeError):
        device = "unknown"  # a name of the engine is gone, and what is asked of this will say which
    return Installed(SGLANG, installed_version(), device)


def check_ours(architecture: str) -> None:
    """Raise RuntimeError where another plugin has taken the place of our model or backend."""
    from dsv32_plugin.sglang_adapter.upstream import ATTENTION_BACKENDS, ModelRegistry

    SGLANG.check_place(architecture, _path(ModelRegistry.models.get(architecture), ":"), MODELS[architecture])
    SGLANG.check_place(BACKEND_NAME, _path(ATTENTION_BACKENDS.get(BACKEND_NAME), "."), BACKEND_PATH)


def registered() -> dict[str, Any]:
    """Load SGLang's plugins as SGLang does, then look.

    Returns:
        `platform`, the class in use; `device_type`; `models`, the class of each architecture of ours, as "module:name";
        `backend`, the class behind our attention backend's name, or None; `missing_hooks`, the targets of those of ours
        that are not in place.
    """
    from dsv32_plugin.sglang_adapter.upstream import load_plugins

    load_plugins()
    from dsv32_plugin.sglang_adapter import hooks
    from dsv32_plugin.sglang_adapter.upstream import ATTENTION_BACKENDS, ModelRegistry, current_platform

    backend = ATTENTION_BACKENDS.get(BACKEND_NAME)
    return {
        "platform": _path(type(current_platform), "."),
        "device_type": current_platform.device_type,
        "models": {architecture: _path(ModelRegistry.models.get(architecture), ":") for architecture in MODELS},
        "backend": _path(backend, "."),
        "missing_hooks": hooks.missing(hooks.of_process()),
    }


def _path(code: Any, separator: str) -> str | None:
    return None if code is None else f"{code.__module__}{separator}{code.__qualname__}"


if __name__ == "__main__":
    print(json.dumps(registered()))
