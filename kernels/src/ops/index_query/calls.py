"""What models launch of index_query: bfloat16 queries of 128 elements, head weights in bfloat16 or float32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ...runtime.calls import Call, Spill, empty

SPILLS: tuple[Spill, ...] = ()


def calls() -> Iterator[Call]:
    for quantize, interleaved, weights in itertools.product((True, False), (False, True), ("bf16", "fp32")):
        name = f"{'fp8' if quantize else 'bf16'}-weights-{weights}" + ("-interleaved" if interleaved else "")
        arguments = {
            "q_tid": empty(3, 64, 128),
            "weights_ti": empty(3, 64, dtype=torch.float32 if weights == "fp32" else torch.bfloat16),
            "positions_t": empty(3, dtype=torch.int64),
            "rope_table_pr": empty(4096, 64, dtype=torch.float32),
            "interleaved": interleaved,
            "rotate": quantize,
            "quantize": quantize,
        }
        yield Call(name, "index_query", arguments)
