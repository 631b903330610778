"""The distribution holds every package of the checkout, and nothing that would shadow another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11")
ROOT = Path(__file__).parent.parent


def test_every_folder_of_python_is_a_listed_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for package, folder in setuptools["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert found == set(setuptools["packages"])


def test_only_our_own_name_is_a_package_at_the_top() -> None:
    assert [init.parent.name for init in ROOT.glob("*/__init__.py")] == ["dsv32_plugin"]


def test_importing_the_package_imports_no_engine_and_no_torch() -> None:
    program = "import dsv32_plugin, sys; print([m for m in ('torch', 'vllm', 'triton', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
