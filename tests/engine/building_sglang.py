"""What SGLang's scheduler does up to the loaded weights, in this process, and what it must refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import Build
from sglang.srt import runtime_context
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.distributed.parallel_state import cleanup_dist_env_and_memory
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.model_loader import get_model
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from dsv32_plugin.sglang_adapter import arguments, upstream
from dsv32_plugin.tools.serving import free_port

PAGE_SIZES = "64 on a GPU" if torch.cuda.is_available() else "a multiple of 16"
BAD_OPTIONS = [
    pytest.param({"page_size": 24}, f"--page-size: expected {PAGE_SIZES}, got 24", id="page-size"),
    pytest.param({"dtype": "float16"}, "--dtype: expected float32 or bfloat16, got float16", id="dtype"),
    pytest.param({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype: expected auto, bfloat16", id="kv-dtype"),
    pytest.param(
        {"attention_backend": "triton"},
        "--attention-backend: expected dsv32 or nothing, got triton; set DSV32_PLUGIN=0",
        id="backend",
    ),
    pytest.param(
        {"grammar_backend": "llguidance", "reasoning_parser": "dsv32"},
        "--grammar-backend: expected xgrammar (the default) or none with a --reasoning-parser, got llguidance",
        id="guidance-after-reasoning",
    ),
    pytest.param(
        {"grammar_backend": "outlines", "reasoning_parser": "dsv32"},
        "--grammar-backend: expected xgrammar (the default) or none with a --reasoning-parser, got outlines",
        id="outlines-after-reasoning",
    ),
    pytest.param({"enable_lora": True, "lora_paths": []}, "--enable-lora: expected nothing, got True", id="lora"),
    pytest.param(
        {"enable_hierarchical_cache": True},
        "--enable-hierarchical-cache: expected nothing, got True",
        id="hierarchical-cache",
    ),
    pytest.param(
        {"disaggregation_mode": "prefill"}, "--disaggregation-mode: expected null, got prefill", id="disaggregation"
    ),
    pytest.param({"enable_torch_compile": True}, "--enable-torch-compile: expected nothing, got True", id="compile"),
    pytest.param(
        {"moe_a2a_backend": "mooncake"},
        "--moe-a2a-backend: expected none or deepep, got mooncake; leave it out, or set DSV32_PLUGIN=0",
        id="other-all-to-all",
    ),
    pytest.param({"dsa_prefill_backend": "fa3"}, "--dsa-prefill-backend: expected nothing, got fa3", id="dsa-backend"),
    pytest.param(
        {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": 2,
            "speculative_eagle_topk": 2,
            "speculative_num_draft_tokens": 4,
        },
        "--speculative-eagle-topk: the plugin supports 1, got 2",
        id="trees",
    ),
    pytest.param(
        {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": 8,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": 9,
        },
        "--speculative-num-steps: expected 1 to 7, got 8",
        id="many-drafts",
    ),
    pytest.param(
        {"speculative_algorithm": "EAGLE", "speculative_use_rejection_sampling": True},
        "--speculative-use-rejection-sampling: expected nothing, got True",
        id="rejection-sampling",
    ),
    pytest.param(
        {"speculative_algorithm": "EAGLE", "speculative_draft_window_size": 64},
        "--speculative-draft-window-size: expected nothing, got 64",
        id="draft-window",
    ),
]
BAD_OPTIONS += [
    pytest.param({"quantization": "fp8"}, "--quantization: expected nothing, got fp8", id="quantisation"),
    pytest.param(
        {"cuda_graph_backend_prefill": "full"},
        "--cuda-graph-backend-prefill: expected nothing or disabled, got full",
        id="graphs-of-prefills",
    ),
    pytest.param(
        {"speculative_algorithm": "EAGLE", "speculative_accept_threshold_acc": 0.5},
        r"--speculative-accept-threshold-…: expected 1 without a GPU, got (1.0, 0.5)",
        id="accept-threshold",
    ),
]
DECLARED = inspect.signature(ServerArgs).parameters
if "startup_weight_load_mode" in DECLARED:
    BAD_OPTIONS += [
        pytest.param(
            {"startup_weight_load_mode": "overlap"},
            "--startup-weight-load-mode: expected serial, got overlap",
            id="overlapped-load",
        ),
    ]
if "enable_return_aux_hidden_states" in DECLARED:
    BAD_OPTIONS += [
        pytest.param(
            {"enable_return_aux_hidden_states": True, "speculative_algorithm": "EAGLE3"},
            "--enable-return-aux-hidden-states: expected nothing, got True",
            id="aux-hidden-states",
        ),
    ]


TAKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "DeepseekV32ForCausalLM": lambda patch: patch.setitem(
        ModelRegistry.models, "DeepseekV32ForCausalLM", ModelRegistry.models["DeepseekV3ForCausalLM"]
    ),
    "dsv32": lambda patch: patch.setitem(ATTENTION_BACKENDS, "dsv32", ATTENTION_BACKENDS["triton"]),
}
"""What another plugin does that registers itself in a place of ours, after us."""


def publish(server_args: ServerArgs) -> None:
    """Make them those of this process, its first rank."""
    if upstream.declares_options():
        has_ranks = hasattr(runtime_context, "SpawnRanks")
        ranks = {"ranks": runtime_context.SpawnRanks(world_rank=0)} if has_ranks else {}
        runtime_context.publish(server_args, role="scheduler", **ranks)
    else:
        runtime_context.get_context().set_server_args(server_args)


@contextmanager
def builder() -> Iterator[Build]:
    load_plugins()
    started = False

    def build(model: Path, **options: Any) -> torch.nn.Module:
        nonlocal started
        server_args = ServerArgs(model_path=str(model), **{"dtype": "float32", "context_length": 256, **options})
        publish(server_args)
        model_config = ModelConfig.from_server_args(server_args)
        if not started:
            address = f"tcp://127.0.0.1:{free_port()}"
            init_distributed_environment(1, 0, address, local_rank=0, backend="gloo")
            initialize_model_parallel()
            started = True
        given = {"server_args": server_args, "model_config": model_config}
        asked = inspect.signature(initialize_dp_attention).parameters
        initialize_dp_attention(**{name: given[name] for name in asked})
        load_config = LoadConfig(load_format=server_args.load_format)
        return get_model(model_config=model_config, load_config=load_config, device_config=DeviceConfig("cpu"))

    yield build
    cleanup_dist_env_and_memory()


def update_from_disk(model: Any, folder: Path) -> None:
    """What `/update_weights_from_disk` calls; raises ValueError with the answer where that is no success."""
    config = arguments.model_config(arguments.of_process())
    runner = SimpleNamespace(
        model=model,
        get_model=lambda: model,
        model_config=config,
        load_config=LoadConfig(load_format="auto"),
        server_args=SimpleNamespace(),
        device="cpu",
        gpu_id=0,
        update_model_fields=lambda model, **fields: None,
        _assert_weight_cache_inactive=lambda step: None,
    )
    runner.weight_updater = runner

    def load(path: str, load_format: str, recapture_cuda_graph: bool = False) -> tuple[bool, str]:
        return _loads_from_disk()(runner, path, load_format)

    runner.update_weights_from_disk = load
    worker = SimpleNamespace(
        model_runner=runner, update_weights_from_disk=lambda request: load(request.model_path, request.load_format)
    )
    manager = SimpleNamespace(
        tp_worker=worker,
        draft_worker=None,
        _observe_weight_load=lambda source: nullcontext(),
        _select_runners=lambda: [("target", runner)],
        flush_cache=lambda: True,
        flush_cache_after_weight_update=lambda request, *outcome: outcome,
        record_weight_version_after_update=lambda version: None,
    )
    before = config.model_path
    request = UpdateWeightFromDiskReqInput(model_path=str(folder), load_format="auto")
    answer = SchedulerWeightUpdaterManager.update_weights_from_disk(manager, request)
    if not answer.success:
        assert config.model_path == before, "the next update goes back to the good folder"
        raise ValueError(answer.message)


def _loads_from_disk() -> Any:
    if upstream.declares_options():
        from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

        return WeightUpdater.update_weights_from_disk
    from sglang.srt.model_executor.model_runner import ModelRunner

    return ModelRunner.update_weights_from_disk
