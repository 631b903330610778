"""EAGLE, as SGLang calls it, with our attention backend: SGLang's lists of backends for drafts are closed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin.sglang_adapter import guard

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import DraftBackendFactory, EagleDraftWorker

logger = logging.getLogger(__name__)


def create_decode_backend(original: Callable[[DraftBackendFactory], Any], factory: DraftBackendFactory) -> Any:
    """The draft model's own steps; there are none where one token is drafted, which comes with the last verdict."""
    from dsv32_plugin.sglang_adapter.backend import DraftSteps

    if not guard.is_our_draft(factory.draft_model_runner.model):
        return original(factory)
    if factory.speculative_num_steps <= 1:
        return None
    return DraftSteps(factory.draft_model_runner, factory.speculative_num_steps)


def create_draft_extend_backend(original: Callable[[DraftBackendFactory], Any], factory: DraftBackendFactory) -> Any:
    """The draft model over the tokens of a prefill, or of a verdict."""
    if not guard.is_our_draft(factory.draft_model_runner.model):
        return original(factory)
    return factory.draft_model_runner.attn_backend


def capture_graphs(original: Callable[[EagleDraftWorker], None], worker: EagleDraftWorker) -> None:
    """Goes around the method that captures the draft's own steps, and its run over a verdict for some backends only."""
    from dsv32_plugin.sglang_adapter.upstream import (
        Backend,
        EAGLEDraftCudaGraphRunner,
        EAGLEDraftExtendCudaGraphRunner,
        Phase,
        check_cuda_graph_backend,
    )

    if not guard.is_our_draft(worker.draft_runner.model):
        original(worker)
        return
    worker.cuda_graph_runner = worker.cuda_graph_runner_for_draft_extend = None
    if check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        return
    began = time.perf_counter()
    if worker.speculative_num_steps > 1:
        worker.cuda_graph_runner = EAGLEDraftCudaGraphRunner(worker)
    worker.cuda_graph_runner_for_draft_extend = EAGLEDraftExtendCudaGraphRunner(worker)
    logger.info("dsv32: CUDA graphs of the drafts captured in %.1f s", time.perf_counter() - began)
