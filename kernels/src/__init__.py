"""The operations of DeepSeek Sparse Attention: torch and Triton only, never an engine.

`from dsv32_plugin.kernels import sparse_mla` is the way in. Importing this package alone imports nothing, not even
torch. An implementation is imported as `from dsv32_plugin.kernels.ops.sparse_mla import reference`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .operations import FOLDERS

if TYPE_CHECKING:
    from .ops.dense_mla.api import dense_mla
    from .ops.gather_cache.api import gather_index_keys, gather_latents
    from .ops.index_logits.api import index_logits_paged, index_logits_ragged
    from .ops.index_query.api import index_query
    from .ops.index_topk.api import index_mask_ragged, index_topk_paged, index_topk_ragged
    from .ops.masked_mha.api import masked_mha
    from .ops.norm_rope_cache.api import norm_rope_cache
    from .ops.rope_query.api import rope_query
    from .ops.select_topk.api import select_mask, select_topk
    from .ops.sparse_mla.api import sparse_mla

__all__ = [
    "dense_mla",
    "gather_index_keys",
    "gather_latents",
    "index_logits_paged",
    "index_logits_ragged",
    "index_mask_ragged",
    "index_query",
    "index_topk_paged",
    "index_topk_ragged",
    "masked_mha",
    "norm_rope_cache",
    "rope_query",
    "select_mask",
    "select_topk",
    "sparse_mla",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(f".ops.{FOLDERS[name]}.api", __name__), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
