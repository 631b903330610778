"""The vLLM adapter: everything that knows vLLM lives in this folder.

vLLM calls the two functions below through its entry points, in every process and possibly more than once. Both are
lazy: nothing of torch or vLLM is imported before the engine itself has imported it.
"""

import os
from collections.abc import Callable
from typing import Any

from dsv32_plugin import settings
from dsv32_plugin.config import ARCHITECTURES

BACKEND_PATH = "dsv32_plugin.vllm_adapter.backend.DsaBackend"
CPU_PLATFORM_PATH = "dsv32_plugin.vllm_adapter.platform.DsaCpuPlatform"
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
    from dsv32_plugin.vllm_adapter import compat

    compat.check_engine_version()
    settings.check()
    from vllm import envs
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform
    from vllm.reasoning import ReasoningParserManager
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from dsv32_plugin.vllm_adapter import gateway, grammars
    from dsv32_plugin.vllm_adapter.engine_config import DsaEngineConfig

    if envs.VLLM_BATCH_INVARIANT and not settings.batch_invariant():
        if os.environ.get("DSV32_BATCH_INVARIANT"):
            raise ValueError("DSV32_BATCH_INVARIANT: expected 1 with VLLM_BATCH_INVARIANT=1, got 0; unset one of them")
        os.environ["DSV32_BATCH_INVARIANT"] = "1"
    for architecture, path in MODELS.items():
        ModelRegistry.register_model(architecture, path)
    MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES.values(), DsaEngineConfig))
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    # The mode that vLLM chooses for DeepseekV32ForCausalLM. Assigned, since `register` warns where it replaces.
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = (RENDERING_MODULE, "DsaTokenizer")
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = (RENDERING_MODULE, "DsaRenderer")
    grammars.hook()
    ReasoningParserManager.register_lazy_module(PARSER_NAME, PARSERS_MODULE, "DsaReasoningParser")
    ToolParserManager.register_lazy_module(PARSER_NAME, PARSERS_MODULE, "DsaToolParser")
    compat.hook("vllm.parser.ParserManager.get_parser", ("tool_parser_name", "reasoning_parser_name"), _compose_parser)
    gateway.install()
    if current_platform.is_cpu():
        import dsv32_plugin.vllm_adapter.quantisation  # noqa: F401  registers itself


def _compose_parser(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What vLLM composes of the parsers that its options name: with one of ours it knows how an answer ended."""
    composed = original(*args, **kwargs)
    named = (composed.reasoning_parser_cls, composed.tool_parser_cls) if composed else ()
    if not any(parser is not None and parser.__module__ == PARSERS_MODULE for parser in named):
        return composed
    from dsv32_plugin.vllm_adapter import endpoints
    from dsv32_plugin.vllm_adapter.answers import AnswerParser

    endpoints.hook()
    return type("DsaParser", (AnswerParser, composed), {})


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: our CPU platform where vLLM finds no accelerator, else None."""
    if not settings.plugin_enabled():
        return None
    from vllm.platforms import builtin_platform_plugins

    accelerators = (detect for name, detect in builtin_platform_plugins.items() if name != "cpu")
    return None if any(detect() for detect in accelerators) else CPU_PLATFORM_PATH
