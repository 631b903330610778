"""What the user has decided and every step depends on: read from the environment once, and handed on."""

from __future__ import annotations

from dataclasses import dataclass

from dsv32_plugin import settings


@dataclass(frozen=True)
class Policy:
    """Decisions that hold as long as a process serves."""

    batch_invariant: bool = False
    """What a token gets does not depend on the others of its step."""
    masked_prefill: bool | None = None
    """Whether prefills are attended to under a mask: wherever it fits, nowhere, or where it is faster (None)."""

    @classmethod
    def from_settings(cls) -> Policy:
        policy = cls(settings.batch_invariant(), settings.masked_prefill())
        if policy.batch_invariant and policy.masked_prefill:
            raise ValueError(
                "DSV32_MASKED_PREFILL: expected 0 or nothing with DSV32_BATCH_INVARIANT=1, got 1; unset one of them"
            )
        return policy
