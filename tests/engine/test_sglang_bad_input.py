"""What is wrong with a checkpoint, an option or SGLang itself is said at start-up, by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from checkpoints import BAD_CONFIGS, BAD_WEIGHTS, SPEC, edit_config, edit_weight
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.distributed.parallel_state import cleanup_dist_env_and_memory
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.model_loader import get_model
from sglang.srt.plugins import hook_registry, load_plugins
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

import dsv32_plugin.sglang_adapter
from dsv32_plugin.serving import free_port
from dsv32_plugin.sglang_adapter import compat, guard, registration
from dsv32_plugin.tiny import TinySpec

pytestmark = pytest.mark.engine

Build = Callable[..., torch.nn.Module]


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """`build(model, **options)` does what a scheduler does up to the loaded weights."""
    load_plugins()
    started = False

    def make(model: Path, **options: Any) -> torch.nn.Module:
        nonlocal started
        server_args = ServerArgs(model_path=str(model), **{"dtype": "float32", "context_length": 256, **options})
        set_global_server_args_for_scheduler(server_args)
        model_config = ModelConfig.from_server_args(server_args)
        if not started:
            address = f"tcp://127.0.0.1:{free_port()}"
            init_distributed_environment(1, 0, address, local_rank=0, backend="gloo")
            initialize_model_parallel()
            started = True
        initialize_dp_attention(server_args, model_config)
        load_config = LoadConfig(load_format="auto")
        return get_model(model_config=model_config, load_config=load_config, device_config=DeviceConfig("cpu"))

    yield make
    cleanup_dist_env_and_memory()


@pytest.fixture
def model(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint(SPEC), tmp_path / "model"))


def test_a_good_checkpoint_is_built_from_our_classes(build: Build, model: Path) -> None:
    built = build(model)
    guard.check_model(built)
    modules = {type(module).__module__ for module in built.modules()}
    assert not any("deepseek" in name for name in modules), "no class of SGLang's own model is used"


@pytest.mark.parametrize(("changes", "says"), BAD_CONFIGS)
def test_a_bad_config_names_its_key(build: Build, model: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(model, **changes)
    with pytest.raises(ValueError, match="config key") as error:
        build(model)
    assert says in str(error.value)


@pytest.mark.parametrize(("name", "change", "says"), BAD_WEIGHTS)
def test_a_bad_weight_is_named(
    build: Build, model: Path, name: str, change: Callable[[torch.Tensor], dict[str, torch.Tensor]], says: str
) -> None:
    edit_weight(model, name, change)
    with pytest.raises(ValueError, match="checkpoint: ") as error:
        build(model)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param({"page_size": 24}, "--page-size: expected a multiple of 16, got 24", id="page-size"),
        pytest.param({"dtype": "float16"}, "--dtype: expected float32 or bfloat16, got float16", id="dtype"),
        pytest.param({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype: expected auto, bfloat16", id="kv-dtype"),
        pytest.param(
            {"attention_backend": "triton"},
            "--attention-backend: expected dsv32 or nothing, got triton; set DSV32_PLUGIN=0",
            id="backend",
        ),
        pytest.param({"enable_lora": True, "lora_paths": []}, "--enable-lora: the plugin supports None", id="lora"),
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
            "--speculative-use-rejection-sampling: the plugin supports False",
            id="rejection-sampling",
        ),
    ],
)
def test_a_bad_option_is_named(build: Build, model: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match="--") as error:
        build(model, **options)
    assert says in str(error.value)


@pytest.mark.parametrize("algorithm", ["EAGLE", "STANDALONE"])
def test_another_draft_model_is_refused(build: Build, model: Path, tmp_path: Path, algorithm: str) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    with pytest.raises(NotImplementedError, match="--speculative-") as error:
        build(model, speculative_algorithm=algorithm, speculative_draft_model_path=str(other))
    says = f"expected nothing, got {other}" if algorithm == "EAGLE" else "expected EAGLE, got STANDALONE"
    assert says in str(error.value)


def test_drafts_without_a_draft_layer_are_refused(build: Build, model: Path) -> None:
    with pytest.raises(ValueError, match="config key num_nextn_predict_layers: expected 1 for --speculative-algorithm"):
        build(model, speculative_algorithm="EAGLE")


def test_another_model_behind_our_backend_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"SGLang loaded torch\.nn\.modules\.linear:Linear"):
        guard.check_model(torch.nn.Linear(1, 1))


def test_a_hook_that_sglang_did_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugins()
    guard.check_hooks()
    target = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool"
    monkeypatch.setattr(hook_registry.HookRegistry, "_patched", hook_registry.HookRegistry._patched - {target})
    with pytest.raises(RuntimeError, match=f"did not take the hook on {target}"):
        guard.check_hooks()


@pytest.mark.parametrize(
    ("target", "parameters", "says"),
    [
        pytest.param("sglang.srt.server_args.ServerArgs._gone", ("self",), "found nothing", id="gone"),
        pytest.param("sglang.srt.gone.f", ("self",), "found nothing", id="module-gone"),
        pytest.param("sglang.srt.utils.common.support_triton", ("name",), r"found \(backend\)", id="changed"),
    ],
)
def test_a_hook_that_does_not_fit_names_the_versions(target: str, parameters: tuple[str, ...], says: str) -> None:
    with pytest.raises(RuntimeError, match=says) as error:
        compat.check_hook(target, parameters)
    assert f"sglang {compat.installed_version()}" in str(error.value)
    assert f"sglang=={compat.TESTED_VERSION}" in str(error.value)


def test_a_failed_registration_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang catches Exception around every plugin, and would go on without ours."""

    def fail() -> None:
        raise RuntimeError("no such hook")

    monkeypatch.setattr(registration, "register", fail)
    with pytest.raises(SystemExit, match="no such hook; DSV32_PLUGIN=0 runs"):
        dsv32_plugin.sglang_adapter.register()
    monkeypatch.setenv("DSV32_PLUGIN", "0")
    dsv32_plugin.sglang_adapter.register()


@pytest.mark.parametrize("version", ["0.5.14", "0.5.24", "0.6.0", "dev"])
def test_an_untested_engine_is_refused_by_its_version(version: str) -> None:
    problem = compat.engine_version_problem(version)
    assert problem is not None
    assert version in problem
    assert compat.TESTED_VERSION in problem


def test_the_tested_engine_is_accepted() -> None:
    assert compat.engine_version_problem(compat.TESTED_VERSION) is None
