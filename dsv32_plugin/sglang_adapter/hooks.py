"""Places in SGLang that no registry offers, and our code for them.

docs/patches.md has the reason of every hook, what removes it and what happens when it does not fit.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv32_plugin.engines import SGLANG
from dsv32_plugin.sglang_adapter import upstream


@dataclass(frozen=True)
class Hook:
    """A place in SGLang, and our code for it, by the rules of SGLang's hook registry."""

    target: str
    code: Callable[..., Any]
    replaces: bool = False
    """The code stands in for the target; otherwise it goes around it and is given it first."""
    parameters: tuple[str, ...] | None = None
    """What the code relies on."""


class HookError(RuntimeError):
    """A place to hook into is gone, or takes other parameters."""


def check_hook(target: str, parameters: tuple[str, ...] | None) -> None:
    """Raise HookError unless `target` exists and, where `parameters` says so, takes these first.

    Args:
        target: dotted path of a function, method or class.
        parameters: names of its leading parameters; None for a class that is replaced.
    """
    expected = "" if parameters is None else f"({', '.join(parameters)}, ...)"
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise HookError(hook_problem(f"{target}{expected}", f"nothing ({error})")) from error
    if parameters is None:
        return
    names = tuple(inspect.signature(found).parameters)
    if names[: len(parameters)] != parameters:
        raise HookError(hook_problem(f"{target}{expected}", f"({', '.join(names)})"))


def hook_problem(expected: str, found: str) -> str:
    return (
        f"sglang {upstream.installed_version()}: expected {expected} to hook into, found {found}; "
        f"dsv32-plugin is written for sglang=={SGLANG.install}: install that"
    )


def apply(wanted: list[Hook]) -> None:
    """Hand them to SGLang, which puts them in; raises HookError, before any is, where one does not fit."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in wanted:
        check_hook(hook.target, hook.parameters)
    for hook in wanted:
        HookRegistry.register(hook.target, hook.code, HookType.REPLACE if hook.replaces else HookType.AROUND)


def missing(wanted: list[Hook]) -> list[str]:
    """Targets of those that SGLang has not applied; it only logs when it cannot."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [hook.target for hook in wanted if hook.target not in HookRegistry._patched]


def of_process() -> list[Hook]:
    """Every hook that this process needs."""
    from sglang.srt.platforms import current_platform

    from dsv32_plugin.sglang_adapter import caches, engine_config, float32, guard, requests, updates

    given = "sglang.srt.server_args.ServerArgs"
    wanted = [
        Hook("sglang.srt.mem_cache.memory_pool.DSATokenToKVPool", caches.DsaTokenToKVPool, replaces=True),
        Hook(
            upstream.first_of(*float32.EXPERT_PRODUCTS),
            float32.store_exactly,
            parameters=float32.EXPERT_PRODUCT_PARAMETERS,
        ),
        Hook(
            "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
            requests.validate_around,
            parameters=("self", "obj", "input_ids"),
        ),
        *_chat_hooks(),
    ]
    wanted.append(Hook(f"{given}.check_server_args", guard.check_start, parameters=("self",)))
    wanted += [
        Hook(f"{updates.MANAGER}.{step}", updates.part_around(step), parameters=("self", "recv_req"))
        for step in updates.PARTS
    ]
    disk = f"{updates.MANAGER}.update_weights_from_disk"
    wanted.append(Hook(disk, updates.disk_around, parameters=("self", "recv_req")))
    if not upstream.declares_options():
        wanted += [
            Hook(f"{given}._handle_model_specific_adjustments", engine_config.adjust_for_model, parameters=("self",)),
            Hook(
                f"{given}._handle_deterministic_inference", engine_config.adjust_for_determinism, parameters=("self",)
            ),
        ]
    if not upstream.reckons_fp8_latents():
        wanted.append(
            Hook(
                "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
                caches.reckon_latents,
                parameters=("self", "mr", "num_layers"),
            )
        )
    if current_platform.is_out_of_tree() and not upstream.asks_the_platform():
        wanted += _cpu_hooks()
    return wanted


def _chat_hooks() -> list[Hook]:
    """From a request to its prompt, and from the model's text to the answer, on every endpoint that chats."""
    from dsv32_plugin.sglang_adapter import answers, gateway, grammars, parsers, rendering

    function_parser = "sglang.srt.function_call.function_call_parser.FunctionCallParser"
    reasoning_parser = "sglang.srt.parser.reasoning_parser.ReasoningParser"
    chat = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"
    anthropic = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing"
    responses = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
    wanted = [
        Hook(
            "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
            gateway.run_server_around,
            parameters=("server_args", "tokenizer_manager"),
        ),
        Hook(f"{chat}._convert_to_internal_request", gateway.convert_around, parameters=("self", "request")),
        Hook(
            f"{responses}._is_thinking_enabled_for_request",
            gateway.thinking_around,
            parameters=("self", "request"),
        ),
        Hook(f"{chat}._process_messages", grammars.process_around, parameters=("self", "request", "is_multimodal")),
        Hook(
            f"{responses}.create_responses",
            grammars.create_responses_around,
            parameters=("self", "request", "raw_request"),
        ),
        Hook(
            "sglang.srt.entrypoints.openai.protocol.ResponsesRequest.to_sampling_params",
            grammars.responses_parameters_around,
            parameters=("self", "default_max_tokens"),
        ),
        Hook(
            f"{chat}._apply_jinja_template",
            rendering.template_around,
            parameters=("self", "request", "tools", "is_multimodal"),
        ),
        Hook(f"{chat}._get_reasoning_from_request", rendering.reasoning_around, parameters=("self", "request")),
        Hook(
            f"{chat}._patch_reasoning_skip_special_tokens",
            answers.keep_special_tokens_around,
            parameters=("self", "request"),
        ),
        Hook(f"{chat}._generate_stream_content", answers.stream_around, parameters=("self", "content", "index")),
        Hook(f"{chat}._decode_response", answers.decode_around, parameters=("self", "ret_item")),
        Hook(
            f"{chat}._process_tool_calls",
            answers.process_tool_calls_around,
            parameters=("self", "text", "tools", "finish_reason", "tool_choice", "history_tool_calls_cnt"),
        ),
        Hook(f"{anthropic}._convert_response", answers.convert_around, parameters=("self", "response")),
        Hook(
            f"{function_parser}.get_structure_constraint",
            parsers.constraint_around,
            parameters=("self", "tool_choice", "parallel_tool_calls", "thinking_mode"),
        ),
    ]
    if not upstream.gives_reasoning():
        convert = f"{anthropic}._convert_to_chat_completion_request"
        wanted.append(Hook(convert, rendering.history_around, parameters=("self", "anthropic_request")))
    if not upstream.knows_cut_answers():
        wanted += [
            Hook(f"{function_parser}.parse_non_stream", parsers.parse_around, parameters=("self", "full_text")),
            Hook(
                f"{reasoning_parser}.__init__",
                parsers.reasoning_parser_around,
                parameters=("self", "model_type", "stream_reasoning", "force_reasoning", "request"),
            ),
        ]
    return [*wanted, *_responses_hooks()] if upstream.serves_responses() else wanted


def _responses_hooks() -> list[Hook]:
    from dsv32_plugin.sglang_adapter import responses

    api = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
    generator = ("self", "request", "sampling_params", "result_generator")
    wanted = [
        Hook(f"{api}._construct_input_messages", responses.history_around, parameters=("self", "request")),
        Hook(
            f"{api}._generate_with_builtin_tools",
            responses.outputs_around,
            parameters=("self", "request_id", "request_prompt", "adapted_request"),
        ),
    ]
    if upstream.knows_cut_answers():
        build = Hook(f"{api}._build_response", responses.build_around, parameters=("request", "sampling_params"))
        return [*wanted, build]
    stream = f"{api}.responses_stream_generator_non_harmony"
    return [
        *wanted,
        Hook(f"{api}.responses_full_generator", responses.whole_around, parameters=(*generator, "context")),
        Hook(stream, responses.stream_around, parameters=generator),
    ]


def _cpu_hooks() -> list[Hook]:
    from dsv32_plugin.sglang_adapter.cpu import platform

    return [
        Hook("sglang.srt.utils.common.support_triton", platform.support_triton_around, parameters=("backend",)),
        _last_loc_hook(),
        Hook(
            "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
            platform.apply_vocab_mask,
            replaces=True,
            parameters=("self", "logits", "vocab_mask"),
        ),
        Hook(
            "sglang.srt.distributed.device_communicators.pynccl_wrapper.NCCLLibrary.__init__",
            platform.refuse_nccl,
            replaces=True,
            parameters=("self",),
        ),
    ]


def _last_loc_hook() -> Hook:
    from dsv32_plugin.sglang_adapter.cpu import platform

    return Hook(
        upstream.first_of("sglang.srt.mem_cache.allocation.get_last_loc", "sglang.srt.mem_cache.common.get_last_loc"),
        platform.get_last_loc,
        replaces=True,
        parameters=("req_to_token", "req_pool_indices_tensor", "prefix_lens_tensor"),
    )


def of_drafts() -> list[Hook]:
    """Every hook that speculative decoding needs in this process."""
    from sglang.srt.platforms import current_platform

    from dsv32_plugin.sglang_adapter import speculation

    factory = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
    everywhere = [
        Hook(f"{factory}.create_decode_backend", speculation.create_decode_backend, parameters=("self",)),
        Hook(f"{factory}.create_draft_extend_backend", speculation.create_draft_extend_backend, parameters=("self",)),
        Hook(
            "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._capture_cuda_graphs",
            speculation.capture_graphs,
            parameters=("self",),
        ),
    ]
    return [*everywhere, *_cpu_draft_hooks()] if current_platform.is_out_of_tree() else everywhere


def _cpu_draft_hooks() -> list[Hook]:
    from dsv32_plugin.sglang_adapter.cpu import speculation

    eagle, kernels = "sglang.srt.speculative.eagle_utils", "sglang.kernels.ops.speculative"
    kernels_before, allocation = "sglang.srt.speculative.triton_ops", "sglang.srt.mem_cache.allocation"
    span = ("req_pool_indices", "req_to_token", "start_offset", "end_offset")
    tree = ("bonus_tokens", "parent_list", "top_scores_index", "draft_tokens", "seq_lens", "seq_lens_sum")
    wanted = [
        Hook(
            upstream.first_of(
                f"{kernels}.cache_locs.assign_draft_cache_locs_contiguous",
                f"{kernels_before}.cache_locs.assign_draft_cache_locs_contiguous",
            ),
            speculation.AssignDraftCacheLocs,
            replaces=True,
        ),
        Hook(
            upstream.first_of(f"{kernels}.eagle.fill_bonus_tokens", f"{kernels_before}.eagle.fill_bonus_tokens"),
            speculation.FillBonusTokens,
            replaces=True,
        ),
        Hook(
            upstream.first_of(
                f"{allocation}.assign_req_to_token_pool_func",
                f"{kernels_before}.cache_locs.assign_req_to_token_pool_func",
            ),
            speculation.assign_req_to_token_pool_func,
            replaces=True,
            parameters=(*span, "out_cache_loc", "batch_size"),
        ),
        Hook(
            f"{eagle}.build_tree_kernel_efficient",
            speculation.build_tree_kernel_efficient,
            replaces=True,
            parameters=(*tree, "topk", "spec_steps", "num_verify_tokens"),
        ),
        _verdict_hook(),
    ]
    if upstream.asks_the_platform():
        # All other batches go without; the platform has the rest.
        return [*wanted, _last_loc_hook()]
    extend = f"{kernels_before}.cache_locs.assign_extend_cache_locs_func"
    parameters = (*span, "batch_size", "draft_token_num", "device")
    return [*wanted, Hook(extend, speculation.assign_extend_cache_locs_func, replaces=True, parameters=parameters)]


def _verdict_hook() -> Hook:
    """0.5.23 hands a grammar's mask over with what applies it."""
    from dsv32_plugin.sglang_adapter.cpu import speculation

    target, given = "sglang.srt.speculative.eagle_utils.eagle_sample", ("verify_input", "batch", "logits_output")
    if upstream.masks_itself():
        return Hook(target, speculation.eagle_sample_masked, replaces=True, parameters=(*given, "grammar_mask"))
    return Hook(target, speculation.eagle_sample, replaces=True, parameters=(*given, "vocab_mask"))
