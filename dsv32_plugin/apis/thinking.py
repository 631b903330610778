"""Whether a request asks the model to think. Each API has a switch of its own, and there are the engines'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv32_plugin.core.chat import template_switch

from .refusal import Refusal

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max")
"""Of `reasoning_effort`. The model knows no degrees: "none" is off, all others are on."""
SWITCHES = ("enabled", "disabled")
"""Of `thinking.type` in DeepSeek's API."""


def template_kwargs(body: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `chat_template_kwargs`; raises Refusal unless it is an object or nothing."""
    kwargs = body.get("chat_template_kwargs")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise Refusal(
            f"chat_template_kwargs: expected an object, got {type(kwargs).__name__}", param="chat_template_kwargs"
        )
    return dict(kwargs)


def requested(
    body: Mapping[str, Any], effort: Any, default: bool, switches: tuple[str, ...] = SWITCHES, name: str = ""
) -> bool:
    """The answer of the first of these that says anything: the engines' `chat_template_kwargs`, the API's `thinking`,
    its `effort` (called `name`), the server's `default`.

    Raises:
        Refusal: for a value that none of them has.
    """
    kwargs = template_kwargs(body)
    try:
        chosen = template_switch(kwargs)
    except ValueError as error:
        raise Refusal(str(error), param="chat_template_kwargs") from error
    by_type = _switch(body.get("thinking"), switches)
    by_effort = [_effort(effort, name), _effort(kwargs.get("reasoning_effort"), "reasoning_effort")]
    return next((asked for asked in (chosen, by_type, *by_effort) if asked is not None), default)


def _switch(thinking: Any, switches: tuple[str, ...]) -> bool | None:
    if thinking is None:
        return None
    kind = thinking.get("type") if isinstance(thinking, Mapping) else None
    if kind not in switches:
        expected = " or ".join(f'"{switch}"' for switch in switches)
        raise Refusal(f'thinking: expected {{"type": {expected}}}, got {thinking!r}', param="thinking")
    return kind != "disabled"


def _effort(effort: Any, name: str) -> bool | None:
    if effort is None:
        return None
    if effort not in EFFORTS:
        raise Refusal(f"{name}: expected one of {', '.join(EFFORTS)}, got {effort!r}", param=name)
    return bool(effort != "none")
