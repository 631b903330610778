"""The bytes of the two paged caches. The one place that knows an offset; standard library only.

A cache is a tensor `[num_pages, page_size, width]`. Inside a page it is contiguous; from one page to the next the
stride may be larger than a page. A *slot* is `page * page_size + offset`. The layouts are those that vLLM and SGLang
use for DeepSeek-V3.2, so that prefix caching, transfer between machines and offloading keep working.

latent cache, one row a token
    float   LATENT_RANK normalised latents | ROPE_DIM rotated rope key                       (float32 or bfloat16)
    fp8     LATENT_RANK e4m3 values | one float32 scale for each LATENT_TILE | ROPE_DIM bfloat16     (656 bytes, uint8)

index cache
    float   one row of INDEX_DIM a token                                                     (float32 or bfloat16)
    fp8     page_size rows of INDEX_DIM e4m3 values | page_size float32 scales  (132 bytes a token, by the page, uint8)

fp8 is e4m3fn, rounded to nearest even. A scale is a power of two: the smallest 2^n for which
max(amax, AMAX_FLOOR) <= FP8_MAX * 2^n.
"""

from typing import Final

PAGE_SIZE: Final = 64
"""Tokens a page on GPUs; the references take any multiple of PAGE_SIZE_MULTIPLE."""
PAGE_SIZE_MULTIPLE: Final = 16

LATENT_RANK: Final = 512
ROPE_DIM: Final = 64
LATENT_TILE: Final = 128
"""Latents that share one fp8 scale."""
LATENT_TILES: Final = LATENT_RANK // LATENT_TILE

SCALE_BYTES: Final = 4
"""A scale is a float32."""
ROPE_BYTES: Final = 2
"""One element of the rope key in an fp8 row is a bfloat16."""

LATENT_SCALES_OFFSET: Final = LATENT_RANK
"""Byte of an fp8 row at which its scales begin: 512."""
LATENT_ROPE_OFFSET: Final = LATENT_SCALES_OFFSET + LATENT_TILES * SCALE_BYTES
"""Byte of an fp8 row at which its rope key begins: 528."""
LATENT_BYTES_FP8: Final = LATENT_ROPE_OFFSET + ROPE_DIM * ROPE_BYTES
"""Bytes of an fp8 row: 656."""
LATENT_WIDTH: Final = LATENT_RANK + ROPE_DIM
"""Elements of a float row: 576."""

INDEX_DIM: Final = 128
INDEX_BYTES: Final = INDEX_DIM + SCALE_BYTES
"""Bytes a token in an fp8 index page: 132."""

FP8_MAX: Final = 448.0
"""Largest finite e4m3fn value."""
AMAX_FLOOR: Final = 1e-4
"""Lower bound of the absolute maximum from which a scale is taken."""


def index_scales_offset(page_size: int, index_dim: int = INDEX_DIM) -> int:
    """Byte of an fp8 index page at which its scales begin (its values come first)."""
    return page_size * index_dim
