"""All of vLLM that this adapter uses: no other file of it imports vLLM or names its modules.

A name is imported when it is asked for (`from ...upstream import RMSNorm`). `python -m` this module with `--check` says
what a release, installed or unpacked, has otherwise than those that the adapter is written for.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

from dsv32_plugin.surface import Place, Release, installed, lookup, main, names_in, targets_of
from dsv32_plugin.vllm_adapter.options import OPTIONS as JUDGED

NAMES = names_in(
    {
        "vllm": "ENGINE_VERSION=__version__ PoolingParams",
        "vllm._custom_ops": "weight_packed_linear_cpu",
        "vllm.config": ("CUDAGraphMode CacheConfig CompilationMode ModelConfig VllmConfig get_current_vllm_config"),
        "vllm.distributed": "get_pp_group get_tensor_model_parallel_world_size get_tp_group get_world_group",
        "vllm.distributed.kv_transfer": "get_kv_transfer_group has_kv_transfer_group",
        "vllm.engine.protocol": "EngineClient",
        "vllm.entrypoints.anthropic.protocol": "AnthropicMessagesResponse",
        "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest ChatCompletionResponse",
        "vllm.entrypoints.generate.base.protocol vllm.entrypoints.openai.engine.protocol": (
            "DeltaFunctionCall DeltaMessage DeltaToolCall ExtractedToolCallInformation FunctionCall ToolCall"
        ),
        "vllm.entrypoints.openai.responses.protocol": "ResponseCompletedEvent ResponsesRequest ResponsesResponse",
        "vllm.envs": "VLLM_BATCH_INVARIANT VLLM_ENABLE_RESPONSES_API_STORE",
        "vllm.exceptions": "ClientError=VLLMClientError ClientError=VLLMValidationError",
        "vllm.forward_context": "get_forward_context",
        "vllm.inputs": "EngineInput",
        "vllm.logger": "init_logger",
        "vllm.model_executor.layers.activation": "SiluAndMul",
        "vllm.model_executor.layers.attention_layer_base": "AttentionLayerBase",
        "vllm.model_executor.layers.fused_moe": (
            "FusedMoE=FusedMoEFactory FusedMoE GateLinear MoERunner RoutedExperts UnquantizedFusedMoEMethod"
        ),
        "vllm.model_executor.layers.fused_moe.cpu_fused_moe": "CPUFusedMOE",
        "vllm.model_executor.layers.layernorm": "RMSNorm",
        "vllm.model_executor.layers.linear": (
            "ColumnParallelLinear LinearBase MergedColumnParallelLinear ReplicatedLinear RowParallelLinear "
            "UnquantizedLinearMethod"
        ),
        "vllm.model_executor.layers.logits_processor": "LogitsProcessor",
        "vllm.model_executor.layers.quantization": "register_quantization_config",
        "vllm.model_executor.layers.quantization.base_config": "QuantizationConfig QuantizeMethodBase",
        "vllm.model_executor.layers.vocab_parallel_embedding": "ParallelLMHead VocabParallelEmbedding",
        "vllm.model_executor.model_loader.reload.layerwise": "finalize_layerwise_reload get_layerwise_info",
        "vllm.model_executor.model_loader.weight_utils": "default_weight_loader",
        "vllm.model_executor.models": "ModelRegistry",
        "vllm.model_executor.models.config": "MODELS_CONFIG_MAP VerifyAndUpdateConfig",
        "vllm.model_executor.models.interfaces": "SupportsPP",
        "vllm.model_executor.models.utils": (
            "PPMissingLayer extract_layer_index make_empty_intermediate_tensors_factory make_layers maybe_prefix"
        ),
        "vllm.outputs": "CompletionOutput",
        "vllm.parser.abstract_parser": "DelegatingParser",
        "vllm.platforms": "builtin_platform_plugins current_platform vllm_version_matches_substr",
        "vllm.platforms.cpu": "CpuPlatform",
        "vllm.plugins": "load_general_plugins",
        "vllm.reasoning": "ReasoningParser ReasoningParserManager",
        "vllm.renderers.chat_utils vllm.entrypoints.chat_utils": (
            "ChatCompletionMessageParam ConversationMessage make_tool_call_id"
        ),
        "vllm.renderers.hf": "HfRenderer",
        "vllm.renderers.inputs": "DictPrompt",
        "vllm.renderers.inputs.preprocess": "parse_dec_only_prompt",
        "vllm.renderers.params": "ChatParams",
        "vllm.renderers.registry": "RENDERER_REGISTRY",
        "vllm.sampling_params": "SamplingParams StructuredOutputsParams",
        "vllm.sequence": "IntermediateTensors",
        "vllm.tokenizers": "TokenizerLike",
        "vllm.tokenizers.hf": "HfTokenizer get_cached_tokenizer",
        "vllm.tokenizers.registry": "TokenizerRegistry",
        "vllm.tool_parsers": "ToolParserManager",
        "vllm.tool_parsers.abstract_tool_parser": "Tool ToolParser",
        "vllm.utils.async_utils": "make_async",
        "vllm.utils.torch_utils": "set_default_torch_dtype",
        "vllm.v1.attention.backend": (
            "AttentionBackend AttentionCGSupport AttentionImpl AttentionMetadataBuilder CommonAttentionMetadata "
            "MultipleOf"
        ),
        "vllm.v1.attention.backends.registry": "AttentionBackendEnum register_backend",
        "vllm.v1.attention.backends.utils": "split_decodes_and_prefills",
        "vllm.v1.attention.selector": "AttentionSelectorConfig",
        "vllm.v1.kv_cache_interface": "AttentionSpec MLAAttentionSpec",
        "vllm.v1.kv_cache_layout": "KVCacheLayout",
        "vllm.v1.structured_output.backend_xgrammar": "has_xgrammar_unsupported_json_features",
    }
)
"""What we call it -> where it is; `ours=theirs` where these differ."""

PLACES: dict[str, Place] = {
    "RequestState._new_completion_output": Place(
        ("vllm.v1.engine.output_processor.RequestState._new_completion_output",), ("self", "token_ids")
    ),
    "maybe_filter_parallel_tool_calls": Place(
        ("vllm.entrypoints.openai.chat_completion.serving.maybe_filter_parallel_tool_calls",),
        ("choice|item", "request"),
    ),
    "OpenAIServingChat.chat_completion_full_generator": Place(
        ("vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat.chat_completion_full_generator",),
        ("self", "request"),
    ),
    "ChatStreamProcessor.step": Place(
        ("vllm.entrypoints.openai.chat_completion.stream_processor.ChatStreamProcessor.step",), ("self", "delta_text")
    ),
    "OpenAIServingResponses.responses_full_generator": Place(
        ("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.responses_full_generator",),
        ("self", "request"),
    ),
    "OpenAIServingResponses.responses_stream_generator": Place(
        ("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.responses_stream_generator",),
        ("self", "request"),
    ),
    "OpenAIServingResponses.responses_background_stream_generator": Place(
        ("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.responses_background_stream_generator",),
        ("self", "response_id"),
    ),
    "AnthropicServingMessages.messages_full_converter": Place(
        ("vllm.entrypoints.anthropic.serving.AnthropicServingMessages.messages_full_converter",), ("self", "generator")
    ),
    "AnthropicServingMessages.message_stream_converter": Place(
        ("vllm.entrypoints.anthropic.serving.AnthropicServingMessages.message_stream_converter",), ("self", "generator")
    ),
    "AnthropicServingMessages.create_messages": Place(
        ("vllm.entrypoints.anthropic.serving.AnthropicServingMessages.create_messages",),
        ("self", "request", "raw_request"),
    ),
    "AnthropicServingMessages.count_tokens": Place(
        ("vllm.entrypoints.anthropic.serving.AnthropicServingMessages.count_tokens",),
        ("self", "request", "raw_request"),
    ),
    "load_endpoint_plugins": Place(("vllm.plugins.load_endpoint_plugins",), ("supported_tasks",)),
    "SamplingParams._validate_structured_outputs": Place(
        ("vllm.sampling_params.SamplingParams._validate_structured_outputs",),
        ("self", "model_config", "structured_outputs_config"),
    ),
    "ParserManager.get_parser": Place(
        ("vllm.parser.ParserManager.get_parser",), ("tool_parser_name", "reasoning_parser_name")
    ),
    "GPUModelRunner._bookkeeping_sync": Place(
        ("vllm.v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync",),
        ("self", "scheduler_output", "sampler_output"),
    ),
    "Worker.reload_weights": Place(("vllm.v1.worker.gpu_worker.Worker.reload_weights",), ("self",)),
}
"""Where our code is called, by the end of the path (see `hooks` and docs/patches.md)."""

WATCHED = (
    *("vllm.config:ParallelConfig", "vllm.config:SchedulerConfig", "vllm.config:CompilationConfig"),
    *("vllm.config:SpeculativeConfig", "vllm.distributed.parallel_state:GroupCoordinator"),
)
"""Classes of objects that it is handed: what it reads of them is looked at, too."""

OPTIONS = tuple(f"vllm.config:{name}.*" for name in JUDGED)
"""Classes of options: all that they have is looked at."""


# What one release has and another has not is asked of vLLM itself, here. Who needs the answer says what follows.


def says_who_routes() -> bool:
    """Whether experts say if they have a router of their own. Up to 0.27; later those that are given a gate have."""
    return hasattr(lookup(NAMES, "MoERunner"), "is_internal_router")


def packs_experts() -> bool:
    """Whether the experts of a CPU need the operators of a CPU build. Up to 0.27 they go without where these lack."""
    return not _in_files("CPUFusedMOE")


def writes_packed_products() -> bool:
    """Whether the operator for packed weights is given the tensor to write to. From 0.29 on."""
    return _in_files("weight_packed_linear_cpu")


def assembles_chats() -> bool:
    """Whether one object makes the pieces of a streamed chat, finish reason included. From 0.33 on."""
    target = PLACES["ChatStreamProcessor.step"].targets[0].rpartition(".")[0]
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def _in_files(name: str) -> bool:
    """Whether this release has one of `NAMES`, by its files: vLLM asks for operators in the middle of its imports."""
    found = Release(installed("vllm")).surface(NAMES[name], set())
    return any(described is not None for described in found.values())


def __getattr__(name: str) -> Any:
    return lookup(NAMES, name)


def surface_names() -> list[str]:
    """All of it, for a comparison with a release."""
    return [*targets_of(NAMES, PLACES), *WATCHED, *OPTIONS]


if __name__ == "__main__":
    raise SystemExit(main("vllm", Path(__file__).parent, surface_names()))
