"""The vLLM adapter: everything that knows vLLM lives in this folder.

vLLM calls the two functions below through its entry points, in every process and possibly more than once. Both are
lazy: nothing of torch or vLLM is imported before the engine itself has imported it.
"""

from dsv32_plugin import settings
from dsv32_plugin.core.config import ARCHITECTURES
from dsv32_plugin.engines import VLLM

BACKEND_PATH = "dsv32_plugin.vllm_adapter.backend.DsaBackend"
CPU_PLATFORM_PATH = "dsv32_plugin.vllm_adapter.cpu.platform.DsaCpuPlatform"
TOKENIZER_MODE = "deepseek_v32"
PARSER_NAME = "dsv32"
RENDERING_MODULE = "dsv32_plugin.vllm_adapter.rendering"
PARSERS_MODULE = "dsv32_plugin.vllm_adapter.parsers"
MTP_ARCHITECTURE = "DsaMtpModel"
MODELS = {
    **dict.fromkeys(ARCHITECTURES.values(), "dsv32_plugin.vllm_adapter.model:DsaForCausalLM"),
    MTP_ARCHITECTURE: "dsv32_plugin.vllm_adapter.mtp:DsaMtp",
}
"""Architecture in config.json, or ours of the draft model -> the class that serves it."""


def register() -> None:
    """Entry point `vllm.general_plugins`: put our model and our attention backend into vLLM's registries."""
    if not settings.plugin_enabled():
        return
    from vllm import __version__

    VLLM.check_version(__version__)
    settings.check()
    from dsv32_plugin.vllm_adapter import registration

    registration.register()


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: our CPU platform where vLLM finds no accelerator, else None."""
    if not settings.plugin_enabled():
        return None
    from vllm.platforms import builtin_platform_plugins

    accelerators = (detect for name, detect in builtin_platform_plugins.items() if name != "cpu")
    return None if any(detect() for detect in accelerators) else CPU_PLATFORM_PATH
