"""The scripted model in SGLang: a plugin that gives every request a custom logit processor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from scripted_tokens import Script, Writer
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_server_args
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class ScriptedModel(CustomLogitProcessor):
    """Each row's next token is the next of its request's script."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        for row, params in zip(logits, custom_param_list or [], strict=True):
            params["script"].force(row, len(params["__req__"].output_ids))
        return logits


@cache
def _writer() -> Writer:
    return Writer(Path(get_server_args().model_path))


def _begin(init: Callable[..., None], self: Any, *args: Any, **options: Any) -> None:
    init(self, *args, **options)
    script: Script = _writer().script(list(self.origin_input_ids))
    self.sampling_params = copy.copy(self.sampling_params)
    self.sampling_params.custom_params = {"__req__": self, "script": script}
    self.custom_logit_processor = ScriptedModel.to_str()


def register() -> None:
    """Entry point `sglang.srt.plugins`; needs --enable-custom-logit-processor."""
    HookRegistry.register("sglang.srt.managers.schedule_batch.Req.__init__", _begin, HookType.AROUND)
