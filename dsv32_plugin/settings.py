"""Every environment variable of the plugin, read in one place, by the kernels too; knows neither torch nor engines."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = ("hopper", "triton", "reference")
"""Of the kernels, best first."""
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
    """`DSV32_ALLOW_UNTESTED_ENGINE` (default 0): 1 starts on any release, without looking further."""
    return _flag("DSV32_ALLOW_UNTESTED_ENGINE", False)


def admitted() -> list[str]:
    """`DSV32_ADMITTED` (set by the plugin): what the process that started this one has found right."""
    return os.environ.get("DSV32_ADMITTED", "").split()


def admit(check: str) -> None:
    """Tell the processes that this one will start."""
    os.environ["DSV32_ADMITTED"] = " ".join([*admitted(), check])


def cache_folder() -> Path:
    """`XDG_CACHE_HOME` (default ~/.cache): where the plugin keeps what it may lose."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv32"


def allow_developer_role() -> bool:
    """`DSV32_ALLOW_DEVELOPER` (default 1): 0 refuses the developer messages of DeepSeek's search agent.

    Those are the ones with tools or a response format of their own, and all where no message is a user's. Others are
    system messages.
    """
    return _flag("DSV32_ALLOW_DEVELOPER", True)


def trust_markup() -> bool:
    """`DSV32_TRUST_MARKUP` (default 0): 1 lets content spell control tokens, as DeepSeek's own code does."""
    return _flag("DSV32_TRUST_MARKUP", False)


def batch_invariant() -> bool:
    """`DSV32_BATCH_INVARIANT` (default 0): 1 computes a row alike whatever else is in the batch."""
    return _flag("DSV32_BATCH_INVARIANT", False)


def masked_prefill() -> bool | None:
    """`DSV32_MASKED_PREFILL` (default empty): prefills under a mask wherever it fits (1), nowhere (0), if it pays."""
    name = "DSV32_MASKED_PREFILL"
    return _flag(name, False) if os.environ.get(name, "").strip() else None


def kernels() -> str | None:
    """`DSV32_KERNELS` (default empty): the implementation that every operation must run; empty takes the best."""
    value = os.environ.get("DSV32_KERNELS", "")
    if value and value not in IMPLEMENTATIONS:
        raise ValueError(f"DSV32_KERNELS: expected one of {', '.join(IMPLEMENTATIONS)}, got {value!r}")
    return value or None


def context() -> object:
    """`DSV32_CONTEXT` (default empty): a strategy's name, or its options in JSON, for conversations that grow."""
    from dsv32_plugin.parsers.context import read_strategy

    value = os.environ.get("DSV32_CONTEXT", "").strip()
    if not value:
        return None
    try:
        options = json.loads(value) if value.startswith("{") else value
        read_strategy(options)
    except ValueError as error:
        raise ValueError(f"DSV32_CONTEXT: {error}") from error
    return options


def variant() -> Variant | None:
    """`DSV32_VARIANT` (default empty): v3.2 or speciale; empty takes it from the model's name."""
    value = os.environ.get("DSV32_VARIANT", "").strip().lower()
    if value not in _VARIANTS:
        raise ValueError(f"DSV32_VARIANT: expected v3.2 or speciale, got {value!r}")
    return _VARIANTS[value]


_READERS: dict[str, Callable[[], object]] = {
    "DSV32_PLUGIN": plugin_enabled,
    "DSV32_ADMITTED": admitted,
    "DSV32_ALLOW_UNTESTED_ENGINE": allow_untested_engine,
    "DSV32_ALLOW_DEVELOPER": allow_developer_role,
    "DSV32_BATCH_INVARIANT": batch_invariant,
    "DSV32_CONTEXT": context,
    "DSV32_KERNELS": kernels,
    "DSV32_MASKED_PREFILL": masked_prefill,
    "DSV32_TRUST_MARKUP": trust_markup,
    "DSV32_VARIANT": variant,
}


def check() -> None:
    """Raise ValueError for a value that no variable has; warn of variables that the plugin does not know."""
    for name in chosen():
        if name in _READERS:
            _READERS[name]()
        else:
            logger.warning("dsv32: %s", problem(name))


def chosen() -> dict[str, str]:
    """Every DSV32_* variable of this environment."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("DSV32_")}


def problem(name: str) -> str | None:
    """Say what is wrong with a variable of `chosen`, or None."""
    if name not in _READERS:
        return f"{name}: expected one of {', '.join(sorted(_READERS))}; it has no effect"
    try:
        _READERS[name]()
    except ValueError as error:
        return str(error)
    return None
