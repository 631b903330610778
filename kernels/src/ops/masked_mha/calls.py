"""What models launch of masked_mha: keys of 192 or 256 and values of 128 or 256 elements, whole and with a mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...runtime.calls import Call, Spill, empty

SPILLS = (
    Spill("mha", {"BLOCK_M": 16, "SELECTED": True}, 8, "an address or two of a block in float32"),
    Spill("mha", {"BLOCK_M": 128, "BLOCK_D": 256}, 168, "with Triton 3.8, of programs that seldom have anything to do"),
)
TOKENS = 2048
HEADS = 16
WIDTHS = (
    ("bf16", torch.bfloat16, 192, 128),
    ("bf16-wide", torch.bfloat16, 256, 256),
    ("fp32", torch.float32, 192, 128),
)


def calls() -> Iterator[Call]:
    for kind, dtype, dim, value_dim in WIDTHS:
        whole = {
            "q_thd": empty(TOKENS, HEADS, dim, dtype=dtype),
            "k_shd": empty(4096, HEADS, dim, dtype=dtype),
            "v_shv": empty(4096, HEADS, value_dim, dtype=dtype),
            "start_t": empty(TOKENS, dtype=torch.int32),
            "end_t": empty(TOKENS, dtype=torch.int32),
            "scale": 0.1,
        }
        yield Call(kind, "masked_mha", whole)
        yield Call(f"{kind}-mask", "masked_mha", whole | {"mask_tw": empty(TOKENS, 2048, dtype=torch.int32)})
