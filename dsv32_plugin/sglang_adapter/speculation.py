"""EAGLE, as SGLang calls it, with our attention backend: SGLang's lists of backends for drafts are closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv32_plugin.sglang_adapter import guard

if TYPE_CHECKING:
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker


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
    """SGLang captures the draft's own steps for every backend, and its run over a verdict for some."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
    from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import EAGLEDraftExtendCudaGraphRunner

    original(worker)
    if guard.is_our_draft(worker.draft_runner.model) and not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        worker.cuda_graph_runner_for_draft_extend = EAGLEDraftExtendCudaGraphRunner(worker)
