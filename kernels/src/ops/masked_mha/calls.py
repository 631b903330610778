"""What models launch of masked_mha: keys of 192 and values of 128 elements, whole and with a selection."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...runtime.calls import Call, Spill, empty

SPILLS: tuple[Spill, ...] = ()
TOKENS = 2048


def calls() -> Iterator[Call]:
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for heads in (16, 128):
            whole = {
                "q_thd": empty(TOKENS, heads, 192, dtype=dtype),
                "k_shd": empty(4096, heads, 192, dtype=dtype),
                "v_shv": empty(4096, heads, 128, dtype=dtype),
                "start_t": empty(TOKENS, dtype=torch.int32),
                "end_t": empty(TOKENS, dtype=torch.int32),
                "scale": 0.1,
            }
            yield Call(f"{kind}-{heads}heads", "masked_mha", whole)
            selected = {"selected_tk": empty(TOKENS, 2048, dtype=torch.int32)}
            yield Call(f"{kind}-{heads}heads-selected", "masked_mha", whole | selected)
