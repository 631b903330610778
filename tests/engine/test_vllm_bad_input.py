"""What is wrong with a checkpoint or an option is said at start-up, by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from checkpoints import BAD_CONFIGS, BAD_WEIGHTS, SPEC, edit_config, edit_weight
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from dsv32_plugin.serving import free_port
from dsv32_plugin.tiny import TinySpec
from dsv32_plugin.vllm_adapter import compat

pytestmark = pytest.mark.engine

Build = Callable[..., torch.nn.Module]


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """`build(model, **options)` does what an engine's worker does up to the loaded weights."""

    def make(model: Path, **options: Any) -> torch.nn.Module:
        options = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 1 << 26, **options}
        config = EngineArgs(model=str(model), **options).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            return get_model(vllm_config=config)

    yield make
    cleanup_dist_env_and_memory()


@pytest.fixture
def model(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint(SPEC), tmp_path / "model"))


def test_a_good_checkpoint_is_built_from_our_classes(build: Build, model: Path) -> None:
    built = build(model)
    assert type(built).__module__ == "dsv32_plugin.vllm_adapter.model"
    modules = {type(module).__module__ for module in built.modules()}
    assert not any("deepseek" in name for name in modules), "no class of vLLM's own model is used"


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
        pytest.param({"block_size": 24}, "--block-size: expected a multiple of 16, got 24", id="page-size"),
        pytest.param({"dtype": "float16"}, "--dtype: expected float32 or bfloat16, got float16", id="dtype"),
        pytest.param({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype: expected auto, bfloat16 or fp8", id="kv-dtype"),
    ],
)
def test_a_bad_option_is_named(build: Build, model: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="--") as error:
        build(model, **options)
    assert says in str(error.value)


@pytest.mark.parametrize("version", ["0.25.9", "0.27.0", "1.0.0", "dev"])
def test_an_untested_engine_is_refused_by_its_version(version: str) -> None:
    problem = compat.engine_version_problem(version)
    assert problem is not None
    assert version in problem
    assert compat.TESTED_VERSION in problem


def test_the_tested_engine_is_accepted() -> None:
    assert compat.engine_version_problem(compat.TESTED_VERSION) is None
    assert compat.engine_version_problem("0.26.0+cpu") is None
