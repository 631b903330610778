"""What the user has decided and every step depends on: read from the environment once, and handed on."""

from __future__ import annotations

from dataclasses import dataclass

from dsv32_plugin import settings


@dataclass(frozen=True)
class Policy:
    """Decisions that hold as long as a process serves."""

    batch_invariant: bool = False
    """What a token gets does not depend on the others of its step."""

    @classmethod
    def from_settings(cls) -> Policy:
        return cls(batch_invariant=settings.batch_invariant())
