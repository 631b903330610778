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
from dsv32_plugin.surface import first_of


@dataclass(frozen=True)
class Hook:
    """A place in SGLang, and our code for it, by the rules of SGLang's hook registry."""

    target: str
    ours: str
    """Module and name in this package; imported when it is put in, since much of it asks for the hooks."""
    replaces: bool = False
    """The code stands in for the target; otherwise it goes around it and is given it first."""
    parameters: tuple[str, ...] | None = None
    """What the code relies on."""

    @property
    def code(self) -> Callable[..., Any]:
        found: Callable[..., Any] = pkgutil.resolve_name(f"{__package__}.{self.ours}")
        return found


def at(place: str, ours: str, *, replaces: bool = False) -> Hook:
    """Our code for one of `upstream.PLACES`, where this release has it."""
    targets, parameters = upstream.PLACES[place]
    return Hook(first_of(*targets), ours, replaces, parameters)


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
    from dsv32_plugin.sglang_adapter.upstream import HookRegistry, HookType

    for hook in wanted:
        check_hook(hook.target, hook.parameters)
    for hook in wanted:
        HookRegistry.register(hook.target, hook.code, HookType.REPLACE if hook.replaces else HookType.AROUND)


def missing(wanted: list[Hook]) -> list[str]:
    """Targets of those that SGLang has not applied; it only logs when it cannot."""
    from dsv32_plugin.sglang_adapter.upstream import HookRegistry

    return [hook.target for hook in wanted if hook.target not in HookRegistry._patched]


def of_process() -> list[Hook]:
    """Every hook that this process needs."""
    from dsv32_plugin.sglang_adapter.upstream import current_platform

    wanted = [
        at("DSATokenToKVPool", "caches.DsaTokenToKVPool", replaces=True),
        at("invoke_fused_moe_kernel", "float32.store_exactly"),
        at("TokenizerManager._validate_one_request", "requests.validate_around"),
        *_chat_hooks(),
    ]
    wanted.append(at("ServerArgs.check_server_args", "guard.check_start"))
    for step in ("update_weights_from_tensor", "update_weights_from_distributed", "update_weights_from_ipc"):
        wanted.append(at(f"SchedulerWeightUpdaterManager.{step}", f"updates.{step}_around"))
    wanted.append(at("SchedulerWeightUpdaterManager.update_weights_from_disk", "updates.disk_around"))
    wanted.append(at("Scheduler.flush_cache", "updates.flush_around"))
    wanted += [
        at("ModelRunner.init_indexer_capturer", "rollout.init_capturer_around"),
        at("SchedulerBatchResultProcessor._maybe_collect_indexer_topk", "rollout.collect_around"),
    ]
    step = "" if upstream.declares_options() else "ServerArgs._"
    wanted += [
        at(f"{step}handle_model_specific_adjustments", "engine_config.adjust_for_model"),
        at(f"{step}handle_deterministic_inference", "engine_config.adjust_for_determinism"),
    ]
    if not upstream.reckons_fp8_latents():
        wanted.append(at("DefaultPoolConfigurator._compute_cell_size", "caches.reckon_latents"))
    if current_platform.is_out_of_tree():
        wanted += [
            at("BaseHostCache.__init__", "cpu.platform.init_host_cache", replaces=True),
            at("dp_attention.memcpy", "cpu.platform.copy_share", replaces=True),
            at("ForwardBatch.prepare_mlp_sync_batch", "cpu.platform.pad_around"),
            at("GroupCoordinator.all_gather_into_tensor", "cpu.platform.gather_rows", replaces=True),
            at("GroupCoordinator.reduce_scatter_tensor", "cpu.platform.scatter_sum", replaces=True),
        ]
        if not upstream.asks_the_platform():
            wanted += _cpu_hooks()
    return wanted


def _chat_hooks() -> list[Hook]:
    """From a request to its prompt, and from the model's text to the answer, on every endpoint that chats."""
    wanted = [
        at("_setup_and_run_http_server", "gateway.run_server_around"),
        at("OpenAIServingChat._convert_to_internal_request", "gateway.convert_around"),
        at("OpenAIServingResponses._is_thinking_enabled_for_request", "gateway.thinking_around"),
        at("OpenAIServingChat._process_messages", "grammars.process_around"),
        at("OpenAIServingResponses.create_responses", "grammars.create_responses_around"),
        at("ResponsesRequest.to_sampling_params", "grammars.responses_parameters_around"),
        at("OpenAIServingChat._apply_jinja_template", "rendering.template_around"),
        at("OpenAIServingChat._get_reasoning_from_request", "rendering.reasoning_around"),
        at("OpenAIServingChat._patch_reasoning_skip_special_tokens", "answers.keep_special_tokens_around"),
        at("OpenAIServingChat._generate_stream_content", "answers.stream_around"),
        at("OpenAIServingChat._decode_response", "answers.decode_around"),
        at("OpenAIServingChat._process_tool_calls", "answers.process_tool_calls_around"),
        at("AnthropicServing._convert_response", "answers.convert_around"),
        at("FunctionCallParser.get_structure_constraint", "parsers.constraint_around"),
    ]
    if not upstream.gives_reasoning():
        wanted.append(at("AnthropicServing._convert_to_chat_completion_request", "rendering.history_around"))
    if not upstream.tells_detectors():
        wanted += [
            at("FunctionCallParser.parse_non_stream", "parsers.parse_around"),
            at("ReasoningParser.__init__", "parsers.reasoning_parser_around"),
        ]
    return [*wanted, *_responses_hooks()] if upstream.serves_responses() else wanted


def _responses_hooks() -> list[Hook]:
    wanted = [
        at("OpenAIServingResponses._construct_input_messages", "responses.history_around"),
        at("OpenAIServingResponses._generate_with_builtin_tools", "responses.outputs_around"),
    ]
    if upstream.knows_cut_answers():
        build = at("OpenAIServingResponses._build_response", "responses.build_around")
        return [*wanted, build]
    return [
        *wanted,
        at("OpenAIServingResponses.responses_full_generator", "responses.whole_around"),
        at("OpenAIServingResponses.responses_stream_generator_non_harmony", "responses.stream_around"),
    ]


def _cpu_hooks() -> list[Hook]:
    return [
        at("support_triton", "cpu.platform.support_triton_around"),
        _last_loc_hook(),
        at("XGrammarGrammar.apply_vocab_mask", "cpu.platform.apply_vocab_mask", replaces=True),
        at("NCCLLibrary.__init__", "cpu.platform.refuse_nccl", replaces=True),
    ]


def _last_loc_hook() -> Hook:
    return at("get_last_loc", "cpu.platform.get_last_loc", replaces=True)


def of_drafts() -> list[Hook]:
    """Every hook that speculative decoding needs in this process."""
    from dsv32_plugin.sglang_adapter.upstream import current_platform

    everywhere = [
        at("DraftBackendFactory.create_decode_backend", "speculation.create_decode_backend"),
        at("DraftBackendFactory.create_draft_extend_backend", "speculation.create_draft_extend_backend"),
        at("EagleDraftWorker._capture_cuda_graphs", "speculation.capture_graphs"),
    ]
    return [*everywhere, *_cpu_draft_hooks()] if current_platform.is_out_of_tree() else everywhere


def _cpu_draft_hooks() -> list[Hook]:
    wanted = [
        at("assign_draft_cache_locs_contiguous", "cpu.speculation.AssignDraftCacheLocs", replaces=True),
        at("EagleDraftWorker.draft", "cpu.speculation.draft_around"),
        at("fill_bonus_tokens", "cpu.speculation.FillBonusTokens", replaces=True),
        at("assign_req_to_token_pool_func", "cpu.speculation.assign_req_to_token_pool_func", replaces=True),
        at("build_tree_kernel_efficient", "cpu.speculation.build_tree_kernel_efficient", replaces=True),
        _verdict_hook(),
    ]
    if upstream.asks_the_platform():
        # All other batches go without; the platform has the rest.
        return [*wanted, _last_loc_hook()]
    return [
        *wanted,
        at("assign_extend_cache_locs_func", "cpu.speculation.assign_extend_cache_locs_func", replaces=True),
    ]


def _verdict_hook() -> Hook:
    """From 0.5.17 on a grammar's mask comes with what applies it."""
    if upstream.masks_itself():
        return at("eagle_sample_masked", "cpu.speculation.eagle_sample_masked", replaces=True)
    return at("eagle_sample", "cpu.speculation.eagle_sample", replaces=True)
