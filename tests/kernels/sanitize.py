"""Launch every kernel once on small adversarial inputs (`cases.py`), for compute-sanitizer to watch.

What is computed is the tests' business: rows that must not be read hold NaN, indices that must not be followed are
invalid, and every tensor is an allocation of its own, so an access beside one is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import cases
from dsv32_plugin import kernels

BF16, FP8, FLOAT = torch.bfloat16, torch.uint8, torch.float32
LENGTHS = [130, 0, 67]

Launch = tuple[str, Callable[..., Any], dict[str, Any]]


def launches() -> Iterator[Launch]:
    """(what, operation, arguments on the CPU)."""
    for dtype in (FP8, BF16):
        yield from of_cache(dtype)
    for tokens in (1, 2, 5):
        inputs = cases.index_logits_paged_inputs(LENGTHS, tokens, 64, page_padding=64, max_visible=150)
        yield f"paged logits, {tokens} tokens", kernels.index_logits_paged, inputs
    ragged = cases.index_logits_ragged_inputs([70, 0, 41], [9, 0, 13], 64)
    yield "ragged logits", kernels.index_logits_ragged, ragged
    chunked = {**ragged, "topk": 16, "workspace_bytes": 4 * 112 * 8}
    yield "logits and selection", kernels.index_topk_ragged, chunked
    yield "logits and mask", kernels.index_mask_ragged, chunked
    for kind in ("random", "all_zero"):
        for width, rows in ((3000, 2), (20001, 2), (20001, 70)):
            inputs = cases.select_topk_inputs(kind, rows, width, 2048, ranges="random", strided=True)
            yield f"selection of {kind}, {rows} x {width}", kernels.select_topk, inputs
            yield f"mask of {kind}, {rows} x {width}", kernels.select_mask, inputs
    kinds = ((BF16, FP8, 16), (BF16, BF16, 16), (BF16, FP8, 128), (BF16, BF16, 128), (FLOAT, FLOAT, 16))
    for dtype, cache_dtype, heads in kinds:
        types: dict[str, Any] = {"dtype": dtype, "cache_dtype": cache_dtype}
        what = f"{heads} heads, {cache_dtype}"
        yield f"sparse, {what}", kernels.sparse_mla, cases.sparse_mla_inputs(3, heads, 160, **types)
        yield f"dense, {what}", kernels.dense_mla, cases.dense_mla_inputs(LENGTHS, heads=heads, **types)
    for topk in (None, 16):
        for dim, value_dim in ((192, 128), (256, 256)):
            widths = {"head_dim": dim, "value_dim": value_dim}
            inputs = cases.masked_mha_inputs([270, 5], [140, 5], topk=topk, dtype=BF16, **widths)
            yield f"masked, {dim} and {value_dim} wide, topk {topk}", kernels.masked_mha, inputs


def of_cache(dtype: torch.dtype) -> Iterator[Launch]:
    quantize = dtype is FP8
    caches: dict[str, Any] = {"latent_dtype": dtype, "index_dtype": dtype, "rotate": quantize}
    yield f"cache, {dtype}", kernels.norm_rope_cache, cases.norm_rope_cache_inputs(5, dtype=BF16, **caches)
    query = cases.index_query_inputs(5, dtype=BF16, quantize=quantize, rotate=quantize)
    yield f"index query, {dtype}", kernels.index_query, query
    yield "query", kernels.rope_query, cases.rope_query_inputs(5, dtype=BF16)
    gather = cases.gather_inputs(LENGTHS, which="index", cache_dtype=dtype)
    yield f"gather, {dtype}", kernels.gather_index_keys, gather
    latents = cases.gather_inputs(LENGTHS, which="latent", cache_dtype=dtype)
    yield f"gather latents, {dtype}", kernels.gather_latents, {**latents, "dtype": BF16}


def main() -> None:
    begin = time.perf_counter()
    for what, operation, inputs in launches():
        operation(**cases.to(inputs, "cuda"))
        torch.cuda.synchronize()
        print(f"{time.perf_counter() - begin:6.1f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
