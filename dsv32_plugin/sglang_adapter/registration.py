"""What is put into SGLang, and where: its registries first, then the hooks that no registry offers.

docs/patches.md has the reason of every hook, what removes it and what happens when it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv32_plugin.sglang_adapter import BACKEND_NAME, MODELS, PARSER_NAME, compat


@dataclass(frozen=True)
class Hook:
    """A place in SGLang, and our code for it, by the rules of SGLang's hook registry."""

    target: str
    code: Callable[..., Any]
    replaces: bool = False
    """The code stands in for the target; otherwise it goes around it and is given it first."""
    parameters: tuple[str, ...] | None = None
    """What the code relies on."""


def register() -> None:
    """Register everything; raises RuntimeError where SGLang is not as expected."""
    compat.check_engine_version()
    _register_model_and_backend()
    _register_parsers()
    _register_hooks(hooks())


def hooks() -> list[Hook]:
    """Every hook that this process needs."""
    from sglang.srt.platforms import current_platform

    from dsv32_plugin.sglang_adapter import options, parsers, pool, rendering, streaming

    calls = "sglang.srt.function_call.function_call_parser.FunctionCallParser"
    chat = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"
    everywhere = [
        Hook(
            "sglang.srt.server_args.ServerArgs._handle_model_specific_adjustments",
            options.adjust_for_model,
            parameters=("self",),
        ),
        Hook(
            "sglang.srt.server_args.ServerArgs._handle_deterministic_inference",
            options.adjust_for_determinism,
            parameters=("self",),
        ),
        Hook("sglang.srt.mem_cache.memory_pool.DSATokenToKVPool", pool.DsaTokenToKVPool, replaces=True),
        Hook(
            f"{chat}._encode_messages",
            rendering.encode_messages_around,
            parameters=("self", "messages", "request", "thinking_mode"),
        ),
        Hook(f"{chat}._get_reasoning_from_request", rendering.reasoning_around, parameters=("self", "request")),
        Hook(
            f"{calls}.get_structure_constraint",
            parsers.constraint_around,
            parameters=("self", "tool_choice", "parallel_tool_calls", "thinking_mode"),
        ),
        Hook(f"{chat}._generate_stream_content", streaming.generate_around, parameters=("self", "content", "index")),
    ]
    if not current_platform.is_out_of_tree():
        return everywhere
    from dsv32_plugin.sglang_adapter import cpu

    return [
        *everywhere,
        Hook("sglang.srt.utils.common.support_triton", cpu.support_triton_around, parameters=("backend",)),
        Hook(
            "sglang.srt.mem_cache.common.get_last_loc",
            cpu.get_last_loc,
            replaces=True,
            parameters=("req_to_token", "req_pool_indices_tensor", "prefix_lens_tensor"),
        ),
        Hook(
            "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
            cpu.apply_vocab_mask,
            replaces=True,
            parameters=("self", "logits", "vocab_mask"),
        ),
        Hook(
            "sglang.srt.distributed.device_communicators.pynccl_wrapper.NCCLLibrary.__init__",
            cpu.refuse_nccl,
            replaces=True,
            parameters=("self",),
        ),
    ]


def _register_model_and_backend() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.server_args import add_attention_backend_choices

    from dsv32_plugin.sglang_adapter.backend import DsaBackend
    from dsv32_plugin.sglang_adapter.model import DsaForCausalLM

    for architecture in MODELS:
        ModelRegistry.models[architecture] = DsaForCausalLM
    add_attention_backend_choices([BACKEND_NAME])
    register_attention_backend(BACKEND_NAME)(DsaBackend)


def _register_parsers() -> None:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    from dsv32_plugin.sglang_adapter.parsers import DsaReasoningDetector, DsaToolDetector

    FunctionCallParser.ToolCallParserEnum[PARSER_NAME] = DsaToolDetector
    ReasoningParser.DetectorMap[PARSER_NAME] = DsaReasoningDetector


def _register_hooks(wanted: list[Hook]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in wanted:
        compat.check_hook(hook.target, hook.parameters)
        HookRegistry.register(hook.target, hook.code, HookType.REPLACE if hook.replaces else HookType.AROUND)
