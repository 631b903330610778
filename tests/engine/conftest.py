"""Fixtures for tests that build a model in this process, as a process of the installed engine does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from checkpoints import SPEC, Build
from engines import installed

from dsv32_plugin.tools.tiny import TinySpec


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    with import_module(f"building_{installed().name}").builder() as build:
        yield build


@pytest.fixture
def damageable(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> Path:
    """The folder of a good checkpoint of `SPEC`, for one test alone."""
    return Path(shutil.copytree(checkpoint(SPEC), tmp_path / "model"))
