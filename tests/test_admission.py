"""Which releases of an engine may serve: those that are listed, and new ones that have been looked at and tried."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv32_plugin import admission, settings, surface
from dsv32_plugin.admission import Installed
from dsv32_plugin.engines import ENGINES, VLLM, Engine, Release

ENGINE = replace(
    VLLM,
    install="0.26.0",
    releases=(
        Release((0, 26), "0.26.0"),
        Release((0, 27), "0.27.1", broken="its hooks are gone"),
        Release((0, 28), "0.28.0", broken_on_cpu="its fallbacks fail"),
        Release((0, 29), "0.29.0", "tested without a GPU only"),
    ),
)


def a_release(version: str, device: str = "cpu") -> Installed:
    return Installed(ENGINE, version, device)


NEW = a_release("0.30.0")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.chosen():
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(admission.installation, "problems", lambda engine: [])


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that were made; both find nothing."""
    made: list[str] = []
    monkeypatch.setattr(Installed, "_lacks", lambda self: made.append("surface"))
    monkeypatch.setattr(Installed, "_answers_wrong", lambda self: made.append("parity"))
    return made


def start(release: Installed = NEW) -> list[str]:
    """A first process of an engine; what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        admission.admit(release)
        admission.prove(release)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("version", ["0.26.0", "0.26.3", "0.29.1rc2+cu130"])
def test_a_release_in_the_range_starts_without_a_question(checks: list[str], version: str) -> None:
    assert start(a_release(version)) == []
    assert checks == []


@pytest.mark.parametrize(
    ("release", "says"),
    [
        pytest.param(a_release("0.25.1"), "0.26.0 to 0.29.0 and on, found 0.25.1; install vllm==0.26.0", id="older"),
        pytest.param(a_release("dev"), "expected a release number such as 0.26.0, got 'dev'", id="no-number"),
        pytest.param(
            a_release("0.27.0", "cuda"), "gone; install vllm==0.26.0 or vllm==0.28.0", id="broken-between-two-good"
        ),
        pytest.param(a_release("0.28.0"), "fail; install vllm==0.26.0 or vllm==0.29.0", id="broken-without-a-gpu"),
    ],
)
def test_what_is_refused_says_what_to_install(checks: list[str], release: Installed, says: str) -> None:
    with pytest.raises(RuntimeError, match="vllm") as refused:
        start(release)
    assert says in str(refused.value)
    assert checks == []


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_the_records_are_in_order_and_the_release_to_install_is_good(engine: Engine) -> None:
    assert sorted(release.numbers for release in engine.releases) == [release.numbers for release in engine.releases]
    assert all(engine.release(release.name) is release for release in engine.releases)
    for device in ("cpu", "cuda"):
        assert engine.version_problem(engine.install, device) is None
        assert engine.version_problem(engine.releases[-1].name, device) is None
    assert engine.release(engine.install) is not None
    assert engine.version_problem("0.5.14" if engine.distribution == "sglang" else "0.25.9", "cpu") is not None


def test_broken_without_a_gpu_is_good_with_one(checks: list[str]) -> None:
    assert start(a_release("0.28.0", "cuda")) == []


def test_a_new_release_is_looked_at_once_and_warned_of_at_each_start(checks: list[str]) -> None:
    for _ in range(2):
        (warning,) = start()
        assert "vllm 0.30.0: newer than what the plugin is tested with (0.26.0 to 0.29.0)" in warning
        os.environ.pop("DSV32_ADMITTED")  # a start from the shell
    assert checks == ["surface", "parity"]


def test_the_processes_of_a_start_look_at_nothing_and_say_nothing(checks: list[str]) -> None:
    start()
    checks.clear()
    for path in settings.cache_folder().rglob("*.*"):
        path.unlink()
    assert start() == []
    assert checks == []


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"version": "0.31.0"}, id="engine"),
        pytest.param({"device": "cuda"}, id="device"),
        pytest.param({"torch": "9.9"}, id="torch"),
        pytest.param({"ours": "9.9"}, id="plugin"),
    ],
)
def test_another_release_of_a_part_is_another_matter(
    checks: list[str], monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    start()
    os.environ.pop("DSV32_ADMITTED")
    if "torch" in other:
        monkeypatch.setattr(admission, "_version", lambda name: other["torch"])
    elif "ours" in other:
        monkeypatch.setattr(admission, "__version__", other["ours"])
    start(NEW if {"torch", "ours"} & set(other) else replace(NEW, **other))
    assert checks == ["surface", "parity"] * 2


@pytest.mark.parametrize(
    ("check", "finds"),
    [("_lacks", "vllm.config.ModelConfig: gone"), ("_answers_wrong", "expected the call, got a sonnet")],
)
def test_a_new_release_that_fails_is_refused_and_tried_again(
    checks: list[str], monkeypatch: pytest.MonkeyPatch, check: str, finds: str
) -> None:
    monkeypatch.setattr(Installed, check, lambda self: finds)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="written for") as refused:
            start()
        assert finds in str(refused.value)
        assert "install vllm==0.26.0, or set DSV32_PLUGIN=0" in str(refused.value)
    monkeypatch.setattr(Installed, check, lambda self: None)
    assert start()


@pytest.mark.parametrize("version", ["0.25.1", "0.28.0", "0.30.0"])
def test_it_can_be_allowed_without_a_look(checks: list[str], monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("DSV32_ALLOW_UNTESTED_ENGINE", "1")
    (warning,) = start(a_release(version))
    assert version in warning
    assert checks == []


def test_what_is_wrong_with_the_packages_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = admission.installation.Problem("vllm 0.26.0 was built for torch==2.11.0, found 2.12.0", "pip install it")
    monkeypatch.setattr(admission.installation, "problems", lambda engine: [problem])
    assert start(a_release("0.26.0")) == [str(problem)]


def test_metadata_without_a_package_is_no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "find_spec", lambda name: None)
    assert "nothing but its metadata is here" in str(NEW.refusal())


def test_the_server_of_the_trial_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would never end. Nor does it wait for the peers of who asked."""
    given: dict[str, str] = {}

    def run(command: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", admission.PARITY, "vllm"]
        given.update(env)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(admission.subprocess, "run", run)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    assert NEW.failure() is None
    assert not {"RANK", "VLLM_DP_SIZE"} & set(given)
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(admission.subprocess, "run", None)
    assert "0.31.0" in start(a_release("0.31.0"))[0]


def test_what_the_trial_says_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "PARITY", "this")  # it prints, and is no trial
    assert NEW.failure() is None
    monkeypatch.setattr(admission, "PARITY", "no.such.module")
    assert "No module named" in str(a_release("0.31.0").failure())


def test_of_two_starts_at_once_one_looks(checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inside = threading.Barrier(2, timeout=1)

    def slow(self: Installed) -> None:
        checks.append("parity")
        with pytest.raises(threading.BrokenBarrierError):
            inside.wait()  # another that looked at the same time would come here

    monkeypatch.setattr(Installed, "_answers_wrong", slow)
    monkeypatch.setattr(settings, "admit", lambda check: None)  # these two share an environment
    found: list[str | None] = []
    starts = [threading.Thread(target=lambda: found.append(NEW.failure())) for _ in range(2)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    assert found == [None, None]
    assert checks == ["parity"]


def test_a_home_that_cannot_be_written_is_said_and_its_processes_still_know(
    checks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    *kept, warning = start()
    assert len(kept) == 2
    assert all("set XDG_CACHE_HOME to a folder that can be written" in text for text in kept)
    assert "newer than" in warning
    assert start() == []
    assert checks == ["surface", "parity"]


BEFORE: dict[str, Any] = {
    "engine:run": "(a, b=, *, c=)",
    "engine:Part": {"__init__": "(self)", "go": "(self, a)", "size": "value"},
    "engine:never": None,
}


@pytest.mark.parametrize(
    ("after", "lines"),
    [
        pytest.param({}, [], id="the-same"),
        pytest.param({"engine:run": "(a, b=, *, c=, d=)"}, [], id="a-parameter-that-may-be-left-out"),
        pytest.param({"engine:run": "(a, **more)"}, [], id="takes-any"),
        pytest.param({"engine:run": "(a, *, c=)"}, ["engine.run: takes no b"], id="a-parameter-that-we-give"),
        pytest.param({"engine:run": "(a, b=)"}, [], id="a-parameter-that-we-do-not-give"),
        pytest.param({"engine:run": "(b=, *, c=)"}, ["engine.run: takes no a"], id="the-first-is-gone"),
        pytest.param({"engine:run": "(a, d, b=, *, c=)"}, ["engine.run: must be given d"], id="one-more-to-give"),
        pytest.param({"engine:run": None}, ["engine.run: gone"], id="a-name"),
        pytest.param({"engine:Part": {"go": "(self, a)"}}, ["engine.Part.size: gone"], id="a-member"),
        pytest.param(
            {"engine:Part": {"go": "(self)", "size": "value"}}, ["engine.Part.go: takes no a"], id="of-a-method"
        ),
        pytest.param({"engine:Part": "value"}, [], id="made-when-asked-for"),
    ],
)
def test_what_a_release_lacks(after: dict[str, Any], lines: list[str]) -> None:
    assert surface.missing(BEFORE, {**BEFORE, **after}, {"b", "go", "size"}) == lines


def test_an_order_of_parameters_is_part_of_them() -> None:
    before = {"engine:run": "(a, b)"}
    assert surface.missing(before, {"engine:run": "(b, a)"}, set()) == ["engine.run: takes a, b in another order"]
