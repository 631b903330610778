"""The operations of DeepSeek Sparse Attention: torch and Triton only, never an engine.

`from dsv32_plugin.kernels import sparse_mla` is the way in. Importing this package alone imports nothing, not even
torch. An implementation is imported as `from dsv32_plugin.kernels.sparse_mla import reference`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dense_mla.api import dense_mla
    from .gather_cache.api import gather_index_keys, gather_latents
    from .index_logits.api import index_logits_paged, index_logits_ragged
    from .index_query.api import index_query
    from .index_topk.api import index_topk_paged, index_topk_ragged
    from .masked_mha.api import masked_mha
    from .norm_rope_cache.api import norm_rope_cache
    from .rope_query.api import rope_query
    from .select_topk.api import select_topk
    from .sparse_mla.api import sparse_mla

__all__ = [
    "dense_mla",
    "gather_index_keys",
    "gather_latents",
    "index_logits_paged",
    "index_logits_ragged",
    "index_query",
    "index_topk_paged",
    "index_topk_ragged",
    "masked_mha",
    "norm_rope_cache",
    "rope_query",
    "select_topk",
    "sparse_mla",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    folder = import_module(".dispatch", __name__).FOLDERS[name]
    function = getattr(import_module(f".{folder}.api", __name__), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Operations(ModuleType):
    """Keeps `kernels.sparse_mla` the function: importing the folder `sparse_mla` would bind its module to that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Operations
