"""What this adapter expects of vLLM, in one place: its version, and the functions to hook into."""

import functools
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from typing import Any

from dsv32_plugin import settings

TESTED_VERSION = "0.26.0"
"""The release every test runs against."""
OLDEST, NEWEST = (0, 26, 0), (0, 26)
"""Inclusive range of releases whose hooks this adapter was written for."""


def engine_version_problem(version: str) -> str | None:
    """Say why `version` of vLLM is outside the tested range, or None when it is inside."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match is None:
        return f"vllm: expected a release number such as {TESTED_VERSION}, got {version!r}"
    release = tuple(int(part or 0) for part in match.groups())
    if release >= OLDEST and release[: len(NEWEST)] <= NEWEST:
        return None
    return (
        f"vllm: dsv32-plugin is written for {TESTED_VERSION}, found {version}; "
        f"install vllm=={TESTED_VERSION}, or set DSV32_PLUGIN=0 to run vLLM's own code, "
        f"or set DSV32_ALLOW_UNTESTED_ENGINE=1 to try anyway"
    )


def check_engine_version() -> None:
    """Raise RuntimeError for an engine outside the tested range, unless the user has allowed it."""
    from vllm import __version__

    problem = engine_version_problem(__version__)
    if problem is None:
        return
    if not settings.allow_untested_engine():
        raise RuntimeError(problem)
    warnings.warn(problem, RuntimeWarning, stacklevel=2)


class HookError(RuntimeError):
    """A place to hook into is gone, or takes other parameters."""


def hook(target: str, parameters: tuple[str, ...], around: Callable[..., Any]) -> None:
    """Call `around(original, ...)` in the place of a function or method of vLLM, from now on; twice is once.

    Args:
        target: its dotted path.
        parameters: the names of its leading parameters that `around` counts on; a class method's without its class.

    Raises:
        HookError: vLLM has nothing there, or something that takes other parameters.
    """
    path, _, name = target.rpartition(".")
    expected = f"{target}({', '.join(parameters)}, ...)"
    try:
        owner = pkgutil.resolve_name(path)
        original = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise HookError(_hook_problem(expected, f"nothing ({error})")) from error
    if getattr(original, "around", None) is around:
        return
    found = tuple(inspect.signature(original).parameters)
    if found[: len(parameters)] != parameters:
        raise HookError(_hook_problem(expected, f"({', '.join(found)})"))

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    hooked.around = around  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(hooked) if inspect.ismethod(original) else hooked)


def _hook_problem(expected: str, found: str) -> str:
    from vllm import __version__

    return (
        f"vllm {__version__}: expected {expected} to hook into, found {found}; "
        f"dsv32-plugin is written for vllm=={TESTED_VERSION}: install that"
    )
