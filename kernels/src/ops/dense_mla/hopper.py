"""dense_mla on NVIDIA sm90: the portable function with sparse_mla's kernels of sm90."""

from __future__ import annotations

import functools

from ...runtime.aot import AotCase, Target
from ..sparse_mla import hopper as sparse
from . import triton as portable

dense_mla = functools.partial(portable.dense_mla, attend=sparse.attend)


def aot_cases(target: Target) -> list[AotCase]:
    return sparse.aot_cases(target, paged=True)
