"""What is put into SGLang, and where: its registries first, then the hooks that no registry offers."""

from __future__ import annotations

from contextlib import suppress

from dsv32_plugin import admission
from dsv32_plugin.sglang_adapter import hooks, probe
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME, MODELS, PARSER_NAME


def register() -> None:
    """Register everything; raises RuntimeError where SGLang is not as expected."""
    admission.admit(probe.installed())
    _register_model_and_backend()
    _register_parsers()
    hooks.apply(hooks.of_process())
    # Without these, speculative decoding is refused, and all else works.
    with suppress(hooks.HookError):
        hooks.apply(hooks.of_drafts())


def _register_model_and_backend() -> None:
    from dsv32_plugin.sglang_adapter.backend import DsaBackend
    from dsv32_plugin.sglang_adapter.model import DsaForCausalLM
    from dsv32_plugin.sglang_adapter.upstream import (
        ModelRegistry,
        add_attention_backend_choices,
        register_attention_backend,
    )

    for architecture in MODELS:
        ModelRegistry.models[architecture] = DsaForCausalLM
    add_attention_backend_choices([BACKEND_NAME])
    register_attention_backend(BACKEND_NAME)(DsaBackend)


def _register_parsers() -> None:
    from dsv32_plugin.sglang_adapter.parsers import DsaReasoningDetector, DsaToolDetector
    from dsv32_plugin.sglang_adapter.upstream import FunctionCallParser, ReasoningParser

    FunctionCallParser.ToolCallParserEnum[PARSER_NAME] = DsaToolDetector
    ReasoningParser.DetectorMap[PARSER_NAME] = DsaReasoningDetector
