"""dense_mla on every GPU that Triton compiles for: sparse_mla's kernel, led by the block table."""

from __future__ import annotations

import functools

from ...runtime.target import Target
from ..sparse_mla import triton as sparse
from .common import dense_mla as dense_mla_by


def supports(target: Target) -> bool:
    return True


dense_mla = functools.partial(dense_mla_by, sparse.attend)
