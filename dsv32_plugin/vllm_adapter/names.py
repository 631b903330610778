"""What we are called in vLLM, and where it finds us."""

from dsv32_plugin.core.config import ARCHITECTURES

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
