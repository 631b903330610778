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
    records: bool = False
    """What layers select is told to who asks."""

    @property
    def keeps_slots(self) -> bool:
        """Whether what is selected must be slots of the cache: neither a mask nor slots of a copy."""
        return self.batch_invariant or self.records

    @classmethod
    def from_settings(cls, *, records: bool = False) -> Policy:
        policy = cls(settings.batch_invariant(), settings.masked_prefill(), records)
        if policy.keeps_slots and policy.masked_prefill:
            why = "DSV32_BATCH_INVARIANT=1" if policy.batch_invariant else "selections that are returned"
            raise ValueError(f"DSV32_MASKED_PREFILL: expected 0 or nothing with {why}, got 1; leave one of them out")
        return policy
