"""What the implementations of index_logits for GPUs share."""

LEAST_TILES = 4
"""Tiles of keys that a program scores at least, to be worth the loading of the queries."""

RAGGED_CHUNK = 8192
"""Keys a program scores: short enough to balance causal rows, long enough to hide the loading of the queries."""

# The numbers that vary from launch to launch: Triton compiles one variant for all of their values.
RAGGED_SCALARS = ["num_tokens", "num_keys", "heads", "chunk", "out_stride"]
PAGED_SCALARS = ["tokens", "num_pages", "max_visible", "selected", "heads", "chunk", "table_width"]
PAGED_SCALARS += ["table_stride", "visible_stride", "out_stride_seq", "out_stride_token"]
