"""Every environment variable of the plugin, read in one place."""

import os
from typing import Literal

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
Variant = Literal["v3.2", "speciale"]
_VARIANTS: dict[str, Variant | None] = {"": None, "v3.2": "v3.2", "speciale": "speciale"}


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return default
    if value in _TRUE | _FALSE:
        return value in _TRUE
    raise ValueError(f"{name}: expected one of 0, 1, false, true, no, yes, off, on; got {os.environ[name]!r}")


def plugin_enabled() -> bool:
    """`DSV32_PLUGIN` (default 1): 0 registers nothing, so that the engine runs its own code."""
    return _flag("DSV32_PLUGIN", True)


def allow_untested_engine() -> bool:
    """`DSV32_ALLOW_UNTESTED_ENGINE` (default 0): 1 starts on an engine version outside the tested range."""
    return _flag("DSV32_ALLOW_UNTESTED_ENGINE", False)


def allow_developer_role() -> bool:
    """`DSV32_ALLOW_DEVELOPER` (default 1): 0 refuses the developer messages of DeepSeek's search agent.

    Those are the ones with tools or a response format of their own, and all where no message is a user's. Others are
    system messages.
    """
    return _flag("DSV32_ALLOW_DEVELOPER", True)


def batch_invariant() -> bool:
    """`DSV32_BATCH_INVARIANT` (default 0): 1 computes a row alike whatever else is in the batch."""
    return os.environ.get("DSV32_BATCH_INVARIANT") == "1"


def variant() -> Variant | None:
    """`DSV32_VARIANT` (default empty): v3.2 or speciale; empty takes it from the model's name."""
    value = os.environ.get("DSV32_VARIANT", "").strip().lower()
    if value not in _VARIANTS:
        raise ValueError(f"DSV32_VARIANT: expected v3.2 or speciale, got {value!r}")
    return _VARIANTS[value]


_READERS = {
    "DSV32_PLUGIN": plugin_enabled,
    "DSV32_ALLOW_UNTESTED_ENGINE": allow_untested_engine,
    "DSV32_ALLOW_DEVELOPER": allow_developer_role,
    "DSV32_VARIANT": variant,
}
_READ_ELSEWHERE = {"DSV32_KERNELS", "DSV32_BATCH_INVARIANT"}  # by the kernels, which know nothing of engines


def chosen() -> dict[str, str]:
    """Every DSV32_* variable of this environment."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("DSV32_")}


def problem(name: str) -> str | None:
    """Say what is wrong with a variable of `chosen`, or None."""
    if name in _READ_ELSEWHERE:
        return None
    if name not in _READERS:
        return f"{name}: expected one of {', '.join(sorted([*_READERS, *_READ_ELSEWHERE]))}; it has no effect"
    try:
        _READERS[name]()
    except ValueError as error:
        return str(error)
    return None
