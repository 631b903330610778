"""Every start-up option of the SGLang releases that are served, and what becomes of it here.

An option that no list has is one that nobody has judged: `python -m` this module names those of a release.
"""

from __future__ import annotations

import argparse
import ast
from importlib.util import find_spec
from pathlib import Path

JUDGED: dict[str, str] = {
    # They change how attention, caches, experts or drafts are laid out or computed: the plugin has SGLang's defaults.
    "refused": """
    attn_cp_size cpu_offload_gb cuda_graph_bs_prefill cuda_graph_max_bs_prefill cuda_graph_max_seq_len_prefill
    cuda_graph_prefill_max_context dcp_replicate_q_proj dcp_size decoupled_spec_role
    disaggregation_decode_enable_offload_kvcache disaggregation_mode dllm_algorithm dsa_decode_backend
    dsa_paged_mqa_logits_backend dsa_prefill_backend dsa_topk_backend dsa_triton_union dwdp_size elastic_ep_backend
    enable_amd_monokernel enable_attn_tp_input_scattered enable_cp_decode_attn_tp enable_cp_tp_group_sharing
    enable_deepep_waterfill enable_dense_mlp_attn_tp enable_dsa_cache_layer_split enable_dsa_fused_indexer
    enable_dsa_prefill_context_parallel enable_eplb enable_expert_distribution_metrics
    enable_flashinfer_allreduce_fusion enable_flexkv enable_fused_moe_sum_all_reduce enable_hierarchical_cache
    enable_hisparse enable_kv_cache_sharding enable_layernorm_sp enable_lean_attention enable_linker_mla_dedup
    enable_lmcache enable_lora enable_mis enable_multi_layer_eagle enable_nvidia_megakernel
    enable_page_major_kv_layout enable_paged_experts enable_pd_role_switch enable_pdmux
    enable_prefill_context_parallel enable_prefill_cp enable_return_aux_hidden_states
    enable_shared_experts_attn_tp enable_single_batch_overlap enable_torch_compile enable_two_batch_overlap
    enable_unified_cache_external_linker enable_unified_memory enable_w4a4_mxfp4_megamoe enable_waterfill
    enforce_shared_experts_fusion ep_num_redundant_experts expert_balancedness_report_mode
    expert_distribution_recorder_mode flashinfer_mla_disable_ragged init_expert_location is_embedding kt_weight_path
    kv_canary lora_paths modelopt_quant moe_dp_size offload_group_size prefill_kv_cache_dequant_dtype
    prefill_only_disable_kv_cache quantization_param_path quantize_and_serve radix_cache_backend
    return_aux_hidden_state_layer_ids rl_on_policy_target rl_quant_profile shared_experts_tp_size
    speculative_adaptive speculative_attention_mode speculative_draft_attention_backend
    speculative_draft_kv_cache_dtype speculative_draft_sink_size speculative_draft_window_size
    speculative_dsa_topk_backend speculative_enable_w4a4_mxfp4_megamoe speculative_token_map
    speculative_use_block_verification speculative_use_rejection_sampling startup_weight_load_mode torchao_config
    triton_attention_reduce_in_fp32 triton_attention_split_tile_size weight_cache_mode
    """,
    # `guard` refuses the other values, or this adapter does what they ask for.
    "supported with some values": """
    attention_backend chat_template chunked_prefill_size cuda_graph_backend_prefill cuda_graph_config
    decode_attention_backend default_chat_template_kwargs device disable_overlap_schedule dtype
    enable_deterministic_inference enable_memory_saver enable_mixed_chunk enable_return_indexer_topk enable_watermark
    enforce_disable_flashinfer_allreduce_fusion grammar_backend incremental_streaming_output
    json_model_override_args kv_cache_dtype load_format max_prefill_tokens max_running_requests max_total_tokens
    model_impl model_path page_size preferred_sampling_params prefill_attention_backend quantization reasoning_parser
    revision sampling_backend served_model_name speculative_accept_threshold_acc speculative_accept_threshold_single
    speculative_algorithm speculative_draft_model_path speculative_eagle_topk speculative_num_draft_tokens
    speculative_num_steps tool_call_parser tp_size
    """,
    # What is refused is adjusted by them, and SGLang reads none without it.
    "of refused ones: parallel attention and pipelines": """
        cp_strategy dcp_comm_backend enable_tp_lm_head_all_to_all dsa_prefill_cp_mode prefill_cp_mode
        enable_megamoe_for_layernorm_sp enable_dynamic_chunking
    """,
    "of refused ones: experts on other devices": """
        deepep_v2_mode flashinfer_a2a_dispatch_type
        ep_dispatch_algorithm eplb_algorithm eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk
        eplb_min_rebalancing_utilization_threshold expert_distribution_recorder_buffer_size
        enable_elastic_expert_backup mooncake_ib_device elastic_ep_rejoin elastic_ep_initial_size
        elastic_ep_scale_timeout ep_join_mode ep_join_rank_offset max_ep_size fuseep_mode
        disable_flashinfer_cutlass_moe_fp4_allgather kt_method kt_cpuinfer kt_threadpool_count kt_num_gpu_experts
        kt_max_deferred_experts_per_token paged_experts_num_resident
    """,
    "of refused ones: caches, offloading, compilation and overlap": """
        hicache_ratio hicache_size hicache_write_policy hicache_io_backend hicache_mem_layout hicache_storage_backend
        hicache_storage_prefetch_policy hicache_storage_backend_extra_config hicache_host_memory_mode
        hicache_storage_prefetch_retry_poll_interval hicache_storage_prefetch_retry_max_attempts
        hicache_host_memory_fraction hisparse_config lmcache_config_file flexkv_config_file
        unified_cache_external_linker_backend unified_cache_external_linker_config kv_canary_real_data
        kv_canary_sweep_interval weight_cache_socket weight_cache_timeout offload_num_in_group offload_prefetch_step
        offload_mode torch_compile_max_bs enable_torch_compile_debug_mode cuda_graph_tc_compiler
        tbo_token_distribution_threshold pdmux_config_path sm_group_num
    """,
    "of refused ones: disaggregation": """
        disaggregation_transfer_backend disaggregation_bootstrap_port disaggregation_ib_device
        disaggregation_decode_enable_radix_cache num_reserved_decode_tokens disaggregation_decode_extra_slots
        disaggregation_decode_polling_interval disaggregation_decode_retraction_backup
        disaggregation_enable_kv_checksum disaggregation_decode_host_receive_threshold
        disaggregation_decode_allocation_policy optimistic_prefill_attempts optimistic_prefill_retries
    """,
    "of refused ones: other algorithms of drafting": """
        decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank speculative_adaptive_config
        aux_hidden_state_capture speculative_dflash_block_size speculative_ngram_min_bfs_breadth
        speculative_ngram_max_bfs_breadth speculative_ngram_match_type speculative_ngram_max_trie_depth
        speculative_ngram_capacity speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget
        speculative_ngram_external_corpus_max_tokens speculative_dspark_block_size speculative_dspark_sps_table_path
        speculative_dspark_confidence_sts_path speculative_dspark_align_verify_tokens_to_graph_tier uno_lora_path
        speculative_domino_candidate_pool_size dllm_algorithm_config dllm_fdfo
    """,
    "of refused ones: LoRA": """
        enable_lora_overlap_loading max_lora_rank lora_target_modules max_loaded_loras max_loras_per_batch
        lora_eviction_policy lora_backend max_lora_chunk_size experts_shared_outer_loras lora_use_virtual_experts
        lora_strict_loading lora_drain_wait_threshold
    """,
    # Nothing of ours could follow them; some switch off what the plugin never does, and AMD's are set by SGLang itself.
    "of other models and devices": """
    swa_full_tokens_ratio _swa_full_tokens_ratio_explicitly_set swa_prefix_tails disable_hybrid_swa_memory
    enable_encoder_swa_bounded_replay enable_decoder_swa_bounded_replay max_mamba_cache_size mamba_full_memory_ratio
    mamba_backend mamba_ssm_dtype enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds
    mamba_radix_cache_strategy uses_mamba_radix_cache mamba_track_interval enable_int8_mamba_checkpoint
    int8_mamba_ckpt_size linear_attn_backend linear_attn_decode_backend linear_attn_prefill_backend
    linear_attn_verify_backend enable_linear_replayssm enable_linear_replayssm_spec linear_replayssm_cache_len
    enable_gdn_replayssm_spec mamba_max_states_per_path c128_page_size dsv4_prefill_backend dsv4_attn_backend
    enable_deepseek_v4_fp4_indexer qsa_indexer_dtype flashinfer_mxfp4_moe_precision enable_fused_qk_norm_rope
    enable_precise_embedding_interpolation enable_scattered_sconv ple_offload_embedding ple_offload_backend
    ple_offload_dir boundary_reduction speculative_boundary_reduction triton_attention_num_kv_splits
    enable_aiter_allreduce_fusion disable_chunked_prefix_cache disable_shared_experts_fusion
    disable_aiter_allreduce_fusion_in_prefill disable_aiter_allreduce_fusion_in_decode
    flashinfer_allreduce_fusion_backend mlx_enable_sampling encoder_only language_only language_model_only
    encoder_transfer_backend encoder_urls encoder_bootstrap_port encoder_register_urls
    enable_adaptive_dispatch_to_encoder asr_max_buffer_seconds asr_max_concurrent_sessions enable_multimodal
    mm_attention_backend enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder
    mm_process_config limit_mm_data_per_request enable_mm_global_cache disable_fast_image_processor
    keep_mm_feature_on_device mm_feature_transport mm_processor_worker_num mm_io_worker_num allowed_media_domains
    media_url_max_file_size_mb mm_preprocess_cache_size_mb trust_mm_content_hashes image_processor_backend
    mm_global_cache_backend
    """,
    # SGLang's own code, around our layers or in them, does what they ask for.
    "passed on: endpoints, tokenizers and grammars": """
        tokenizer_path tokenizer_mode tokenizer_backend tokenizer_worker_num detokenizer_worker_num
        skip_tokenizer_init host port fastapi_root_path grpc_mode skip_server_warmup warmups enable_http2 ssl_keyfile
        ssl_certfile ssl_ca_certs ssl_keyfile_password enable_ssl_refresh api_key admin_api_key weight_version
        hf_chat_template_name completion_template file_storage_path enable_cache_report strip_thinking_cache
        enable_strict_thinking tool_server sampling_defaults allow_auto_truncate stream_interval batch_notify_size
        stream_response_default_include_usage enable_streaming_session constrained_json_whitespace_pattern
        constrained_json_disable_any_whitespace enable_dynamic_batch_tokenizer dynamic_batch_tokenizer_batch_size
        dynamic_batch_tokenizer_batch_timeout enable_tokenizer_batch_encode disable_tokenizer_batch_decode
        smg_grpc_mode grpc_port sidecar sidecar_args http2_max_concurrent_streams grpc_worker_threads
        http2_initial_connection_window_size enable_response_store return_input_ids return_output_ids
        grpc_response_timeout_secs trust_request_chat_template constrained_json_max_whitespace_cnt
        enable_http_worker_reuseport grpc_http_sidecar_port
    """,
    "passed on: how a checkpoint is read": """
        model_loader_extra_config trust_remote_code context_length model_config_parser
        modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path custom_weight_loader
        weight_loader_disable_mmap weight_loader_prefetch_checkpoints weight_loader_prefetch_num_threads
        weight_loader_drop_cache_after_load remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port
        remote_instance_weight_loader_send_weights_group_ports remote_instance_weight_loader_backend
        remote_instance_weight_loader_start_seed_via_transfer_engine engine_info_bootstrap_port modelexpress_config
        download_dir model_checksum delete_ckpt_after_loading decrypted_config_file decrypted_draft_config_file
        checkpoint_engine_wait_weights_before_ready
    """,
    "passed on: logits and sampling": """
        enable_fp32_lm_head enable_tf32_matmul enable_weights_cpu_backup enable_draft_weights_cpu_backup
        enable_custom_logit_processor enable_return_hidden_states enable_return_routed_experts
        disable_outlines_disk_cache return_hidden_states_mode sampling_mask_max_tokens watermark_config watermark_key
        watermark_key_b watermark_context_window watermark_mixing_probability watermark_max_probability
        watermark_default_enabled watermark_enforce_all
    """,
    "passed on: what is scheduled when": """
        mem_fraction_static max_queued_requests prefill_max_requests schedule_policy enable_priority_scheduling
        disable_priority_preemption default_priority_value abort_on_priority_when_disabled
        schedule_low_priority_values_first priority_scheduling_preemption_threshold schedule_conservativeness
        num_continuous_decode_steps scheduler_recv_interval enable_prefill_delayer prefill_delayer_max_delay_passes
        prefill_delayer_token_usage_low_watermark prefill_delayer_forward_passes_buckets
        prefill_delayer_wait_seconds_buckets prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms
        min_free_slots_delay retraction_policy prefill_decode_interval prefill_decode_interval_min_bs
    """,
    "passed on: the radix cache": """
        radix_eviction_policy disable_radix_cache enable_session_radix_cache _radix_eviction_policy_explicitly_set
        radix_eviction_policy_config
    """,
    "passed on: the group of processes": """
        nccl_port dist_timeout dist_init_addr nnodes node_rank dp_size load_balance_method enable_p2p_check
        gated_launch_port
    """,
    # `exchange` follows SGLang's settings of the step: who holds which tokens, and the length that each is padded to.
    "supported: attention's own ranks, and experts on other devices": """
        attn_dp_size enable_dp_attention enable_dp_attention_local_control_broadcast enable_dp_lm_head
        disable_attn_tp_gather moe_dense_tp_size speculative_skip_dp_mlp_sync ep_size moe_a2a_backend
        speculative_moe_a2a_backend deepep_mode deepep_config deepep_dispatcher_output_dtype
    """,
    "supported: pipelines": """
        pp_size pp_max_micro_batch_size pp_async_batch_depth
    """,
    "passed on: processes and devices": """
        base_gpu_id gpu_id_step random_seed watchdog_timeout soft_watchdog_timeout sleep_on_idle use_ray
        custom_sigquit_handler numa_node gc_threshold
    """,
    "passed on: logs, metrics and dumps": """
        log_level log_level_http log_requests log_requests_level log_requests_format log_requests_target
        uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost enable_metrics enable_mfu_metrics
        enable_metrics_for_all_schedulers load_snapshot_publish_interval tokenizer_metrics_custom_labels_header
        tokenizer_metrics_allowed_custom_labels extra_metric_labels bucket_time_to_first_token
        bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets generation_tokens_buckets
        gc_warning_threshold_secs decode_log_interval enable_request_time_stats_logging kv_events_config
        enable_forward_pass_metrics forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace
        trace_modules otlp_traces_endpoint export_metrics_to_file export_metrics_to_file_dir stat_loggers
        debug_tensor_dump_output_folder debug_tensor_dump_layers debug_tensor_dump_input_file forward_hooks
        msprobe_dump_config smg_http_sidecar_port load_publish_endpoint otlp_service_name
    """,
    "passed on: matrix products": """
        fp8_gemm_runner_backend fp4_gemm_runner_backend bf16_gemm_backend disable_flashinfer_autotune
        flashinfer_autotune_skip_ops
    """,
    "passed on: graphs of decodes": """
        cuda_graph_backend_decode cuda_graph_max_bs_decode cuda_graph_bs_decode disable_prefill_cuda_graph
        disable_decode_cuda_graph disable_cuda_graph disable_cuda_graph_padding enable_profile_cuda_graph
        enable_cudagraph_gc debug_cuda_graph
    """,
    "passed on: sums over ranks": """
        enable_layerwise_nvtx_marker enable_nccl_nvls enable_symm_mem disable_custom_all_reduce enable_mscclpp
        enable_torch_symm_mem pre_warm_nccl enable_quant_communications
    """,
    "passed on: drafts": """
        speculative_draft_model_revision speculative_draft_load_format speculative_moe_runner_backend
        speculative_draft_model_quantization spec_trace_dir _speculative_draft_quantization_explicitly_set
    """,
    "passed on: experts": """
        moe_runner_backend
    """,
}
"""What becomes of them -> their names."""

REFUSED = frozenset(JUDGED["refused"].split())


def judged() -> list[str]:
    """Every option that somebody has looked at."""
    return " ".join(JUDGED.values()).split()


def declared(root: Path) -> set[str]:
    """The options that a release declares, read from its files: those of `ServerArgs`.

    Up to 0.5.19 they are fields of that class, from 0.5.20 on of classes that it is put together from.
    """
    folder = root / "srt" / "arg_groups" / "fields"
    found: set[str] = set()
    for path in (root / "srt" / "server_args.py", *sorted(folder.glob("*.py"))):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (path.parent == folder or node.name == "ServerArgs"):
                fields = (part.target for part in node.body if isinstance(part, ast.AnnAssign))
                found |= {target.id for target in fields if isinstance(target, ast.Name)}
    return found


def main(argv: list[str] | None = None) -> int:
    """Name what nobody has judged; returns 0 where there is nothing, else 1."""
    parser = argparse.ArgumentParser(description="The start-up options of a release that nobody has judged.")
    parser.add_argument("release", nargs="?", metavar="FOLDER", help="unpacked; else the one that is installed")
    given = parser.parse_args(argv).release
    spec = None if given else find_spec("sglang")
    if spec is not None and spec.submodule_search_locations:
        given = next(iter(spec.submodule_search_locations))
    if not given:
        raise SystemExit("sglang is not installed here; name the folder of a release")
    options = declared(Path(given))
    unknown = sorted(options - set(judged()))
    print(f"{len(options)} options, {len(unknown)} that nobody has judged")
    print("\n".join(unknown))
    return 1 if unknown else 0


if __name__ == "__main__":
    raise SystemExit(main())
