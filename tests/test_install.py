"""The wheel with each extra resolves in an empty environment, by pip and by uv, also with the oldest release.

`make` installs the extras whole, by uv; here it is only asked what would be installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import venv
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv32_plugin import __version__
from dsv32_plugin.engines import ENGINES

ROOT = Path(__file__).parent.parent
UV = shutil.which("uv", path=os.pathsep.join([str(ROOT / ".tools" / "bin"), os.environ["PATH"]]))
pytestmark = [pytest.mark.index, pytest.mark.skipif(UV is None, reason="needs uv")]
Versions = dict[str, str]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip alone, beside the wheel."""
    folder = tmp_path_factory.mktemp("install")
    venv.create(folder / "venv", with_pip=True)
    source = shutil.copytree(
        ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "results")
    )
    (source / "benchmarks" / "results").mkdir(exist_ok=True)
    subprocess.run([str(UV), "build", "--quiet", "--wheel", "--out-dir", str(folder), str(source)], check=True)
    return folder


def by_pip(folder: Path, extra: str) -> Versions:
    report = folder / f"{extra}.json"
    options = ["install", "--quiet", "--dry-run", "--report", str(report), f"{wheel(folder)}[{extra}]"]
    done = subprocess.run([str(python(folder)), "-m", "pip", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    chosen = (item["metadata"] for item in json.loads(report.read_text())["install"])
    return {item["name"].lower().replace("_", "-"): item["version"] for item in chosen}


def by_uv(folder: Path, extra: str, *wanted: str) -> Versions:
    options = ["pip", "install", "--dry-run", "--python", str(python(folder)), f"{wheel(folder)}[{extra}]", *wanted]
    done = subprocess.run([str(UV), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^ \+ ([\w-]+)==(\S+)", done.stderr, re.M))


def wheel(folder: Path) -> Path:
    (found,) = folder.glob("*.whl")
    assert f"-{__version__}-" in found.name
    return found


def python(folder: Path) -> Path:
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def pip(empty: Path) -> dict[str, Future[Versions]]:
    """Both at once: each takes minutes, most of them the index's."""
    pool = ThreadPoolExecutor(len(ENGINES))
    return {extra: pool.submit(by_pip, empty, extra) for extra in ENGINES}


@pytest.mark.parametrize("extra", ENGINES)
def test_it_resolves_to_a_release_of_the_range_or_a_newer_one(
    empty: Path, pip: dict[str, Future[Versions]], extra: str
) -> None:
    engine = ENGINES[extra]
    for chosen in (by_uv(empty, extra), pip[extra].result()):
        assert engine.version_problem(chosen[extra], "cuda") is None
        assert numbers(chosen[extra]) >= numbers(engine.releases[-1].name)
        assert {"torch", "triton", "packaging"} <= chosen.keys()
        if extra == "vllm":
            assert numbers(chosen["cuda-python"]) >= (13,), "12 overwrites files of cuda-bindings 13"


@pytest.mark.parametrize("at", [0, -1], ids=["oldest", "newest"])
@pytest.mark.parametrize("extra", ENGINES)
def test_it_resolves_with_both_ends_of_the_range(empty: Path, extra: str, at: int) -> None:
    name = ENGINES[extra].releases[at].name
    assert by_uv(empty, extra, f"{extra}=={name}")[extra] == name


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def test_the_extra_and_the_record_begin_at_the_same_release() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, engine in ENGINES.items():
        (least,) = (line.removeprefix(f"{extra}>=") for line in extras[extra] if line.startswith(extra))
        assert engine.releases[0].name.startswith(least), "no upper end, and the lower one of the record"
