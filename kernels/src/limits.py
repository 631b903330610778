"""What the operations can take, for those who must know before torch is imported."""

from typing import Final

MAX_TOPK: Final = 4096
"""Keys that `select_topk` can select for a query: a row's candidates are held in registers."""

MASK_BLOCK: Final = 128
"""Keys of a block of a mask."""


def mask_words(keys: int) -> int:
    """Words of 32 bits in a row of a mask, 4 for each block of keys.

    Key s is bit 2 * (s % 128 // 8) + s % 2 of word 4 * (s // 128) + s % 8 // 2: a word has what one lane of a matrix
    product has of a row.
    """
    return -(-keys // MASK_BLOCK) * 4
