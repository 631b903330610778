"""All of SGLang that this adapter uses: no other file of it imports SGLang or names its modules.

A name is imported when it is asked for (`from ...upstream import RMSNorm`). `python -m` this module with `--check` says
what a release, installed or unpacked, has otherwise than those that the adapter is written for.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from dsv32_plugin.surface import Place, has, lookup, main, names_in, targets_of

NAMES = names_in(
    {
        "sglang": "ENGINE_VERSION=__version__",
        "sglang.srt.arg_groups.overrides": "attention_backends_of declare_resolution model_config_of resolving_view",
        "sglang.srt.constants": "GPU_MEMORY_TYPE_KV_CACHE",
        "sglang.srt.constrained.base_grammar_backend": "GrammarMask",
        "sglang.srt.distributed.utils": "get_pp_indices",
        "sglang.srt.entrypoints.anthropic.protocol": (
            "AnthropicMessage AnthropicMessagesRequest AnthropicMessagesResponse"
        ),
        "sglang.srt.entrypoints.anthropic.serving": "AnthropicServing",
        "sglang.srt.entrypoints.http_server": "app",
        "sglang.srt.entrypoints.openai.protocol": (
            "ChatCompletionRequest ChatCompletionResponse FunctionResponse MessageProcessingResult "
            "ResponsesRequest ResponsesResponse ToolCall ToolCallProcessingResult"
        ),
        "sglang.srt.entrypoints.openai.serving_chat": "OpenAIServingChat get_serving",
        "sglang.srt.entrypoints.openai.serving_responses": "OpenAIServingResponses",
        "sglang.srt.environ": "envs",
        "sglang.srt.function_call.base_format_detector": "BaseFormatDetector",
        "sglang.srt.function_call.core_types": "ToolCallItem ToolResult=StreamingParseResult",
        "sglang.srt.function_call.function_call_parser": "FunctionCallParser",
        "sglang.srt.layers.activation": "SiluAndMul",
        "sglang.srt.layers.attention.attention_registry": "ATTENTION_BACKENDS register_attention_backend",
        "sglang.srt.layers.attention.base_attn_backend": "AttentionBackend",
        "sglang.srt.layers.dp_attention": (
            "dp_gather_replicate dp_reduce_scatter_tensor dp_scatter get_global_dp_buffer get_local_dp_buffer "
            "is_dp_attention_enabled"
        ),
        "sglang.srt.layers.layernorm": "RMSNorm",
        "sglang.srt.layers.linear": (
            "ColumnParallelLinear LinearBase LinearParallelGroup MergedColumnParallelLinear ReplicatedLinear "
            "RowParallelLinear"
        ),
        "sglang.srt.layers.logits_processor": "LogitsProcessor LogitsProcessorOutput",
        "sglang.srt.layers.moe": "get_moe_a2a_backend",
        "sglang.srt.layers.moe.ep_moe.layer": "get_moe_impl_class",
        "sglang.srt.layers.moe.fused_moe_triton.layer": "FusedMoE",
        "sglang.srt.layers.moe.token_dispatcher": "StandardCombineInput",
        "sglang.srt.layers.moe.topk": "TopK",
        "sglang.srt.layers.quantization.base_config": "QuantizationConfig QuantizeMethodBase",
        "sglang.srt.layers.quantization.unquant": "UnquantizedFusedMoEMethod UnquantizedLinearMethod",
        "sglang.srt.layers.sampler": "top_k_top_p_min_p_sampling_from_probs_torch",
        "sglang.srt.layers.vocab_parallel_embedding": "ParallelLMHead VocabParallelEmbedding get_embedding_tp_kwargs",
        "sglang.srt.managers.io_struct": (
            "GenerateReqInput UpdateWeightFromDiskReqOutput UpdateWeightsFromDistributedReqOutput "
            "UpdateWeightsFromIPCReqOutput UpdateWeightsFromTensorReqOutput"
        ),
        "sglang.srt.managers.schedule_batch": "ScheduleBatch",
        "sglang.srt.managers.tokenizer_manager": "TokenizerManager",
        "sglang.srt.mem_cache.allocator.paged": "PagedTokenToKVPoolAllocator",
        "sglang.srt.mem_cache.index_key_cache": "IndexKeyCache",
        "sglang.srt.mem_cache.memory_pool": "DSATokenToKVPool MLATokenToKVPool",
        "sglang.srt.model_executor.cuda_graph_config": "Backend Phase check_cuda_graph_backend",
        "sglang.srt.model_executor.forward_batch_info": "ForwardBatch PPProxyTensors",
        "sglang.srt.model_executor.forward_context": "get_attn_backend",
        "sglang.srt.model_executor.model_runner": "ModelRunner",
        "sglang.srt.model_loader.weight_utils": "default_weight_loader",
        "sglang.srt.models.registry": "ModelRegistry",
        "sglang.srt.parser.reasoning_parser": (
            "BaseReasoningFormatDetector ReasoningParser ReasoningResult=StreamingParseResult"
        ),
        "sglang.srt.platforms": "current_platform",
        "sglang.srt.platforms.device_mixin": "PlatformEnum",
        "sglang.srt.platforms.interface": "SRTPlatform",
        "sglang.srt.plugins": "load_plugins",
        "sglang.srt.plugins.hook_registry": "HookRegistry HookType",
        "sglang.srt.runtime_context": "get_parallel get_server_args",
        "sglang.srt.sampling.penaltylib.repetition_penalty": "apply_scaling_penalties",
        "sglang.srt.server_args": "ServerArgs add_attention_backend_choices",
        "sglang.srt.speculative.draft_utils": "DraftBackendFactory",
        "sglang.srt.speculative.eagle_draft_cuda_graph_runner": "EAGLEDraftCudaGraphRunner",
        "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner": "EAGLEDraftExtendCudaGraphRunner",
        "sglang.srt.speculative.eagle_info": "EagleVerifyInput",
        "sglang.srt.speculative.eagle_worker_v2": "EagleDraftWorker",
        "sglang.srt.state_capturer.indexer_topk": "set_global_indexer_capturer",
        "sglang.srt.utils": "is_host_cpu_arm64",
        "sglang.srt.utils.numa_utils": "init_threads_binding",
    }
)
"""What we call it -> where it is; `ours=theirs` where these differ."""

PLACES: dict[str, Place] = {
    "DSATokenToKVPool": Place(("sglang.srt.mem_cache.memory_pool.DSATokenToKVPool",), None),
    "invoke_fused_moe_kernel": Place(
        (
            "sglang.kernels.ops.moe.fused_moe_triton_kernels.invoke_fused_moe_kernel",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_kernels.invoke_fused_moe_kernel",
        ),
        (
            "A",
            "B",
            "bias",
            "C",
            "A_scale",
            "B_scale",
            "B_zp",
            "topk_weights",
            "topk_ids",
            "sorted_token_ids",
            "expert_ids",
            "num_tokens_post_padded",
            "mul_routed_weight",
            "top_k",
            "config",
            "compute_type",
        ),
    ),
    "TokenizerManager._validate_one_request": Place(
        ("sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",), ("self", "obj", "input_ids")
    ),
    "ServerArgs.check_server_args": Place(("sglang.srt.server_args.ServerArgs.check_server_args",), ("self",)),
    "Scheduler.flush_cache": Place(("sglang.srt.managers.scheduler.Scheduler.flush_cache",), ("self",)),
    "SchedulerWeightUpdaterManager.update_weights_from_tensor": Place(
        (
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_tensor",
        ),
        ("self", "recv_req"),
    ),
    "SchedulerWeightUpdaterManager.update_weights_from_distributed": Place(
        (
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_distributed",
        ),
        ("self", "recv_req"),
    ),
    "SchedulerWeightUpdaterManager.update_weights_from_ipc": Place(
        (
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_ipc",
        ),
        ("self", "recv_req"),
    ),
    "SchedulerWeightUpdaterManager.update_weights_from_disk": Place(
        (
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_disk",
        ),
        ("self", "recv_req"),
    ),
    "handle_model_specific_adjustments": Place(
        ("sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments",), ("server_args",)
    ),
    "handle_deterministic_inference": Place(
        ("sglang.srt.arg_groups.attention_hook.handle_deterministic_inference",), ("server_args",)
    ),
    "ServerArgs._handle_model_specific_adjustments": Place(
        ("sglang.srt.server_args.ServerArgs._handle_model_specific_adjustments",), ("self",)
    ),
    "ServerArgs._handle_deterministic_inference": Place(
        ("sglang.srt.server_args.ServerArgs._handle_deterministic_inference",), ("self",)
    ),
    "DefaultPoolConfigurator._compute_cell_size": Place(
        ("sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",),
        ("self",),
    ),
    "_setup_and_run_http_server": Place(
        ("sglang.srt.entrypoints.http_server._setup_and_run_http_server",), ("server_args", "tokenizer_manager")
    ),
    "OpenAIServingChat._convert_to_internal_request": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",),
        ("self", "request"),
    ),
    "OpenAIServingResponses._is_thinking_enabled_for_request": Place(
        ("sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._is_thinking_enabled_for_request",),
        ("self", "request"),
    ),
    "OpenAIServingChat._process_messages": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",),
        ("self", "request", "is_multimodal"),
    ),
    "OpenAIServingResponses.create_responses": Place(
        ("sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",),
        ("self", "request", "raw_request"),
    ),
    "ResponsesRequest.to_sampling_params": Place(
        ("sglang.srt.entrypoints.openai.protocol.ResponsesRequest.to_sampling_params",), ("self", "default_max_tokens")
    ),
    "OpenAIServingChat._apply_jinja_template": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._apply_jinja_template",),
        ("self", "request", "tools", "is_multimodal"),
    ),
    "OpenAIServingChat._get_reasoning_from_request": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._get_reasoning_from_request",),
        ("self", "request"),
    ),
    "OpenAIServingChat._patch_reasoning_skip_special_tokens": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._patch_reasoning_skip_special_tokens",),
        ("self", "request"),
    ),
    "OpenAIServingChat._generate_stream_content": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_stream_content",),
        ("self", "content", "index"),
    ),
    "OpenAIServingChat._decode_response": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._decode_response",), ("self", "ret_item")
    ),
    "OpenAIServingChat._process_tool_calls": Place(
        ("sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_tool_calls",),
        ("self", "text", "tools", "finish_reason", "tool_choice", "history_tool_calls_cnt"),
    ),
    "AnthropicServing._convert_response": Place(
        ("sglang.srt.entrypoints.anthropic.serving.AnthropicServing._convert_response",), ("self", "response")
    ),
    "FunctionCallParser.get_structure_constraint": Place(
        ("sglang.srt.function_call.function_call_parser.FunctionCallParser.get_structure_constraint",),
        ("self", "tool_choice", "parallel_tool_calls", "thinking_mode"),
    ),
    "AnthropicServing._convert_to_chat_completion_request": Place(
        ("sglang.srt.entrypoints.anthropic.serving.AnthropicServing._convert_to_chat_completion_request",),
        ("self", "anthropic_request"),
    ),
    "FunctionCallParser.parse_non_stream": Place(
        ("sglang.srt.function_call.function_call_parser.FunctionCallParser.parse_non_stream",), ("self", "full_text")
    ),
    "ReasoningParser.__init__": Place(
        ("sglang.srt.parser.reasoning_parser.ReasoningParser.__init__",),
        ("self", "model_type", "stream_reasoning", "force_reasoning", "request"),
    ),
    "OpenAIServingResponses._construct_input_messages": Place(
        ("sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._construct_input_messages",),
        ("self", "request"),
    ),
    "OpenAIServingResponses._generate_with_builtin_tools": Place(
        ("sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._generate_with_builtin_tools",),
        ("self", "request_id", "request_prompt", "adapted_request"),
    ),
    "OpenAIServingResponses._build_response": Place(
        ("sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._build_response",),
        ("request", "sampling_params"),
    ),
    "OpenAIServingResponses.responses_full_generator": Place(
        ("sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.responses_full_generator",),
        ("self", "request", "sampling_params", "result_generator", "context"),
    ),
    "OpenAIServingResponses.responses_stream_generator_non_harmony": Place(
        (
            "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.responses_stream_generator_non_harmony",
        ),
        ("self", "request", "sampling_params", "result_generator"),
    ),
    "support_triton": Place(("sglang.srt.utils.common.support_triton",), ("backend",)),
    "dp_attention.memcpy": Place(
        ("sglang.srt.layers.dp_attention.memcpy", "sglang.srt.layers.dp_attention.memcpy_triton"),
        ("dst", "src", "dim", "offset", "sz", "offset_src"),
    ),
    "ForwardBatch.prepare_mlp_sync_batch": Place(
        ("sglang.srt.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch",), ("self", "model_runner")
    ),
    "XGrammarGrammar.apply_vocab_mask": Place(
        ("sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",), ("self", "logits", "vocab_mask")
    ),
    "NCCLLibrary.__init__": Place(
        ("sglang.srt.distributed.device_communicators.pynccl_wrapper.NCCLLibrary.__init__",), ("self",)
    ),
    "GroupCoordinator.all_gather_into_tensor": Place(
        ("sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather_into_tensor",), ("self", "output", "input")
    ),
    "GroupCoordinator.reduce_scatter_tensor": Place(
        ("sglang.srt.distributed.parallel_state.GroupCoordinator.reduce_scatter_tensor",), ("self", "output", "input")
    ),
    "get_last_loc": Place(
        ("sglang.srt.mem_cache.allocation.get_last_loc", "sglang.srt.mem_cache.common.get_last_loc"),
        ("req_to_token", "req_pool_indices_tensor", "prefix_lens_tensor"),
    ),
    "DraftBackendFactory.create_decode_backend": Place(
        ("sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend",), ("self",)
    ),
    "DraftBackendFactory.create_draft_extend_backend": Place(
        ("sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend",), ("self",)
    ),
    "EagleDraftWorker._capture_cuda_graphs": Place(
        ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._capture_cuda_graphs",), ("self",)
    ),
    "EagleDraftWorker.draft": Place(
        ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.draft",), ("self", "batch")
    ),
    "assign_draft_cache_locs_contiguous": Place(
        (
            "sglang.kernels.ops.speculative.cache_locs.assign_draft_cache_locs_contiguous",
            "sglang.srt.speculative.triton_ops.cache_locs.assign_draft_cache_locs_contiguous",
        ),
        None,
    ),
    "fill_bonus_tokens": Place(
        (
            "sglang.kernels.ops.speculative.eagle.fill_bonus_tokens",
            "sglang.srt.speculative.triton_ops.eagle.fill_bonus_tokens",
        ),
        None,
    ),
    "assign_req_to_token_pool_func": Place(
        (
            "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
            "sglang.srt.speculative.triton_ops.cache_locs.assign_req_to_token_pool_func",
        ),
        ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size"),
    ),
    "build_tree_kernel_efficient": Place(
        ("sglang.srt.speculative.eagle_utils.build_tree_kernel_efficient",),
        (
            "bonus_tokens",
            "parent_list",
            "top_scores_index",
            "draft_tokens",
            "seq_lens",
            "seq_lens_sum",
            "topk",
            "spec_steps",
            "num_verify_tokens",
        ),
    ),
    "assign_extend_cache_locs_func": Place(
        (
            "sglang.kernels.ops.speculative.cache_locs.assign_extend_cache_locs_func",
            "sglang.srt.speculative.triton_ops.cache_locs.assign_extend_cache_locs_func",
        ),
        ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "batch_size", "draft_token_num", "device"),
    ),
    "eagle_sample": Place(
        ("sglang.srt.speculative.eagle_utils.eagle_sample",), ("verify_input", "batch", "logits_output", "vocab_mask")
    ),
    "eagle_sample_masked": Place(
        ("sglang.srt.speculative.eagle_utils.eagle_sample",), ("verify_input", "batch", "logits_output", "grammar_mask")
    ),
    "BaseHostCache.__init__": Place(
        ("sglang.srt.state_capturer.base.BaseHostCache.__init__",),
        ("self", "num_tokens", "num_layers", "topk_size", "name"),
    ),
    "ModelRunner.init_indexer_capturer": Place(
        ("sglang.srt.model_executor.model_runner.ModelRunner.init_indexer_capturer",), ("self",)
    ),
    "SchedulerBatchResultProcessor._maybe_collect_indexer_topk": Place(
        (
            "sglang.srt.managers.scheduler_components.batch_result_processor"
            ".SchedulerBatchResultProcessor._maybe_collect_indexer_topk",
        ),
        ("self", "req"),
    ),
    "is_deepseek_dsa": Place(("sglang.srt.configs.model_config.is_deepseek_dsa",), ("config",)),
}
"""Where our code is called, by the end of the path (see `hooks` and docs/patches.md)."""

WATCHED = ("sglang.srt.environ:Envs", "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator")
"""Classes of objects that it is handed: what it reads of them is looked at, too."""


# What one release has and another has not is asked of SGLang itself, here. Who needs the answer says what follows.


def installed_version() -> str:
    return str(lookup(NAMES, "ENGINE_VERSION"))


def declares_options() -> bool:
    """Whether options are sealed once given, and decided upon beside them, in functions of their own.

    From 0.5.19 on. Before, they are fields of one object, which its methods write to.
    """
    return has(NAMES, "declare_resolution")


def knows_cut_answers() -> bool:
    """Whether an item of Responses can say that it is cut. 0.5.23: yes; from 0.5.18 on an answer alone can."""
    return hasattr(lookup(NAMES, "OpenAIServingResponses"), "_build_response")


def tells_detectors() -> bool:
    """Whether a detector is told what follows it and that a stream is over, and its reading is kept. From 0.5.18 on."""
    return hasattr(lookup(NAMES, "BaseFormatDetector"), "finish")


def keeps_special_tokens() -> bool:
    """Whether the Responses API asks for the special tokens that its parsers need, as Chat does. From 0.5.18 on."""
    return "skip_special_tokens" in lookup(NAMES, "MessageProcessingResult").__dataclass_fields__


def defers_grammars_of_responses() -> bool:
    """Whether the Responses API tells a grammar that thoughts come first, as Chat does. From 0.5.17 on."""
    return "require_reasoning" in lookup(NAMES, "MessageProcessingResult").__dataclass_fields__


def serves_responses() -> bool:
    """Whether the Responses API can be served here. SGLang goes on without it where a package of its is missing."""
    return has(NAMES, "OpenAIServingResponses")


def gives_reasoning() -> bool:
    """Whether past thoughts of an Anthropic conversation stay reasoning. From 0.5.19 on."""
    return hasattr(lookup(NAMES, "OpenAIServingChat"), "supports_native_reasoning_history")


def asks_the_platform() -> bool:
    """Whether a platform says what its device can do, and SGLang leaves out what it cannot. From 0.5.22 on.

    Before, Triton and NCCL run wherever they are installed.
    """
    return hasattr(lookup(NAMES, "SRTPlatform"), "capabilities")


def reckons_fp8_latents() -> bool:
    """Whether SGLang knows how many bytes latents in fp8 take, when it sizes the pool. From 0.5.17 on.

    0.5.16 has a function that knows it, and does not ask it here.
    """
    size = inspect.unwrap(pkgutil.resolve_name(PLACES["DefaultPoolConfigurator._compute_cell_size"].targets[0]))
    return "calculate_mla_kv_cache_dim" in size.__code__.co_names


def binds_every_rank() -> bool:
    """Whether cores are given out to all ranks. From 0.5.19 on. Before, to those of tensor parallelism."""
    return (
        has(NAMES, "init_threads_binding")
        and "numa_index" in inspect.signature(lookup(NAMES, "init_threads_binding")).parameters
    )


def names_groups() -> bool:
    """Whether a linear layer is cut over a group that has a name. From 0.5.22 on. Before, it is told rank and size."""
    return has(NAMES, "LinearParallelGroup")


def wraps_index_keys() -> bool:
    """Whether a pool holds its index keys in an object of their own. From 0.5.18 on. Before, they are a list."""
    return has(NAMES, "IndexKeyCache")


def binds_experts() -> bool:
    """Whether the router must be told what its experts run on, or ends the first step on a GPU. From 0.5.23 on."""
    return hasattr(lookup(NAMES, "TopK"), "bind_runner_backend")


def masks_itself() -> bool:
    """Whether a batch's grammar mask knows how it is applied. From 0.5.17 on. Before, it is a tensor."""
    return has(NAMES, "GrammarMask")


@contextmanager
def without_dsa() -> Iterator[None]:
    """Inside the block SGLang takes every DeepSeek for one with MLA and no sparse attention."""
    configs: Any = import_module("sglang.srt.configs.model_config")
    original = configs.is_deepseek_dsa
    configs.is_deepseek_dsa = lambda config: False
    try:
        yield
    finally:
        configs.is_deepseek_dsa = original


def __getattr__(name: str) -> Any:
    return lookup(NAMES, name)


def surface_names() -> list[str]:
    """All of it, for a comparison with a release."""
    return [*targets_of(NAMES, PLACES), *WATCHED]


if __name__ == "__main__":
    raise SystemExit(main("sglang", Path(__file__).parent, surface_names()))
