"""masked_mha on every GPU that Triton compiles for."""

from __future__ import annotations

from ...runtime.target import Target
from .common import masked_mha

__all__ = ["masked_mha", "supports"]


def supports(target: Target) -> bool:
    return True
