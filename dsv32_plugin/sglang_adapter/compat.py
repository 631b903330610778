"""What this adapter expects of SGLang: its version, and the places that it hooks into."""

from __future__ import annotations

import inspect
import pkgutil
import re
import warnings

from dsv32_plugin import settings

TESTED_VERSION = "0.5.15.post1"
"""The release every test runs against."""
OLDEST, NEWEST = (0, 5, 15), (0, 5, 15)
"""Inclusive range of releases whose hooks this adapter was written for."""


def engine_version_problem(version: str) -> str | None:
    """Say why `version` of SGLang is outside the tested range, or None when it is inside."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match is None:
        return f"sglang: expected a release number such as {TESTED_VERSION}, got {version!r}"
    release = tuple(int(part or 0) for part in match.groups())
    if OLDEST <= release <= NEWEST:
        return None
    return (
        f"sglang: dsv32-plugin is written for {TESTED_VERSION}, found {version}; "
        f"install sglang=={TESTED_VERSION}, or set DSV32_PLUGIN=0 to run SGLang's own code, "
        f"or set DSV32_ALLOW_UNTESTED_ENGINE=1 to try anyway"
    )


def check_engine_version() -> None:
    """Raise RuntimeError for an engine outside the tested range, unless the user has allowed it."""
    problem = engine_version_problem(installed_version())
    if problem is None:
        return
    if not settings.allow_untested_engine():
        raise RuntimeError(problem)
    warnings.warn(problem, RuntimeWarning, stacklevel=2)


def installed_version() -> str:
    from sglang import __version__

    return str(__version__)


class HookError(RuntimeError):
    """A place to hook into is gone, or takes other parameters."""


def check_hook(target: str, parameters: tuple[str, ...] | None) -> None:
    """Raise HookError unless `target` exists and, where `parameters` says so, takes these first.

    Args:
        target: dotted path of a function, method or class.
        parameters: names of its leading parameters; None for a class that is replaced.
    """
    expected = "" if parameters is None else f"({', '.join(parameters)}, ...)"
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise HookError(_hook_problem(f"{target}{expected}", f"nothing ({error})")) from error
    if parameters is None:
        return
    names = tuple(inspect.signature(found).parameters)
    if names[: len(parameters)] != parameters:
        raise HookError(_hook_problem(f"{target}{expected}", f"({', '.join(names)})"))


def _hook_problem(expected: str, found: str) -> str:
    return (
        f"sglang {installed_version()}: expected {expected} to hook into, found {found}; "
        f"dsv32-plugin is written for sglang=={TESTED_VERSION}: install that"
    )
