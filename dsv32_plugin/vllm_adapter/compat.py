"""What this adapter expects of vLLM's version, in one place."""

import re
import warnings

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
