"""What becomes of vLLM's configuration for our models."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import CompilationMode, CUDAGraphMode

from dsv32_plugin.vllm_adapter import engine_config, guard
from dsv32_plugin.vllm_adapter.engine_config import DsaEngineConfig
from dsv32_plugin.vllm_adapter.names import MTP_ARCHITECTURE

SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


def configured(monkeypatch: pytest.MonkeyPatch, *, cpu: bool = False, **parts: Any) -> SimpleNamespace:
    compilation = {"mode": None, "cudagraph_mode": None, **parts.pop("compilation", {})}
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            disable_cascade_attn=False, dtype=torch.bfloat16, hf_config=SimpleNamespace(architectures=[])
        ),
        compilation_config=SimpleNamespace(**compilation),
        structured_outputs_config=SimpleNamespace(backend="auto"),
        **{"speculative_config": None, **parts},
    )
    for check in ("check_checkpoint", "check_given", "check_options"):
        monkeypatch.setattr(guard, check, lambda config: None)
    monkeypatch.setattr(engine_config.probe, "check_ours", lambda architectures: None)
    monkeypatch.setattr(engine_config, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    # The other may be there: from 0.29 on vLLM sets it where a configuration is made on a CPU, and leaves it set.
    for name in (SAMPLER, engine_config._BREAKABLE):
        monkeypatch.setenv(name, "set by the test, so that it is restored")
        monkeypatch.delenv(name)
    DsaEngineConfig.verify_and_update_config(config)
    return config


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        pytest.param({}, CUDAGraphMode.FULL_DECODE_ONLY, id="default"),
        pytest.param({"mode": CompilationMode.VLLM_COMPILE}, CUDAGraphMode.FULL_DECODE_ONLY, id="compiled"),
        pytest.param(
            {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE}, CUDAGraphMode.FULL_DECODE_ONLY, id="piecewise-too"
        ),
        pytest.param({"cudagraph_mode": CUDAGraphMode.NONE}, CUDAGraphMode.NONE, id="no-graphs"),
    ],
)
def test_nothing_is_compiled_and_decodes_get_graphs(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], becomes: CUDAGraphMode
) -> None:
    config = configured(monkeypatch, compilation=given)
    assert config.compilation_config.mode is CompilationMode.NONE
    assert config.compilation_config.cudagraph_mode is becomes
    assert config.model_config.disable_cascade_attn


def test_piecewise_graphs_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(engine_config.Refusal, match="cudagraph_mode: expected FULL_DECODE_ONLY or NONE, got PIECEWISE"):
        configured(monkeypatch, compilation={"cudagraph_mode": CUDAGraphMode.PIECEWISE})


@pytest.mark.parametrize(("compiled", "becomes"), [(False, "0"), (True, None)])
def test_the_sampler_that_would_compile_is_not_used(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, becomes: str | None
) -> None:
    monkeypatch.setattr(engine_config, "find_spec", lambda name: object() if compiled else None)
    configured(monkeypatch)
    assert os.environ.get(SAMPLER) == becomes


def test_the_draft_model_is_ours_and_still_known_as_deepseeks(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepSeekMTPModel"]))
    config = configured(
        monkeypatch, cpu=True, speculative_config=SimpleNamespace(method="mtp", draft_model_config=draft)
    )
    assert draft.hf_config.architectures == [MTP_ARCHITECTURE, "DeepSeekMTPModel"]
    assert config.compilation_config.mode is None, "the CPU platform decides for itself"
