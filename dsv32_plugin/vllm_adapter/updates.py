"""`reload_weights` from a folder: the headers of its files are read before vLLM takes the old weights away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_plugin.vllm_adapter.weights import Loader


def reload_around(
    original: Callable[..., None],
    worker: Any,
    weights_iterator: Any = None,
    weights_path: str | None = None,
    *args: Any,
    **options: Any,
) -> None:
    """Raise what is wrong with the folder while the old weights serve; vLLM then knows the old folder again.

    Around the worker's, since its runner is one of two classes from vLLM 0.29 on.
    """
    runner = worker.model_runner
    loader, before = getattr(runner.get_model(), "loader", None), runner.model_config.model
    folder = Path(weights_path or before)
    if isinstance(loader, Loader) and weights_iterator is None and folder.is_dir():
        loader.checkpoint.check_folder(folder)
    try:
        original(worker, weights_iterator, weights_path, *args, **options)
    except BaseException:
        runner.model_config.model = before
        raise
