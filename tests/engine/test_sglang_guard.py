"""What is wrong with SGLang itself, with our hooks in it, or with drafts ends the start by its name."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from building_sglang import DECLARED
from checkpoints import Build
from sglang.srt.environ import envs
from sglang.srt.plugins import hook_registry, load_plugins

import dsv32_plugin.sglang_adapter
from dsv32_plugin import settings
from dsv32_plugin.engines import SGLANG as ENGINE
from dsv32_plugin.sglang_adapter import arguments, guard, hooks, registration, upstream
from dsv32_plugin.sglang_adapter.options import REFUSED

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("algorithm", ["EAGLE", "STANDALONE"])
def test_another_draft_model_is_refused(build: Build, damageable: Path, tmp_path: Path, algorithm: str) -> None:
    other = shutil.copytree(damageable, tmp_path / "other")
    with pytest.raises(NotImplementedError, match="--speculative-") as error:
        build(damageable, speculative_algorithm=algorithm, speculative_draft_model_path=str(other))
    says = f"expected nothing, got {other}" if algorithm == "EAGLE" else "expected EAGLE, got STANDALONE"
    assert says in str(error.value)


def test_drafts_without_a_draft_layer_are_refused(build: Build, damageable: Path) -> None:
    with pytest.raises(ValueError, match="config key num_nextn_predict_layers: expected 1 for --speculative-algorithm"):
        build(damageable, speculative_algorithm="EAGLE")


def test_determinism_reaches_the_kernels_or_the_start_ends(
    build: Build, damageable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV32_BATCH_INVARIANT", "0")
    build(damageable, enable_deterministic_inference=True)
    assert settings.batch_invariant()
    monkeypatch.setenv("DSV32_BATCH_INVARIANT", "0")
    with pytest.raises(RuntimeError, match="--enable-deterministic-inference did not reach the plugin's kernels"):
        guard.check_options(arguments.of_process())


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
        hooks.check_hook(target, parameters)
    assert f"sglang {upstream.installed_version()}" in str(error.value)
    assert f"sglang=={ENGINE.install}" in str(error.value)


@pytest.mark.skipif(not hasattr(envs, "SGLANG_RUST_SERVER"), reason="this release has none")
def test_the_server_in_rust_is_refused(build: Build, damageable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(NotImplementedError, match="SGLANG_RUST_SERVER: it has none of the plugin's encoding"):
        build(damageable)


@pytest.mark.parametrize("option", sorted(REFUSED & DECLARED.keys()))
def test_an_option_is_refused_by_its_name(option: str) -> None:
    given = SimpleNamespace(**{name: parameter.default for name, parameter in DECLARED.items()} | {"device": "cpu"})
    guard.check_given(given)
    setattr(given, option, "something")
    with pytest.raises(NotImplementedError, match=f"--{option.replace('_', '-')}: expected .*, got something"):
        guard.check_given(given)


def test_a_failed_registration_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang catches Exception around every plugin, and would go on without ours."""

    def fail() -> None:
        raise RuntimeError("no such hook")

    monkeypatch.setattr(registration, "register", fail)
    with pytest.raises(SystemExit, match="no such hook; DSV32_PLUGIN=0 runs"):
        dsv32_plugin.sglang_adapter.register()
    monkeypatch.setenv("DSV32_PLUGIN", "0")
    dsv32_plugin.sglang_adapter.register()
