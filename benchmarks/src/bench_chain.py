"""One layer's decode from the norms to the attention under one CUDA graph, next to vLLM's sequence of kernels.

The products between the steps are the engine's on both sides and are given; what is built once a step (vLLM's two
schedules) is outside the timing.
"""

from __future__ import annotations

import functools

from dsv32_plugin.benchmarks.harness import Case, Work
from dsv32_plugin.benchmarks.layer_inputs import INDEX_DIM, INDEX_HEADS, RANK, ROPE, TOPK, Inputs, Step
from dsv32_plugin.benchmarks.layer_sides import Missing, build
from dsv32_plugin.kernels.cache_layout import INDEX_BYTES, LATENT_BYTES_FP8


def chain(batch: int, length: int, heads: int) -> Work:
    inputs = Inputs(Step(batch, length, 1, heads))
    ours = build("ours", inputs, products=False)
    read = length * INDEX_BYTES + TOPK * LATENT_BYTES_FP8 + 2 * heads * (2 * RANK + ROPE) + 2 * INDEX_HEADS * INDEX_DIM
    work = Work(
        ours.whole(),
        ours.check,
        bytes=batch * read,
        flops=batch * 2 * (length * INDEX_HEADS * INDEX_DIM + heads * TOPK * (2 * RANK + ROPE)),
        dtype="fp8",
        notes="theirs does not rotate the index query and key",
    )
    try:
        theirs = build("in-tree", inputs, products=False)
    except Missing as error:
        work.missing["vllm chain"] = str(error)
    else:
        work.peers["vllm chain"], work.peer_checks["vllm chain"] = theirs.whole(), theirs.check
    return work


def cases() -> list[Case]:
    shapes = [(b, 1 << 15, h) for h in (16, 128) for b in (1, 4, 16)] + [(1, 1 << 17, 16), (16, 1 << 17, 128)]
    return [
        Case("decode chain", {"B": b, "L": length, "H": h}, functools.partial(chain, b, length, h))
        for b, length, h in shapes
    ]


def tiny_cases() -> list[Case]:
    return [Case("decode chain", {"B": 1, "L": 4096, "H": 4}, functools.partial(chain, 1, 4096, 4))]
