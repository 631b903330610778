"""Fixtures that every test file may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

# Before torch is imported: on a busy machine with few cores, OpenMP threads that spin while they wait make the many
# small operations of a tiny model 20 times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dsv32_plugin.tools import tiny
from dsv32_plugin.tools.tiny import TinySpec

with suppress(ImportError):  # a machine with a GPU may lack it
    from hypothesis import settings

    settings.register_profile("check", max_examples=15)  # of `make check`

# What drives the clients themselves has an environment and a configuration of its own: make test-clients.
collect_ignore = ["clients/live"]


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """A test begins and ends as if alone.

    An engine that is built in this process sets variables for its workers, and a library that another file imports
    keeps warnings back.
    """
    environment = dict(os.environ)
    logging.root.setLevel(logging.WARNING)
    yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinySpec], Path]:
    """`checkpoint(TinySpec(...))` is the folder of that checkpoint, written once in a session."""
    folder = tmp_path_factory.mktemp("checkpoints")
    written: dict[TinySpec, Path] = {}

    def get(spec: TinySpec) -> Path:
        if spec not in written:
            out = folder / f"{len(written)}"
            tiny.write(spec, out)
            written[spec] = out
        return written[spec]

    return get
