"""The scripted model in vLLM: an installed logits processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from scripted_tokens import Script, Writer
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class ScriptedModel(LogitsProcessor):
    """Each row's next token is the next of its script."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._writer = Writer(Path(vllm_config.model_config.model))
        self._rows: dict[int, tuple[Script, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def begin(params: SamplingParams, prompt: list[int] | None, output: list[int]) -> tuple[Script, list[int]]:
            # The list is the request's own: it grows with its answer.
            return self._writer.script(prompt or []), output

        process_dict_updates(self._rows, batch_update, begin)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (script, output) in self._rows.items():
            script.force(logits[row], len(output))
        return logits
