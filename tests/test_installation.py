"""What is wrong with the packages around an engine is named, with what to install."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsv32_plugin import installation
from dsv32_plugin.engines import VLLM

Site = Callable[..., Path]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """`site(name, version, *requires)` installs a package that is empty, into a folder that holds nothing else."""

    def install(name: str, version: str, *requires: str, files: tuple[str, ...] = ("__init__.py",)) -> Path:
        (tmp_path / name).mkdir()
        metadata = tmp_path / f"{name}-{version}.dist-info"
        metadata.mkdir()
        for file in files:
            (tmp_path / name / file).write_text("")
        needed = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
        (metadata / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in files))
        return tmp_path

    return install


def problems(folder: Path) -> list[str]:
    """Of vLLM where only what is in `folder` is installed."""
    program = f"""
        import sys
        import packaging.requirements
        from dsv32_plugin import installation
        from dsv32_plugin.engines import VLLM
        sys.path[:] = [{str(folder)!r}, *(path for path in sys.path if "packages" not in path)]
        print(*installation.problems(VLLM), sep="\\n")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return done.stdout.splitlines() if done.stdout.strip() else []


def test_all_is_well(site: Site) -> None:
    site("triton", "3.6.0")
    site("torch", "2.11.0+cu130", "triton==3.6.0")
    assert problems(site("vllm", "0.26.0", "torch==2.11.0", "nothing>=1; extra == 'audio'")) == []


def test_files_are_missing(site: Site) -> None:
    folder = site("vllm", "0.26.0", files=("__init__.py", "_C.abi3.so", "config.py"))
    (folder / "vllm" / "_C.abi3.so").unlink()
    assert problems(folder) == [
        "vllm 0.26.0 lacks 1 of its 3 files, such as vllm/_C.abi3.so; "
        "pip install --force-reinstall --no-deps vllm==0.26.0"
    ]


def test_the_metadata_is_missing(site: Site) -> None:
    folder = site("vllm", "0.26.0")
    (folder / "vllm-0.26.0.dist-info").rename(folder / "other")
    (problem,) = problems(folder)
    assert problem.startswith("vllm is a folder that no package manager knows; pip install --force-reinstall")


def test_a_requirement_is_missing(site: Site) -> None:
    assert problems(site("vllm", "0.26.0", "xgrammar>=0.1.30")) == [
        "vllm 0.26.0 needs xgrammar>=0.1.30, which is not installed; pip install 'xgrammar>=0.1.30'"
    ]


def test_another_torch_and_another_triton(site: Site) -> None:
    site("triton", "3.7.1")
    site("torch", "2.12.0", "triton==3.6.0")
    assert problems(site("vllm", "0.26.0", "torch==2.11.0")) == [
        "vllm 0.26.0 was built for torch==2.11.0, found 2.12.0; pip install 'torch==2.11.0'",
        "torch 2.12.0 was built for triton==3.6.0, found 3.7.1; pip install 'triton==3.6.0'",
    ]


def test_a_newer_helper_is_the_users_own_affair(site: Site) -> None:
    site("transformers", "9.0")
    assert problems(site("vllm", "0.26.0", "transformers<6")) == []


def test_two_engines_in_one_environment(site: Site) -> None:
    site("sglang", "0.5.23")
    (problem,) = problems(site("vllm", "0.33.0"))
    assert problem.startswith("vllm and sglang are in one environment")
    assert "pip uninstall sglang" in problem


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_here_all_is_well() -> None:
    assert installation.problems(VLLM) == []
