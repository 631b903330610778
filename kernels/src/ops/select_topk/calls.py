"""What models launch of select_topk: decodes, which want slots, and prefills, which want positions or slots."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...runtime.calls import Call, Spill, empty

SPILLS = (
    Spill(
        "select_rows", {"BITS": True}, 8, "a value or two once a row, of long rows, for four programs beside each other"
    ),
)
SHAPES = (
    ("short", 128, 8192, 2048, True),
    ("split2", 64, 32768, 2048, True),
    ("split4", 32, 32768, 2048, True),
    ("split8", 16, 32768, 2048, True),
    ("split8-long", 16, 131072, 2048, True),
    ("split16", 1, 32768, 2048, True),
    ("split32", 1, 131072, 2048, True),
    ("whole32k", 4096, 32768, 2048, False),
    ("whole128k", 4096, 131072, 2048, False),
    ("million", 256, 1 << 20, 2048, False),
    ("topk4096", 256, 131072, 4096, False),
)
"""Name, rows, width, topk, whether slots are resolved."""
UNALIGNED = ("short", "whole32k")
"""Of these also rows that do not begin at multiples of 16 bytes, as a caller's slice may."""


def calls() -> Iterator[Call]:
    for name, rows, width, topk, decode in SHAPES:
        end_t = empty(rows, dtype=torch.int32)
        arguments = {
            "logits_ts": empty(rows, width, dtype=torch.float32),
            "start_t": None if decode else empty(rows, dtype=torch.int32),
            "end_t": end_t,
            "topk": topk,
        }
        if decode:
            arguments |= {"block_table_bp": empty(rows, 128, dtype=torch.int32), "page_size": 64}
        yield Call(name, "select_topk", arguments)
        if not decode:
            yield Call(f"{name}-mask", "select_mask", arguments)
        if name in UNALIGNED:
            unaligned = empty(rows, width + 1, dtype=torch.float32)[:, :width]
            yield Call(f"{name}-unaligned", "select_topk", arguments | {"logits_ts": unaligned})
