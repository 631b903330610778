"""What must hold before a request is served: supported options, and code that is really ours."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.quantisation import BlockFp8
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE, PAGE_SIZE_MULTIPLE
from dsv32_plugin.vllm_adapter import options
from dsv32_plugin.vllm_adapter.backend import DsaBackend
from dsv32_plugin.vllm_adapter.caches import check_cache_dtype
from dsv32_plugin.vllm_adapter.names import BACKEND_PATH
from dsv32_plugin.vllm_adapter.upstream import (
    AttentionBackendEnum,
    ModelConfig,
    VllmConfig,
    current_platform,
    init_logger,
)

logger = init_logger("vllm.dsv32_plugin")
IN_TREE_HINT = "set DSV32_PLUGIN=0 for vLLM's own code"


def read_config(model_config: ModelConfig) -> DsaConfig:
    """The checkpoint's config as vLLM has it, with `--hf-overrides` applied.

    Raises:
        ConfigError: for a key that is missing in config.json, too, where Transformers would put a default of its own.
    """
    if not model_config.hf_overrides:
        stored, _ = PretrainedConfig.get_config_dict(
            model_config.hf_config_path or model_config.model, revision=model_config.revision
        )
        DsaConfig.from_hf(stored)
    return DsaConfig.from_hf(model_config.hf_config)


def check_checkpoint(vllm_config: VllmConfig) -> None:
    """Raise ConfigError or ValueError for a checkpoint that the model or these options cannot take."""
    model_config = vllm_config.model_config
    config = read_config(model_config)
    config.check(vllm_config.parallel_config.tensor_parallel_size)
    checkpoint.check_alike(config)
    if not current_platform.is_cpu():
        config.check_kernels()
        for scheme in () if config.quantisation is None else config.quantisation.schemes:
            if not isinstance(scheme, BlockFp8):
                logger.warning("dsv32: weights in %s have not been tried on a GPU with this plugin", scheme.name)
    folder = Path(model_config.model)
    if vllm_config.load_config.load_format in ("auto", "safetensors"):
        checkpoint.check_shards(folder)
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method == "mtp" and config.num_nextn_predict_layers == 0:
        raise ConfigError("num_nextn_predict_layers", "at least 1 for method mtp", 0, "leave --speculative-config out")


def check_given(vllm_config: VllmConfig) -> None:
    """Raise NotImplementedError for an option that is refused; asked before vLLM fills in what was left out."""
    for expected, default, value in options.refused(vllm_config):
        raise NotImplementedError(f"{expected} {default}, got {value}; leave it out, or {IN_TREE_HINT}")
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and "HiSparse" in f"{transfer.kv_connector} {transfer.kv_connector_extra_config}":
        raise NotImplementedError(
            f"--kv-transfer-config: expected no HiSparseConnector, got {transfer.kv_connector}; leave it out, "
            f"or {IN_TREE_HINT}"
        )


def check_options(vllm_config: VllmConfig) -> None:
    """Raise for a start-up option that this adapter would have to ignore."""
    if vllm_config.lora_config is not None:
        raise NotImplementedError(f"--enable-lora: expected nothing, got it; leave it out, or {IN_TREE_HINT}")
    if vars(vllm_config.parallel_config)["enable_expert_parallel"] and current_platform.is_cpu():
        raise NotImplementedError(
            "--enable-expert-parallel: expected nothing without a GPU, got it; leave it out, --tensor-parallel-size "
            "cuts the experts, too"
        )
    model = vllm_config.model_config
    if model.dtype not in DsaBackend.supported_dtypes:
        raise ValueError(f"--dtype: expected float32 or bfloat16, got {str(model.dtype).removeprefix('torch.')}")
    if not model.use_mla:
        raise ValueError("VLLM_MLA_DISABLE: expected 0, got 1; sparse attention runs on MLA's latents")
    check_cache_dtype(vllm_config.cache_config.cache_dtype)
    cache, page_size = vllm_config.cache_config, PAGE_SIZE_MULTIPLE if current_platform.is_cpu() else PAGE_SIZE
    if cache.user_specified_block_size and cache.block_size % page_size:
        raise ValueError(
            f"--block-size: expected a multiple of {page_size}, got {cache.block_size}; leave it out for {PAGE_SIZE}"
        )
    backend = vllm_config.attention_config.backend
    if backend not in (None, AttentionBackendEnum.CUSTOM):
        raise ValueError(f"--attention-backend: expected CUSTOM or nothing, got {backend.name}; {IN_TREE_HINT}")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.use_eagle() and speculative.method != "mtp":
        raise NotImplementedError(
            f"--speculative-config: method {speculative.method} needs a draft model that this plugin does not have; "
            f"leave it out, or {IN_TREE_HINT}"
        )
    drafts = None if speculative is None else speculative.attention_backend
    if drafts not in (None, AttentionBackendEnum.CUSTOM):
        raise ValueError(
            f"--speculative-config: expected attention_backend CUSTOM or nothing, got {drafts.name}; {IN_TREE_HINT}"
        )


def check_backend() -> None:
    """Raise RuntimeError unless vLLM's registry still resolves to our attention backend."""
    path = AttentionBackendEnum.CUSTOM.get_path()
    if path != BACKEND_PATH:
        raise RuntimeError(
            f"attention backend CUSTOM: expected {BACKEND_PATH}, got {path}; another plugin has taken it: "
            "remove that plugin, or list the plugins to load in VLLM_PLUGINS"
        )
