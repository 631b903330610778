"""Updates of the weights: an error in one is answered, and the server goes on with the weights that it has.

SGLang lets an exception in a bucket end the scheduler, and goes back from a bad folder to that same folder. It empties
the cache after an update, finds only then that it cannot, and ends.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv32_plugin.sglang_adapter import guard, upstream

logger = logging.getLogger(__name__)

PARTS = {
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
    "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
}
"""Steps that load a part of a checkpoint, and what they answer."""
WAIT_FOR_ALL = {"update_weights_from_tensor", "update_weights_from_ipc"}
"""Those that end when all ranks have come to their end."""
_AS_BEFORE = "the weights are as before"
_UNFINISHED = (
    "the cache cannot be emptied while requests are unfinished: first /pause_generation with mode abort or retract, or "
    f"send flush_cache false; {_AS_BEFORE}"
)


def flush_around(original: Callable[..., Any], scheduler: Any, *args: Any, **options: Any) -> Any:
    """Goes around `Scheduler.flush_cache`: a request that /pause_generation has retracted holds nothing of the cache.

    Newer releases have it so; others count it as running, and no update could be whole until it ends.
    """
    waiting = scheduler.waiting_queue
    if not scheduler._engine_paused or any(_holds_cache(request) for request in waiting):
        return original(scheduler, *args, **options)
    scheduler.waiting_queue = []
    try:
        return original(scheduler, *args, **options)
    finally:
        scheduler.waiting_queue = waiting


def _holds_cache(request: Any) -> bool:
    # From 0.5.19 on its row is known to the part of it that holds it.
    holder = request if hasattr(request, "req_pool_idx") else request.kv
    return holder.req_pool_idx is not None


def _can_flush(manager: Any, recv_req: Any) -> bool:
    """Empties the cache before the update does it again, where it can."""
    return not recv_req.flush_cache or bool(manager.flush_cache())


def part_around(step: str) -> Callable[[Callable[..., Any], Any, Any], Any]:
    """Goes around one of `PARTS`: an exception is its answer."""

    def around(original: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
        try:
            # A distributed update has its senders wait for it.
            if step in WAIT_FOR_ALL and not _can_flush(manager, recv_req):
                raise RuntimeError(_UNFINISHED)
            return original(manager, recv_req)
        except Exception as error:
            logger.exception("dsv32: %s failed", step)
            if step in WAIT_FOR_ALL:
                torch.distributed.barrier(group=manager.tp_cpu_group)
            return _answer(PARTS[step], f"{type(error).__name__}: {error}")

    return around


update_weights_from_tensor_around, update_weights_from_distributed_around, update_weights_from_ipc_around = map(
    part_around, PARTS
)


def disk_around(original: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
    """Goes around `update_weights_from_disk`: the headers of the files are read before anything is loaded.

    What they do not show, such as a disk that fails, is met in the middle: then the folder before is loaded again.
    """
    runner = manager.tp_worker.model_runner
    if not guard.is_ours(runner.model):
        return original(manager, recv_req)
    loader, before = runner.model.loader, copy.copy(recv_req)
    before.model_path, before.load_format = runner.model_config.model_path, runner.load_config.load_format
    loaded = loader.tensors_loaded
    folder = Path(recv_req.model_path)
    try:
        if folder.is_dir():
            loader.check_folder(folder, drafts=manager.draft_worker is not None)
    except (ValueError, OSError) as error:
        return _refusal(f"{error}; {_AS_BEFORE}")
    if not _can_flush(manager, recv_req):
        return _refusal(_UNFINISHED)
    try:
        answer = original(manager, recv_req)
        if answer.success:
            return answer
        message = answer.message
    except Exception as error:
        logger.exception("dsv32: update_weights_from_disk failed")
        message = f"{type(error).__name__}: {error}"
    runner.model_config.model_path = before.model_path
    if loader.tensors_loaded == loaded:
        return _refusal(f"{message}; {_AS_BEFORE}")
    try:
        again = original(manager, before)
        outcome = f"{before.model_path} is loaded again" if again.success else again.message
    except Exception as error:
        outcome = f"and {before.model_path} could not be loaded again: {error}; load good weights"
    return _refusal(f"{message}; {outcome}")


def _refusal(message: str) -> Any:
    logger.error("dsv32: update_weights_from_disk: %s", message)
    return _answer("UpdateWeightFromDiskReqOutput", message)


def _answer(name: str, message: str) -> Any:
    return getattr(upstream, name)(success=False, message=message)
