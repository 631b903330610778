"""A release of the engine that nobody knows yet: the installed one with another number, whole or spoilt.

It starts with a warning, is tried once, and is refused where a name is gone or an answer is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from engines import installed

from dsv32_plugin import surface
from dsv32_plugin.engines import ENGINES
from dsv32_plugin.tools import demo, serving

NAME = installed().name
ENGINE = ENGINES[NAME]
PACKAGE = surface.installed(NAME)
VERSION = distribution(NAME).version
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]
NEXT = "99.0.0"
ACTIVATION = {"vllm": "model_executor/layers/activation.py", "sglang": "srt/layers/activation.py"}
SPOIL = {
    "name": ("class SiluAndMul(", "class SiluAndMore("),
    "meaning": ("return F.silu(x[..., :d]) * x[..., d:]", "return x[..., d:]"),
}
"""What stands in that file, and what does instead."""
Make = Callable[..., dict[str, str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(spoil)` is the environment in which Python finds the new release."""

    def make(spoil: str | None = None) -> dict[str, str]:
        site = tmp_path / f"site-{spoil}"
        edits = {"_version.py": (VERSION, NEXT)} | ({ACTIVATION[NAME]: SPOIL[spoil]} if spoil else {})
        link(PACKAGE, site / NAME, [PACKAGE / file for file in edits])
        for file, change in edits.items():
            edit(site / NAME / file, *change)
        metadata = site / f"{NAME}-{NEXT}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {NEXT}\n")
        cache = str(tmp_path / "cache")
        return {**demo.ENVIRONMENT, "PYTHONPATH": str(site), "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}

    return make


def link(source: Path, target: Path, edited: list[Path]) -> None:
    """Make a folder of links; those that lead to a file that will be edited are folders of links themselves.

    What is compiled of a linked folder is that of the release.
    """
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir() and any(file.is_relative_to(path) for file in edited):
            link(path, target / path.name, edited)
        elif path.name != "__pycache__":
            (target / path.name).symlink_to(path)


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text, "the engine has this elsewhere"
    path.unlink()
    path.write_text(text.replace(before, after), encoding="utf-8")


def start(environment: dict[str, str], log_path: Path) -> str:
    """What a server says until it is ready; raises ServerError where it never is."""
    options = [*demo.COMMON_OPTIONS, *ENGINE.demo_options]
    with serving.SERVERS[NAME](demo.TRAINED, options, log_path=log_path, env=environment) as server:
        server.wait_until_ready(demo.START_SECONDS)
        return server.log()


def test_it_is_tried_once_and_serves_with_a_warning(make: Make, tmp_path: Path) -> None:
    environment = make()
    first = start(environment, tmp_path / "first.log")
    assert first.count(f"dsv32: {NAME} {NEXT} is new") == 1
    assert first.count("newer than what the plugin is tested with") == 1
    assert "dsv32: serving" in first
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "dsv32" / "admitted").iterdir())
    assert kept == [".lock", ".parity", ".surface"]
    program = f"from dsv32_plugin.{NAME}_adapter import probe; print(probe.installed().failure())"
    command = [sys.executable, "-c", program]
    again = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert again.stdout.split()[-1] == "None"
    assert "is new" not in again.stderr


def test_a_name_that_is_gone_is_named(make: Make, tmp_path: Path) -> None:
    program = f"from dsv32_plugin.{NAME}_adapter import register; register()"
    environment = {**os.environ, **make("name")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert f"{NAME} {NEXT}: dsv32-plugin is written for {ENGINE.range}, and it differs" in done.stderr
    assert ".layers.activation.SiluAndMul: gone" in done.stderr
    assert f"install {NAME}=={ENGINE.install}" in done.stderr


@pytest.mark.wide
def test_a_meaning_that_has_changed_is_noticed(make: Make, tmp_path: Path) -> None:
    """The names are all there, and the server starts; it answers wrong."""
    with pytest.raises(serving.ServerError) as refused:
        start(make("meaning"), tmp_path / "server.log")
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert "a small model failed with it" in log, refused.value
    assert "expected log-probabilities" in log
