"""Index logits and their top K on NVIDIA sm90: the portable chunks with the logits of sm90."""

from __future__ import annotations

import functools

from ...runtime.aot import AotCase, Target
from ..index_logits import hopper as index_logits
from . import triton as portable

index_topk_paged = functools.partial(portable.index_topk_paged, launch_logits=index_logits.launch_paged)
index_topk_ragged = functools.partial(portable.index_topk_ragged, launch_logits=index_logits.launch_ragged)


def aot_cases(target: Target) -> list[AotCase]:
    """The kernels of index_logits without fill; the selection's are in its own list."""
    return [case for case in index_logits.aot_cases(target) if not case.constexprs["FILL"]]
