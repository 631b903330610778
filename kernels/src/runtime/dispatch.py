"""Which implementation of an operation runs on a device: decided once, visible, and possible to force.

`reference` runs everywhere, `triton` on every GPU that Triton compiles for, `hopper` on NVIDIA sm90. The best one that
exists for the device is taken. `with force("reference"):` or the environment variable DSV32_KERNELS (read when this
module is imported) takes that one instead, and then an operation that lacks it is an error, never another
implementation.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from dsv32_plugin.settings import IMPLEMENTATIONS

VARIABLE = "DSV32_KERNELS"

SUPPORT: dict[str, tuple[str, ...]] = {
    "norm_rope_cache": ("reference", "triton"),
    "index_query": ("reference", "triton"),
    "index_logits_paged": ("reference", "triton", "hopper"),
    "index_logits_ragged": ("reference", "triton", "hopper"),
    "gather_index_keys": ("reference", "triton"),
    "gather_latents": ("reference", "triton"),
    "rope_query": ("reference", "triton"),
    "select_topk": ("reference", "triton"),
    "index_topk_paged": ("reference", "triton", "hopper"),
    "index_topk_ragged": ("reference", "triton", "hopper"),
    "sparse_mla": ("reference", "triton", "hopper"),
    "dense_mla": ("reference", "triton", "hopper"),
    "masked_mha": ("reference", "triton"),
}
"""Operation -> the implementations that exist; `<folder>/<implementation>.py` defines a function of that name."""

FOLDERS: dict[str, str] = {operation: operation for operation in SUPPORT} | {
    "index_logits_paged": "index_logits",
    "index_logits_ragged": "index_logits",
    "gather_index_keys": "gather_cache",
    "gather_latents": "gather_cache",
    "index_topk_paged": "index_topk",
    "index_topk_ragged": "index_topk",
}
"""Operation -> the folder that holds it."""

_forced: ContextVar[str | None] = ContextVar("dsv32_kernels", default=os.environ.get(VARIABLE) or None)


class Choice(NamedTuple):
    """The implementation that runs, and why it was chosen, in words for a person."""

    name: str
    reason: str


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Run every operation inside the block with this implementation.

    Args:
        implementation: "reference", "triton" or "hopper".

    Raises:
        ValueError: not the name of an implementation.
    """
    _check_name(implementation, "implementation")
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def implementation_for(operation: str, device: torch.device | str) -> Choice:
    """The implementation that `operation` uses for tensors on `device`.

    Raises:
        ValueError: no such operation; or the forced implementation is unknown or does not exist for it.
        NotImplementedError: the forced implementation cannot run on this device.
    """
    return _choose(operation, torch.device(device), _forced.get())


def choices(device: torch.device | str) -> dict[str, Choice]:
    """Every operation with its choice on `device`, for the doctor."""
    return {operation: implementation_for(operation, device) for operation in SUPPORT}


def function_for(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs `operation` on `device`: the same signature, arguments already checked."""
    return _function(operation, device, _forced.get())


@cache
def _function(operation: str, device: torch.device, forced: str | None) -> Callable[..., Any]:
    name = _choose(operation, device, forced).name
    module = import_module(f"dsv32_plugin.kernels.ops.{FOLDERS[operation]}.{name}")
    function: Callable[..., Any] = getattr(module, operation)
    return function


@cache
def _choose(operation: str, device: torch.device, forced: str | None) -> Choice:
    if operation not in SUPPORT:
        raise ValueError(f"operation: expected one of {', '.join(SUPPORT)}, got {operation!r}")
    if forced is not None:
        return _choose_forced(operation, device, forced)
    obstacle = "nothing better exists"
    for name in IMPLEMENTATIONS:
        if name not in SUPPORT[operation]:
            continue
        hindrance = _hindrance(name, device)
        if hindrance is None:
            reason = obstacle if name == "reference" else f"best implementation for {_describe(device)}"
            return Choice(name, reason)
        obstacle = hindrance
    raise AssertionError(f"{operation} has no reference")


def _choose_forced(operation: str, device: torch.device, forced: str) -> Choice:
    _check_name(forced, VARIABLE)
    if forced not in SUPPORT[operation]:
        existing = ", ".join(SUPPORT[operation])
        raise ValueError(f"{operation}: has no {forced} implementation, only {existing}; force one of these or none")
    hindrance = _hindrance(forced, device)
    if hindrance is not None and not (forced == "triton" and _interpreted()):
        raise NotImplementedError(f"{operation}: {forced} was forced but {hindrance}; force reference or none")
    return Choice(forced, "forced")


def _check_name(implementation: str, source: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")


def _hindrance(implementation: str, device: torch.device) -> str | None:
    """Why the implementation cannot run on the device, or None."""
    if implementation == "reference":
        return None
    if device.type == "cpu":
        return "the tensors are on the CPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if implementation == "hopper" and not _is_hopper(device):
        return f"{_describe(device)} is not sm90"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
