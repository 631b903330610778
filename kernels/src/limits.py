"""What the operations can take, for those who must know before torch is imported."""

from typing import Final

MAX_TOPK: Final = 4096
"""Keys that `select_topk` can select for a query: a row's candidates are held in registers."""
