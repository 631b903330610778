"""index_topk on NVIDIA sm90: the scores of sm90 where their kernels take the cache, and the portable selection."""

from __future__ import annotations

import functools

from ...runtime.dispatch import first_that_suits
from ...runtime.target import Target
from ..index_logits import hopper as index_logits
from ..index_logits import triton as portable_logits
from ..select_topk import triton as select_topk
from . import common


def supports(target: Target) -> bool:
    return target.name == "sm90"


index_topk_paged = functools.partial(
    common.index_topk_paged,
    first_that_suits(index_logits.launch_paged, portable_logits.launch_paged),
    select_topk.launch,
)
launch_ragged = first_that_suits(index_logits.launch_ragged, portable_logits.launch_ragged)
index_topk_ragged = functools.partial(common.index_topk_ragged, launch_ragged, select_topk.launch)
index_mask_ragged = functools.partial(common.index_mask_ragged, launch_ragged, select_topk.launch)
