"""`dsv32 doctor`: it says what is registered, and each way in which that can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv32_plugin import cli, settings
from dsv32_plugin.engines import VLLM
from dsv32_plugin.sglang_adapter import names
from dsv32_plugin.tools import doctor
from dsv32_plugin.vllm_adapter.names import BACKEND_PATH, CPU_PLATFORM_PATH, MODELS

HEALTHY: dict[str, Any] = {
    "platform": CPU_PLATFORM_PATH,
    "device_type": "cpu",
    "models": MODELS,
    "backend": BACKEND_PATH,
}
OURS = SimpleNamespace(name="dsv32", dist=SimpleNamespace(name="dsv32-plugin"))
THEIRS = SimpleNamespace(name="rival", dist=SimpleNamespace(name="rival-plugin"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which all is well, without starting vLLM."""
    for name in (*settings.chosen(), "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    versions = {"vllm": "0.26.0", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.0.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "entry_points", lambda group: [OURS])
    monkeypatch.setattr(doctor, "_probe", lambda engine: HEALTHY)
    monkeypatch.setattr(doctor.installation, "problems", lambda engine: [])
    for check in ("_lacks", "_answers_wrong"):
        monkeypatch.setattr(doctor.admission.Installed, check, lambda self: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def found(level: str) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine() if finding.level == level}


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert not found("wrong")
    assert not found("warning")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "sparse_mla" in printed, "which kernel serves each operation"
    assert "vLLM will serve through the plugin" in printed


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["well"] is True
    assert {"section": "versions", "name": "vllm", "found": "0.26.0", "level": "ok", "advice": "tested"} in report[
        "findings"
    ]


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        pytest.param(
            {"models": dict.fromkeys(MODELS, "vllm.models:DeepseekV3")},
            "DeepseekV32ForCausalLM",
            "vLLM's own code",
            id="in-tree-model",
        ),
        pytest.param({"models": dict.fromkeys(MODELS)}, "GlmMoeDsaForCausalLM", "expected dsv32_plugin", id="no-model"),
        pytest.param(
            {"backend": "rival.Backend"}, "attention backend CUSTOM", "another plugin's code", id="backend-taken"
        ),
        pytest.param({"backend": None}, "attention backend CUSTOM", "expected dsv32_plugin", id="no-backend"),
        pytest.param({"platform": "vllm.None", "device_type": ""}, "platform", "cannot start", id="nothing-to-run-on"),
        pytest.param({"platform": "vllm.platforms.cpu.CpuPlatform"}, "platform", "vLLM's own code", id="cpu-platform"),
    ],
)
def test_what_is_registered_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], name: str, text: str
) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda engine: HEALTHY | change)
    assert text in found("wrong")[name].advice
    assert cli.main(["doctor"]) == 1


def test_a_gpu_keeps_the_platform_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"platform": "vllm.platforms.cuda.NvmlCudaPlatform", "device_type": "cuda"}
    monkeypatch.setattr(doctor, "_probe", lambda engine: HEALTHY | gpu)
    assert not found("wrong")
    monkeypatch.setattr(doctor, "_probe", lambda engine: HEALTHY | gpu | {"platform": "rival.Platform"})
    assert "another plugin's" in found("warning")["platform"].advice


def test_loading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda engine: "RuntimeError: no")
    assert found("wrong")["plugin loading"].advice == "RuntimeError: no"


def test_the_last_line_of_a_failed_probe_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: two platforms\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **keywords: failed)
    assert doctor._probe(VLLM) == "RuntimeError: two platforms"


def test_an_older_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm": "0.25.1"}.get)
    assert f"install vllm=={VLLM.install}" in found("wrong")["vllm"].advice


@pytest.mark.parametrize(
    ("check", "finds"),
    [("_lacks", "vllm.config.ModelConfig: gone"), ("_answers_wrong", "expected the call, got a sonnet")],
)
def test_a_new_engine_is_tried(monkeypatch: pytest.MonkeyPatch, check: str, finds: str) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm": "99.0"}.get)
    monkeypatch.setattr(doctor.admission.Installed, check, lambda self: finds)
    assert finds in found("wrong")["vllm"].advice
    assert cli.main(["doctor"]) == 1
    monkeypatch.setattr(doctor.admission.Installed, check, lambda self: None)
    assert "newer than" in found("warning")["vllm"].advice
    assert cli.main(["doctor"]) == 0


def test_what_is_wrong_with_the_packages_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = doctor.installation.Problem("vllm 0.26.0 was built for torch==2.11.0, found 2.12.0", "pip install it")
    monkeypatch.setattr(doctor.installation, "problems", lambda engine: [problem])
    finding = found("warning")["vllm"]
    assert (finding.found, finding.advice) == (problem.what, problem.advice)


def test_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {}.get)
    assert "pip install 'dsv32-plugin[vllm]' or" in found("wrong")["vllm or sglang"].advice


def test_an_untested_engine_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm": "0.25.0"}.get)
    monkeypatch.setenv("DSV32_ALLOW_UNTESTED_ENGINE", "1")
    assert "vllm" in found("warning")


def test_another_plugin_in_our_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: [OURS, THEIRS])
    warnings = found("warning")
    assert "rival of rival-plugin" in warnings["vllm.general_plugins"].found
    assert "rival of rival-plugin" in warnings["vllm.platform_plugins"].found
    assert not found("wrong"), "it is no harm as long as what is registered is ours"


def test_the_package_is_there_but_its_entry_points_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert "pip install" in found("wrong")["vllm.general_plugins"].advice


def test_vllm_is_told_not_to_load_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "rival,other")
    assert found("wrong")["vllm.general_plugins"].advice == "add dsv32 to it"
    monkeypatch.setenv("VLLM_PLUGINS", "rival,dsv32")
    assert not found("wrong")


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV32_PLUGIN", "0")
    assert "vLLM runs its own code" in found("wrong")["switch"].found


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        pytest.param("DSV32_PLUGIN", "perhaps", "wrong", id="malformed"),
        pytest.param("DSV32_KERNEL", "triton", "warning", id="misspelt"),
    ],
)
def test_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: str, level: str) -> None:
    monkeypatch.setenv(name, value)
    assert name in found(level)


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        pytest.param({}, "", "", id="well"),
        pytest.param({"missing_hooks": ["sglang.a"]}, "hooks", "SGLang's log says why", id="a-hook-is-missing"),
        pytest.param({"backend": None}, "attention backend dsv32", "expected dsv32_plugin", id="no-backend"),
    ],
)
def test_sglang(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], name: str, text: str) -> None:
    monkeypatch.setattr(doctor, "_version", {"sglang": "0.5.15.post1"}.get)
    healthy = {
        "platform": names.CPU_PLATFORM_PATH,
        "device_type": "cpu",
        "models": names.MODELS,
        "backend": names.BACKEND_PATH,
        "missing_hooks": [],
    }
    monkeypatch.setattr(doctor, "_probe", lambda engine: healthy | change)
    wrong = found("wrong")
    assert list(wrong) == ([name] if name else [])
    assert not name or wrong[name].advice.startswith(text)


@pytest.fixture
def neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install another plugin, with this body, beside ours."""

    def install(body: str) -> None:
        site = tmp_path / "site"
        metadata = site / "rival_plugin-1.0.dist-info"
        metadata.mkdir(parents=True)
        (site / "rival.py").write_text(f"def register():\n    {body}\n")
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rival-plugin\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nrival = rival:register\n")
        # Behind everything else on the path, so that it registers last.
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(site)!r})\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(sys, "path", [*sys.path, str(site)])

    return install


def test_a_release_that_is_less_tested_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"sglang": "0.5.15.post1"}.get)
    assert found("ok")["sglang"].advice == "tested"
    monkeypatch.setattr(doctor, "_version", {"sglang": "0.5.23"}.get)
    assert found("ok")["sglang"].advice.startswith("tested without a GPU only")


@pytest.mark.engine
class TestWithVllm:
    """The same questions to the real vLLM."""

    @pytest.fixture(autouse=True)
    def real(self, environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("vllm")
        monkeypatch.undo()

    def test_it_has_loaded_us(self) -> None:
        assert not found("wrong")

    def test_switched_off_it_runs_its_own_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DSV32_PLUGIN", "0")
        wrong = found("wrong")
        assert wrong["DeepseekV32ForCausalLM"].advice.startswith("vLLM's own code")
        assert wrong["attention backend CUSTOM"].found == "nothing registered"

    def test_a_neighbour_that_takes_our_backend_is_named(
        self, monkeypatch: pytest.MonkeyPatch, neighbour: Callable[[str], None]
    ) -> None:
        registry = "vllm.v1.attention.backends.registry"
        neighbour(f"import {registry} as r; r.register_backend(r.AttentionBackendEnum.CUSTOM, 'rival.Backend')")
        assert "rival of rival-plugin" in found("warning")["vllm.general_plugins"].found
        assert found("wrong")["attention backend CUSTOM"].found == "rival.Backend"


@pytest.mark.engine
class TestWithSglang:
    """The same questions to the real SGLang."""

    @pytest.fixture(autouse=True)
    def real(self, environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("sglang")
        monkeypatch.undo()

    def test_it_has_loaded_us(self) -> None:
        assert not found("wrong")

    def test_switched_off_it_runs_its_own_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DSV32_PLUGIN", "0")
        wrong = found("wrong")
        assert wrong["DeepseekV32ForCausalLM"].advice.startswith("SGLang's own code")
        assert wrong["attention backend dsv32"].found == "nothing registered"
