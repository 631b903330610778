"""dense_mla on NVIDIA sm90: sparse_mla's kernels of sm90, led by the block table."""

from __future__ import annotations

import functools

from ...runtime.target import Target
from ..sparse_mla import hopper as sparse
from .common import dense_mla as dense_mla_by


def supports(target: Target) -> bool:
    return target.name == "sm90"


dense_mla = functools.partial(dense_mla_by, sparse.attend)
