"""What we are called in SGLang, and where it finds us."""

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
