"""What is put into vLLM, and where: its registries, then the hooks that no registry offers (docs/patches.md)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_plugin import settings
from dsv32_plugin.core import chat_format
from dsv32_plugin.core.config import ARCHITECTURES
from dsv32_plugin.vllm_adapter import gateway, grammars, hooks, upstream
from dsv32_plugin.vllm_adapter.engine_config import DsaEngineConfig
from dsv32_plugin.vllm_adapter.names import (
    BACKEND_PATH,
    MODELS,
    PARSER_NAME,
    PARSERS_MODULE,
    RENDERING_MODULE,
    TOKENIZER_MODE,
)
from dsv32_plugin.vllm_adapter.upstream import (
    MODELS_CONFIG_MAP,
    RENDERER_REGISTRY,
    AttentionBackendEnum,
    ModelRegistry,
    ReasoningParserManager,
    TokenizerRegistry,
    ToolParserManager,
    current_platform,
    init_logger,
    register_backend,
)

logger = init_logger("vllm.dsv32_plugin")


def register() -> None:
    """Register everything; raises HookError where vLLM is not as expected."""
    if upstream.VLLM_BATCH_INVARIANT and not settings.batch_invariant():
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
    hooks.at("ParserManager.get_parser", _compose_parser)
    gateway.install()
    if current_platform.is_cpu():
        import dsv32_plugin.vllm_adapter.cpu.quantisation  # noqa: F401  registers itself


def _compose_parser(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What vLLM composes of the parsers that its options name: with one of ours it knows how an answer ended."""
    model, tool, reasoning = (kwargs.get(name) for name in ("model_name", "tool_parser_name", "reasoning_parser_name"))
    if complaint := chat_format.complaint(Path(model or ""), "vllm", tool, reasoning):
        logger.warning_once("dsv32: %s", complaint)
    composed = original(*args, **kwargs)
    named = (composed.reasoning_parser_cls, composed.tool_parser_cls) if composed else ()
    if not any(parser is not None and parser.__module__ == PARSERS_MODULE for parser in named):
        return composed
    from dsv32_plugin.vllm_adapter import endpoints
    from dsv32_plugin.vllm_adapter.answers import AnswerParser

    endpoints.hook()
    return type("DsaParser", (AnswerParser, composed), {})
