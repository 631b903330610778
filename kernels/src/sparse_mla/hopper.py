"""sparse_mla on NVIDIA sm90: up to 16 heads by cache, more in blocks of 64.

Measured on one H100 beside vLLM's best kernel for the case (medians, us, L = 32K, 2048 keys selected, L2 flushed before
each launch); vLLM has FA3 over bfloat16 and FlashMLA over fp8 rows:

    16 heads, fp8     B=1 12.6 (18.3), 8 16.6 (25.1), 16 21.1 (32.5), 64 47.1 (72.8), 128 77.8 (119); prefill of 4096
                      tokens 1707 (1819)
    16 heads, bf16    B=16 24.7 (32.5), 128 114 (123);                                   prefill 1512 (1879)
    128 heads, bf16   B=1 19.7 (24.2), 16 39.7 (47.3), 64 81.8 (87.8), 128 162 (171);    prefill 4780 (4186)
    128 heads, fp8    B=1 19.9 (22.9), 16 48.2 (46.8), 64 113 (87.0);                    prefill 6130 (3800)
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from ...cache_layout import PAGE_SIZE
from ..aot import AotCase, Target
from . import triton as portable
from .few_heads_bf16 import few_heads_bf16_kernel
from .few_heads_fp8 import HEADS as FEW_HEADS
from .few_heads_fp8 import MAX_REGISTERS, few_heads_fp8_kernel
from .many_heads import HEADS as MANY_HEADS
from .many_heads import many_heads_kernel

NUM_WARPS = 4
"""Of the program; many_heads_kernel starts eight more by itself."""

FEW_LEAST_CHUNK = 128
"""Keys that up to 16 heads need at least for a program to be worth it. B=8: chunks of 128 against 64, 20.2, 22.6 us."""


def sparse_mla(
    q_latent_thc: torch.Tensor,
    q_rope_thr: torch.Tensor,
    latent_cache: torch.Tensor,
    slots_tk: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    fp8 = latent_cache.dtype is torch.uint8
    known = q_latent_thc.dtype is torch.bfloat16 and (fp8 or latent_cache.dtype is torch.bfloat16)
    if not known or not _aligned(latent_cache):
        return portable.sparse_mla(q_latent_thc, q_rope_thr, latent_cache, slots_tk, scale, out=out, lse=lse)
    out, lse = portable.results(q_latent_thc, q_rope_thr, out, lse)
    tokens, heads, _ = q_latent_thc.shape
    num_keys = slots_tk.shape[1]
    page_size = latent_cache.shape[1]
    _, processors = portable.chip(q_latent_thc.device)
    head_blocks = _head_blocks(heads)
    # One program a multiprocessor. 16 heads, fp8, B=64: 47.1 us, with two 50.5; B=16: 21.1, 24.6.
    chunk = portable.choose_chunk(tokens * head_blocks, num_keys, processors)
    if heads <= FEW_HEADS.value:
        chunk = max(chunk, FEW_LEAST_CHUNK)
    crowded = portable.BATCH_INVARIANT or tokens * triton.cdiv(num_keys, chunk) > processors
    kernel, options = _choose(heads, fp8, crowded)

    def launch(rows: slice, part: torch.Tensor, part_lse: torch.Tensor, splits: int) -> None:
        kernel[((rows.stop - rows.start) * splits * head_blocks,)](
            q_latent_thc[rows],
            q_rope_thr[rows],
            latent_cache,
            slots_tk[rows],
            part,
            part_lse,
            *q_latent_thc.stride()[:2],
            *q_rope_thr.stride()[:2],
            latent_cache.stride(0),
            slots_tk.stride(0),
            *part.stride()[:2],
            latent_cache.shape[0] * page_size,
            num_keys,
            chunk,
            heads,
            0,
            scale * portable.LOG2E,
            SPLITS=splits,
            SCAN=_scan(chunk, num_keys),
            PAGE=page_size,
            num_warps=NUM_WARPS,
            **options,
        )

    portable.in_chunks(launch, out, lse, triton.cdiv(num_keys, chunk))
    return out, lse


def _head_blocks(heads: int) -> int:
    return 1 if heads <= FEW_HEADS.value else triton.cdiv(heads, MANY_HEADS.value)


def _choose(heads: int, fp8: bool, crowded: bool) -> tuple[Any, dict[str, Any]]:
    """(kernel, the arguments of its launch that not all kernels have).

    crowded: there are more programs than multiprocessors. Copying while computing then takes two programs; up to that
    number each has a multiprocessor and its memory for itself.
    16 heads, bf16: T=4096 1512 us, with two buffers 1919; B=128 119, 114; B=16 26.5, 24.7.
    """
    if heads > FEW_HEADS.value:
        return many_heads_kernel, {"HEAD_BLOCKS": _head_blocks(heads), "FP8": fp8}
    if fp8:
        return few_heads_fp8_kernel, {"maxnreg": MAX_REGISTERS}
    return few_heads_bf16_kernel, {"STAGES": 1 if crowded else 2}


def _scan(chunk: int, num_keys: int) -> int:
    return max(256, portable.scan_width(chunk, num_keys))


def _aligned(latent_cache: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as asynchronous copies need, and pages of 16 elements."""
    return latent_cache.data_ptr() % 16 == 0 and latent_cache.stride(0) % 16 == 0


def aot_cases(target: Target) -> list[AotCase]:
    """Every configuration that can be chosen on sm90, at the sizes of DeepSeek-V3.2."""
    if target.name != "sm90":
        return []
    found = []
    for splits, chunk in ((1, 2048), (2, 1024), (4, 512), (8, 256), (16, 128), (32, 64)):
        if chunk >= FEW_LEAST_CHUNK:
            found.append(_aot_case("few-heads-fp8", True, 16, splits, chunk))
            found.append(_aot_case("few-heads-bf16", False, 16, splits, chunk))
            found.append(_aot_case("few-heads-bf16-crowded", False, 16, splits, chunk, crowded=True))
        for heads in (64, 128):
            found.append(_aot_case("many-heads-fp8", True, heads, splits, chunk))
            found.append(_aot_case("many-heads-bf16", False, heads, splits, chunk))
    return found


def _aot_case(kind: str, fp8: bool, heads: int, splits: int, chunk: int, *, crowded: bool = False) -> AotCase:
    kernel, constexprs = _choose(heads, fp8, crowded)
    options = {"maxnreg": constexprs.pop("maxnreg")} if "maxnreg" in constexprs else {}
    signature = {
        "q_latent_ptr": "*bf16:16",
        "q_rope_ptr": "*bf16:16",
        "cache_ptr": "*u8:16" if fp8 else "*bf16:16",
        "index_ptr": "*i32:16",
        "out_ptr": "*bf16:16" if splits == 1 else "*fp32:16",
        "lse_ptr": "*fp32:16",
        **{name: "i32:16" for name in kernel.arg_names if name.startswith("stride_")},
        "num_slots": "i32",
        "num_keys": "i32",
        "chunk": "i32",
        "heads": "i32",
        "zero": "i32",
        "scale": "fp32",
    }
    return AotCase(
        f"{kind}-{heads}heads-{splits}splits",
        kernel,
        signature,
        {"SPLITS": splits, "SCAN": _scan(chunk, 2048), "PAGE": PAGE_SIZE, **constexprs},
        NUM_WARPS,
        options=options,
        spill_bytes=16 if fp8 else 0,
        spill_reason="a few addresses of the warps that fetch, once a step of 64 keys" if fp8 else "",
    )
