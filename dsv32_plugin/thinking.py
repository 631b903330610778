"""Whether a request asks for thinking: what renders the prompt and what parses the answer must agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def thinking_requested(chat_template_kwargs: Mapping[str, Any] | None) -> bool:
    """`thinking` or `enable_thinking` of a request's `chat_template_kwargs`; off where neither is given.

    vLLM sets `enable_thinking` for requests with a `reasoning_effort`. An explicit `thinking` wins.
    """
    kwargs = chat_template_kwargs or {}
    thinking = kwargs.get("thinking")
    return bool(kwargs.get("enable_thinking") if thinking is None else thinking)
