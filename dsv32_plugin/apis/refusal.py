"""What a client is told that asks for what can't be done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refusal(ValueError):
    """What the client asks for can't be done.

    Attributes:
        param: the field of the request at fault.
        status: the HTTP status.
        code: OpenAI's name of the error, where it has one.
        details: what Anthropic's clients read of the error, where there is more than its type.
    """

    def __init__(
        self,
        reason: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.param = param
        self.status = status
        self.code = code
        self.details = details
