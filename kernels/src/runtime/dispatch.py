"""Which implementation of an operation runs on a device: decided once, visible, and possible to force.

`reference` runs everywhere. Every other implementation is a file (or a folder) next to it that defines functions of the
operations' names and says which chips it is for:

    def supports(target: Target) -> bool: ...

`triton` is for every GPU that Triton compiles for, `hopper` for NVIDIA sm90. The best one that exists for the device is
taken. One that is for a chip may return NotImplemented for arguments that it was not written for, and then the next one
for the device runs. `with force("reference"):` or the environment variable DSV32_KERNELS (read when this
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
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, NamedTuple

import torch

from dsv32_plugin.settings import IMPLEMENTATIONS

from ..operations import FOLDERS
from .target import TARGETS, Target, target_of_device

VARIABLE = "DSV32_KERNELS"

NO_IMPLEMENTATIONS = {"api", "calls", "common"}
"""What a folder of an operation holds next to its implementations, each of which is a file or a folder."""

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
    return {operation: implementation_for(operation, device) for operation in FOLDERS}


def function_for(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs `operation` on `device`: the same signature, arguments already checked."""
    return _function(operation, device, _forced.get())


def first_that_suits(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls these in turn until one does not return NotImplemented."""
    if len(functions) == 1:
        return functions[0]

    def call(*arguments: Any, **named: Any) -> Any:
        for function in functions:
            result = function(*arguments, **named)
            if result is not NotImplemented:
                return result
        raise AssertionError(f"{functions[-1]} must take all arguments")

    return call


def named(operation: str, implementation: str) -> Callable[..., Any]:
    """The function that runs `operation` where `implementation` was chosen, for tests."""
    folder = FOLDERS[operation]
    rest = existing(folder)[existing(folder).index(implementation) :]
    names = [name for name in rest if name == implementation or name != "reference"]
    return first_that_suits(*(getattr(implementation_module(folder, name), operation) for name in names))


@cache
def existing(folder: str) -> tuple[str, ...]:
    """The implementations in a folder of ops/, best first."""
    package = import_module(f"dsv32_plugin.kernels.ops.{folder}")
    found = {module.name for module in iter_modules(package.__path__)}
    ranks = {name: rank for rank, name in enumerate(IMPLEMENTATIONS)}
    return tuple(sorted(found - NO_IMPLEMENTATIONS, key=lambda name: (ranks.get(name, -1), name)))


@cache
def implementation_module(folder: str, name: str) -> ModuleType:
    return import_module(f"dsv32_plugin.kernels.ops.{folder}.{name}")


def implementations(folder: str, target: Target) -> list[str]:
    """Those for GPUs that can be chosen on a chip, the most portable first."""
    names = [name for name in reversed(existing(folder)) if name != "reference"]
    return [name for name in names if implementation_module(folder, name).supports(target)]


@cache
def _function(operation: str, device: torch.device, forced: str | None) -> Callable[..., Any]:
    return named(operation, _choose(operation, device, forced).name)


@cache
def _choose(operation: str, device: torch.device, forced: str | None) -> Choice:
    if operation not in FOLDERS:
        raise ValueError(f"operation: expected one of {', '.join(FOLDERS)}, got {operation!r}")
    if forced is not None:
        return _choose_forced(operation, device, forced)
    obstacle = "nothing better exists"
    for name in existing(FOLDERS[operation]):
        hindrance = _hindrance(operation, name, device)
        if hindrance is None:
            reason = obstacle if name == "reference" else f"best implementation for {_describe(device)}"
            return Choice(name, reason)
        obstacle = hindrance
    raise AssertionError(f"{operation} has no reference")


def _choose_forced(operation: str, device: torch.device, forced: str) -> Choice:
    _check_name(forced, VARIABLE)
    found = existing(FOLDERS[operation])
    if forced not in found:
        only = ", ".join(reversed(found))
        raise ValueError(f"{operation}: has no {forced} implementation, only {only}; force one of these or none")
    hindrance = _hindrance(operation, forced, device)
    if hindrance is not None and not (forced == "triton" and _interpreted()):
        raise NotImplementedError(f"{operation}: {forced} was forced but {hindrance}; force reference or none")
    return Choice(forced, "forced")


def _check_name(implementation: str, source: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")


def _hindrance(operation: str, implementation: str, device: torch.device) -> str | None:
    """Why the implementation cannot run on the device, or None."""
    if implementation == "reference":
        return None
    if device.type == "cpu":
        return "the tensors are on the CPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    module = implementation_module(FOLDERS[operation], implementation)
    if not module.supports(_target(device)):
        chips = " or ".join(target.name for target in TARGETS.values() if module.supports(target))
        return f"{_describe(device)} is not {chips}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _target(device: torch.device) -> Target:
    if device.type == "cuda":
        return target_of_device(torch.cuda.current_device() if device.index is None else device.index)
    return Target(device.type, device.type, device.type, warp_size=0, shared_bytes=0, e4m3=False)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
