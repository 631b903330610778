"""index_topk on every GPU that Triton compiles for: the portable scores and selection."""

from __future__ import annotations

import functools

from ...runtime.target import Target
from ..index_logits import triton as index_logits
from ..select_topk import triton as select_topk
from . import common


def supports(target: Target) -> bool:
    return True


index_topk_paged = functools.partial(common.index_topk_paged, index_logits.launch_paged, select_topk.launch)
index_topk_ragged = functools.partial(common.index_topk_ragged, index_logits.launch_ragged, select_topk.launch)
index_mask_ragged = functools.partial(common.index_mask_ragged, index_logits.launch_ragged, select_topk.launch)
