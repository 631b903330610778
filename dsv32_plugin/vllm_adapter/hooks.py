"""Places in vLLM that no registry offers: how we get in, and what vLLM must have there."""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from dsv32_plugin.engines import VLLM
from dsv32_plugin.surface import first_of
from dsv32_plugin.vllm_adapter import upstream


class HookError(RuntimeError):
    """A place to hook into is gone, or takes other parameters."""


def at(place: str, around: Callable[..., Any]) -> None:
    """`hook` one of `upstream.PLACES`."""
    targets, parameters = upstream.PLACES[place]
    assert parameters is not None, "vLLM's classes are not replaced"
    hook(first_of(*targets), parameters, around)


def hook(target: str, parameters: tuple[str, ...], around: Callable[..., Any]) -> None:
    """Call `around(original, ...)` in the place of a function or method of vLLM, from now on; twice is once.

    Args:
        target: its dotted path.
        parameters: the names of its leading parameters that `around` counts on, `a|b` where releases name it otherwise;
            a class method's without its class.

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
    if not fits(found, parameters):
        raise HookError(_hook_problem(expected, f"({', '.join(found)})"))

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    hooked.around = around  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(hooked) if inspect.ismethod(original) else hooked)


def fits(found: Sequence[str], parameters: Sequence[str]) -> bool:
    """Whether these parameters of a function begin with those that we count on."""
    pairs = zip(parameters, found[: len(parameters)], strict=False)
    return len(found) >= len(parameters) and all(name in wanted.split("|") for wanted, name in pairs)


def _hook_problem(expected: str, found: str) -> str:

    return (
        f"vllm {upstream.ENGINE_VERSION}: expected {expected} to hook into, found {found}; "
        f"dsv32-plugin is written for vllm=={VLLM.install}: install that"
    )
