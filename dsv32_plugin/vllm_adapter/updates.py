"""`reload_weights` from a folder: the headers of its files are read before vLLM takes the old weights away."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_plugin.engines import VLLM
from dsv32_plugin.vllm_adapter.upstream import PLACES, GPUModelRunner
from dsv32_plugin.vllm_adapter.weights import Loader

PARAMETERS = PLACES["GPUModelRunner.reload_weights"].parameters or ()


def check_folders() -> None:
    """Go around `GPUModelRunner.reload_weights`; raises RuntimeError where vLLM's is not as expected."""
    original = GPUModelRunner.reload_weights
    if hasattr(original, "__wrapped__"):
        return
    found = tuple(inspect.signature(original).parameters)
    if found[: len(PARAMETERS)] != PARAMETERS:
        raise RuntimeError(
            f"vllm: expected GPUModelRunner.reload_weights({', '.join(PARAMETERS)}, ...) to go around, found "
            f"({', '.join(found)}); dsv32-plugin is written for vllm=={VLLM.install}: install that"
        )
    GPUModelRunner.reload_weights = _around(original)


def _around(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def reload_weights(
        self: Any, weights_iterator: Any = None, weights_path: str | None = None, **options: Any
    ) -> None:
        loader, before = getattr(self.get_model(), "loader", None), self.model_config.model
        folder = Path(weights_path or before)
        if isinstance(loader, Loader) and weights_iterator is None and folder.is_dir():
            loader.checkpoint.check_folder(folder)
        try:
            original(self, weights_iterator, weights_path, **options)
        except BaseException:
            self.model_config.model = before
            raise

    return reload_weights
