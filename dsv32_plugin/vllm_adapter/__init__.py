"""The vLLM adapter: everything that knows vLLM lives in this folder.

vLLM calls the two functions below through its entry points, in every process and possibly more than once. Both are
lazy: nothing of torch or vLLM is imported before the engine itself has imported it.
"""

from dsv32_plugin import admission, settings
from dsv32_plugin.vllm_adapter.names import CPU_PLATFORM_PATH


def register() -> None:
    """Entry point `vllm.general_plugins`: put our model and our attention backend into vLLM's registries."""
    if not settings.plugin_enabled():
        return
    from dsv32_plugin.vllm_adapter import probe

    admission.admit(probe.installed())
    settings.check()
    from dsv32_plugin.vllm_adapter import registration

    registration.register()


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: our CPU platform where vLLM finds no accelerator, else None."""
    if not settings.plugin_enabled():
        return None
    from dsv32_plugin.vllm_adapter.upstream import builtin_platform_plugins

    accelerators = (detect for name, detect in builtin_platform_plugins.items() if name != "cpu")
    return None if any(detect() for detect in accelerators) else CPU_PLATFORM_PATH
