"""Prompts that are token ids, before they reach a process of the model, which would end by a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin.sglang_adapter import MODELS, arguments

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


def validate_around(
    original: Callable[..., None], manager: TokenizerManager, request: Any, input_ids: list[int] | None
) -> None:
    """Raise ValueError, which SGLang answers with status 400, where it would or where an id is not the model's."""
    original(manager, request, input_ids)
    if not input_ids or arguments.architecture(manager.model_config) not in MODELS:
        return
    size = manager.model_config.vocab_size
    for extreme in (min(input_ids), max(input_ids)):
        if not 0 <= extreme < size:
            raise ValueError(f"input_ids: expected token ids from 0 to {size - 1}, got {extreme}")
