"""What is put into SGLang, and where: its registries first, then the hooks that no registry offers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dsv32_plugin.engines import SGLANG
from dsv32_plugin.sglang_adapter import hooks, upstream
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME, MODELS, PARSER_NAME


def register() -> None:
    """Register everything; raises RuntimeError where SGLang is not as expected."""
    SGLANG.check_version(upstream.installed_version())
    _register_model_and_backend()
    _register_parsers()
    if upstream.declares_options():
        _register_steps()
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


def _register_steps() -> None:
    """The steps of deciding upon options that SGLang lets a plugin go around."""
    from dsv32_plugin.sglang_adapter import engine_config
    from dsv32_plugin.sglang_adapter.upstream import register_resolution_hook

    for name, code in (
        ("handle_model_specific_adjustments", engine_config.adjust_for_model),
        ("handle_deterministic_inference", engine_config.adjust_for_determinism),
    ):
        try:
            register_resolution_hook(name)(_as_step(code))
        except ValueError as error:
            raise hooks.HookError(hooks.hook_problem(f"step {name}", "none of that name")) from error


def _as_step(code: Callable[[Callable[[Any], None], Any], None]) -> Callable[[Any, Callable[[Any], None]], None]:
    """SGLang's hooks are given what they go around first, its steps are given it last."""
    return lambda server_args, original: code(original, server_args)
