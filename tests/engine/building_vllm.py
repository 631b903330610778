"""What vLLM's worker does up to the loaded weights, in this process, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import Build
from vllm.config import LoadConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backends import registry
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from dsv32_plugin.tools.serving import free_port

PAGE_SIZE = 64 if torch.cuda.is_available() else 16
BAD_OPTIONS = [
    pytest.param({"block_size": 24}, f"--block-size: expected a multiple of {PAGE_SIZE}, got 24", id="page-size"),
    pytest.param({"dtype": "float16"}, "--dtype: expected float32 or bfloat16, got float16", id="dtype"),
    pytest.param(
        {"enable_expert_parallel": True},
        "--enable-expert-parallel: expected nothing without a GPU, got it; leave it out",
        id="expert-parallel",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="works on GPUs"),
    ),
    pytest.param({"enable_lora": True}, "--enable-lora: expected nothing, got it; leave it out, or", id="lora"),
    pytest.param(
        {"attention_config": {"sparse_mla_force_mqa": True}},
        "--attention-config: expected sparse_mla_force_mqa False, got True",
        id="attention",
    ),
    pytest.param({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype: expected auto, bfloat16 or fp8", id="kv-dtype"),
]


TAKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "DeepseekV32ForCausalLM": lambda patch: patch.setitem(
        ModelRegistry.models, "DeepseekV32ForCausalLM", ModelRegistry.models["DeepseekV3ForCausalLM"]
    ),
    "CUSTOM": lambda patch: patch.setitem(registry._ATTN_OVERRIDES, registry.AttentionBackendEnum.CUSTOM, "a.Rival"),
}
"""What another plugin does that registers itself in a place of ours, after us."""


@contextmanager
def builder() -> Iterator[Build]:
    def build(model: Path, **options: Any) -> torch.nn.Module:
        options = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 1 << 26, **options}
        config = EngineArgs(model=str(model), **options).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            return get_model(vllm_config=config)

    yield build
    cleanup_dist_env_and_memory()


def update_from_disk(model: Any, folder: Path) -> None:
    """What `collective_rpc("reload_weights", ...)` calls; raises what it raises."""
    runner = object.__new__(GPUModelRunner)
    runner.model, runner.lora_config = model, None
    runner.model_config, runner.load_config = model.loader._model_config, LoadConfig()
    runner.reset_lora_state = runner.reset_encoder_cache = runner.reset_mm_cache = lambda: None
    config = SimpleNamespace(model_config=runner.model_config, load_config=runner.load_config, lora_config=None)
    worker = SimpleNamespace(model_runner=runner, vllm_config=config)
    runner.vllm_config = config
    before = runner.model_config.model
    try:
        Worker.reload_weights(worker, weights_path=str(folder))
    except BaseException:
        assert runner.model_config.model == before, "the next reload is not from the bad folder"
        raise
