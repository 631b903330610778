"""Every option of vLLM's configuration that touches attention, caches, experts, drafts or graphs, judged.

A test reads the options of all releases that are served, and fails on one that is not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, NamedTuple


class Judged(NamedTuple):
    """The options of one class of vLLM's configuration, by what becomes of them; each is a list of names."""

    config: str
    """Where it is in a `VllmConfig`."""
    flag: str
    """The flag that takes all of them as JSON; empty where each has a flag of its own."""
    honoured: str = ""
    """Read by the plugin, or checked by `guard` in a way of its own."""
    passed: str = ""
    """Obeyed by vLLM around our model: sampling, scheduling, pages, loading, experts, linear layers, graphs."""
    refused: str = ""
    """Of vLLM's own attention or model, unsafe with ours, or not tried: only the default is taken."""
    uncompiled: str = ""
    """Of torch.compile, which is off for our models; the log says so."""
    elsewhere: str = ""
    """Of other models, methods or attention backends: without effect on vLLM's own code for our models, too."""
    derived: str = ""
    """No options: vLLM fills them in."""

    def names(self) -> set[str]:
        """All of them."""
        return {name for part in self[2:] for name in part.split()}


OPTIONS: dict[str, Judged] = {
    "AttentionConfig": Judged(
        "attention_config",
        "--attention-config",
        honoured="backend",
        refused="""
            backend_per_kind hisparse_config indexer_kv_dtype indexer_sparse_logits indexer_tp_shard_min_rows
            mla_prefill_backend sparse_mla_force_mqa sparse_mla_prefill_workspace_factor use_fp4_indexer_cache
            use_non_causal use_prefill_query_quantization
        """,
        elsewhere="""
            disable_flashinfer_q_quantization flash_attn_max_num_splits_for_cuda_graph flash_attn_version
            flex_attn_block_m flex_attn_block_n flex_attn_kv_block_size flex_attn_q_block_size minimax_m3_indexer_cp
            minimax_m3_msa_decode_backend tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph
            trtllm_ragged_backend use_prefill_decode_attention use_trtllm_attention
        """,
    ),
    "CacheConfig": Judged(
        "cache_config",
        "",
        honoured="block_size cache_dtype",
        passed="""
            enable_prefix_caching gpu_memory_utilization kv_cache_memory_bytes kv_offloading_backend
            kv_offloading_size num_gpu_blocks_override prefix_cache_retention_interval prefix_caching_hash_algo
            prefix_match_unit
        """,
        refused="calculate_kv_scales kv_cache_dtype_skip_layers kv_sharing_fast_prefill",
        elsewhere="""
            enable_mamba_fine_grained_prefix_cache enable_mamba_shared_prefix_checkpoint mamba_block_size
            mamba_cache_dtype mamba_cache_mode mamba_page_size_padded mamba_ssm_cache_dtype replayssm_buffer_len
            skip_page_size_padded sliding_window swa_bounded_replay use_kda_recoverssm use_replayssm
        """,
        derived="""
            _block_size_resolved cache_hit_alignment_tokens effective_attention_block_size hash_block_size
            is_attention_free kv_cache_layout kv_cache_max_concurrency kv_cache_size_tokens num_cpu_blocks
            num_gpu_blocks simple_cpu_offload_num_blocks user_specified_block_size user_specified_mamba_block_size
        """,
    ),
    "KernelConfig": Judged(
        "kernel_config",
        "--kernel-config",
        passed="""
            enable_bf16x3_router_gemm enable_cutedsl_warmup enable_flashinfer_autotune enable_jit_warmup ir_op_priority
            linear_backend linear_backend_per_quant moe_backend
        """,
        refused="monokernel sparse_indexer_topk_backend",
        elsewhere="enable_rocm_segmented_attn_autotune",
    ),
    "SpeculativeConfig": Judged(
        "speculative_config",
        "--speculative-config",
        honoured="attention_backend method num_speculative_tokens",
        passed="""
            code_revision disable_eagle_block_drop disable_lookahead_block_hashes disable_padded_drafter_batch
            draft_load_config draft_sample_method draft_tensor_parallel_size enforce_eager fly_entropy_threshold
            fly_entropy_top_k fly_window_size max_model_len model moe_backend num_speculative_tokens_per_batch_size
            prompt_lookup_max prompt_lookup_min quantization rejection_sample_method revision
            suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor suffix_decoding_max_tree_depth
            suffix_decoding_min_token_prob synthetic_acceptance_length synthetic_acceptance_rates tensor_parallel_size
            use_heterogeneous_vocab use_local_argmax_reduction
        """,
        refused="""
            draft_lm_head_quantization enable_adaptive_verification index_share_for_mtp_iteration kv_cache_dtype
            parallel_drafting
        """,
        elsewhere="dspark_draft_topk xpress_topc",
        derived="draft_model_config draft_parallel_config target_model_config target_parallel_config",
    ),
    "ParallelConfig": Judged(
        "parallel_config",
        "",
        honoured="pipeline_parallel_size tensor_parallel_size",
        passed="""
            all2all_backend assigned_physical_gpu_ids cpu_distributed_timeout_seconds data_parallel_backend
            data_parallel_external_lb data_parallel_hybrid_lb data_parallel_index data_parallel_master_ip
            data_parallel_master_port data_parallel_rank data_parallel_rank_local data_parallel_rpc_port
            data_parallel_size data_parallel_size_local disable_custom_all_reduce disable_nccl_for_dp_synchronization
            distributed_executor_backend distributed_timeout_seconds dp_sync_interval enable_batch_sharded_sampling
            enable_expert_parallel enable_fault_tolerance enable_shm_tensor_arena expert_placement_strategy
            fault_tolerance_config master_addr master_port max_parallel_loading_workers nnodes node_rank numa_bind
            numa_bind_cpus numa_bind_nodes placement_group rank ray_runtime_env ray_workers_use_nsight sd_worker_cls
            worker_cls worker_extension_cls
        """,
        refused="""
            decode_context_parallel_size enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
            prefill_context_parallel_size ubatch_size
        """,
        # Of what is refused.
        elsewhere="""
            cp_kv_cache_interleave_size dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend
            dcp_kv_cache_interleave_size dcp_q_replicate elastic_ep_max_dp_size enable_hc_sp eplb_config
        """,
        derived="""
            _allow_auto_resolve_cp_interleave_size _api_process_count _api_process_rank _coord_store_port
            _data_parallel_master_port_list is_moe_model world_size
        """,
    ),
    "CompilationConfig": Judged(
        "compilation_config",
        "--compilation-config",
        honoured="cudagraph_mode mode",
        passed="""
            cudagraph_capture_sizes cudagraph_copy_inputs cudagraph_num_of_warmups custom_ops ir_enable_torch_wrap
            max_cudagraph_capture_size
        """,
        uncompiled="""
            backend cache_dir compile_cache_save_format compile_ranges_endpoints compile_sizes debug_dump_path
            dynamic_shapes_config fast_moe_cold_start inductor_compile_config inductor_passes pass_config splitting_ops
            use_inductor_graph_partition
        """,
        elsewhere="""
            compile_mm_encoder cudagraph_decoder_replay cudagraph_mm_encoder cudagraph_specialize_lora
            decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold
            encoder_cudagraph_max_frames_per_batch encoder_cudagraph_max_vision_items_per_batch
            encoder_cudagraph_token_budgets
        """,
        derived="""
            compilation_time disabled_custom_ops enabled_custom_ops encoder_compilation_time local_cache_dir
            static_all_moe_layers static_forward_context traced_files
        """,
    ),
    "ModelConfig": Judged(
        "model_config",
        "",
        honoured="""
            disable_cascade_attn dtype enable_sleep_mode hf_config_path hf_overrides max_model_len model revision
            served_model_name tokenizer_mode
        """,
        passed="""
            allow_deprecated_quantization code_revision config_format enable_cumem_allocator enable_nccl_comm_suspend
            enable_prompt_embeds enable_return_routed_experts enable_trace_replay enforce_eager generation_config
            hf_token io_processor_plugin logits_processors logprobs_mode max_logprobs model_class_overrides model_impl
            model_weights override_generation_config quantization quantization_config renderer_num_workers
            return_sampling_mask runner seed skip_tokenizer_init sleep_mode_backend sleep_mode_offload_cudagraph
            sleep_preserve_parameter_names tokenizer tokenizer_revision trust_remote_code use_fp64_gumbel
        """,
        elsewhere="""
            allowed_local_media_path allowed_media_domains convert disable_sliding_window enable_mm_embeds
            interleave_mm_strings language_model_only limit_mm_per_prompt media_io_kwargs mm_device_do_normalize
            mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin
            mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb
            mm_processor_cache_gb mm_processor_cache_type mm_processor_device mm_processor_kwargs
            mm_shm_cache_max_object_size_mb mm_tensor_ipc multimodal_config override_attention_dtype pooler_config
            skip_mm_profiling video_pruning_method video_pruning_rate
        """,
        derived="""
            hf_config hf_text_config is_submodel_config spec_target_max_model_len word_embeddings_untied_by_checkpoint
        """,
    ),
}
"""Class of vLLM -> its options."""


def refused(vllm_config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(the beginning of a refusal, the default, the value) of each option that is refused and set."""
    for judged in OPTIONS.values():
        config = getattr(vllm_config, judged.config)
        fields = getattr(type(config), "__dataclass_fields__", {})
        for name in judged.refused.split():
            if name in fields and (value := getattr(config, name)) != (default := _default(fields[name])):
                flag = f"--{name.replace('_', '-')}: expected"
                yield f"{judged.flag}: expected {name}" if judged.flag else flag, default, value


def _default(field: Any) -> Any:
    if field.default is MISSING:
        return field.default_factory()
    # Of pydantic's `Field`, it is inside.
    return getattr(field.default, "default", field.default)
