"""Sparse attention over the selected latents: decode and prefill, 16 heads (a rank of eight) and all 128."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import peers
from dsv32_plugin.benchmarks.clock import DEVICE
from dsv32_plugin.benchmarks.harness import Case, Work
from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.ops.sparse_mla.reference import sparse_mla as reference
from dsv32_plugin.kernels.runtime.dispatch import force, function_for

KEYS = 2048
PREFILL_TOKENS = 4096
SCALE = 192**-0.5


def random_cache(kind: str, slots: int) -> torch.Tensor:
    """Random latents: bfloat16, or fp8 codes (finite ones) with scales that are powers of two."""
    pages = slots // layout.PAGE_SIZE
    if kind == "bf16":
        shape = (pages, layout.PAGE_SIZE, layout.LATENT_WIDTH)
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    cache = torch.empty((pages, layout.PAGE_SIZE, layout.LATENT_BYTES_FP8), device=DEVICE, dtype=torch.uint8)
    shape = (pages, layout.PAGE_SIZE, layout.LATENT_RANK)
    values = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(100).clamp_(-layout.FP8_MAX, layout.FP8_MAX)
    cache[..., : layout.LATENT_RANK] = values.to(torch.float8_e4m3fn).view(torch.uint8)
    cache[..., layout.LATENT_SCALES_OFFSET : layout.LATENT_ROPE_OFFSET].view(torch.float32).fill_(2.0**-7)
    cache[..., layout.LATENT_ROPE_OFFSET :].view(torch.bfloat16).normal_()
    return cache


def widened(cache: torch.Tensor) -> torch.Tensor:
    """The same rows as bfloat16, exactly: for the peers that read no fp8."""
    if cache.dtype is torch.bfloat16:
        return cache
    wide = torch.empty((*cache.shape[:2], layout.LATENT_WIDTH), device=DEVICE, dtype=torch.bfloat16)
    codes = cache[..., : layout.LATENT_RANK].view(torch.float8_e4m3fn)
    scale = cache[:1, :1, layout.LATENT_SCALES_OFFSET : layout.LATENT_ROPE_OFFSET].view(torch.float32).flatten()[0]
    torch.mul(codes.to(torch.bfloat16), scale.bfloat16(), out=wide[..., : layout.LATENT_RANK])
    wide[..., layout.LATENT_RANK :] = cache[..., layout.LATENT_ROPE_OFFSET :].view(torch.bfloat16)
    return wide


def vllm_attention(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *, decode: bool
) -> dict[str, Callable[[], Any]]:
    """vLLM's sparse kernels alone: the query is concatenated and padded for them beforehand."""
    vllm, _ = peers.load()
    if vllm is None:
        return {}
    tokens, heads, rank = q_latent.shape
    padded = 64 if heads <= 64 else 128
    query = torch.zeros(tokens, padded, layout.LATENT_WIDTH, device=DEVICE, dtype=torch.bfloat16)
    query[:, :heads, :rank], query[:, :heads, rank:] = q_latent, q_rope
    found: dict[str, Callable[[], Any]] = {}
    flash = vllm.flashmla
    if decode and cache.dtype is torch.uint8:
        metadata, _ = flash.get_mla_metadata()
        found["FlashMLA fp8"] = lambda: flash.flash_mla_with_kvcache(
            query[:, None], cache.unsqueeze(2), None, None, rank, metadata, softmax_scale=SCALE, is_fp8_kvcache=True,
            indices=slots[:, None],
        )[0][:, 0, :heads]  # fmt: skip
    wide = widened(cache).view(-1, 1, layout.LATENT_WIDTH)
    if not decode:
        found["FlashMLA bf16"] = lambda: flash.flash_mla_sparse_fwd(query, wide, slots[:, None], SCALE)[0][:, :heads]

    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    starts = torch.arange(tokens + 1, device=DEVICE, dtype=torch.int32)
    used = torch.full((tokens,), KEYS, device=DEVICE, dtype=torch.int32)
    found["FA3 bf16"] = lambda: flash_attn_varlen_func(
        q=q_rope, k=wide[..., rank:].unsqueeze(1), v=wide[..., :rank].unsqueeze(1), q_v=q_latent, max_seqlen_q=1,
        cu_seqlens_q=starts, max_seqlen_k=KEYS, seqused_k=used, block_table=slots, softmax_scale=SCALE, causal=True,
        fa_version=3,
    )  # fmt: skip
    return found


def random_selection(tokens: int, length: int, first: torch.Tensor) -> torch.Tensor:
    """2048 of `length` positions in ascending order, from a different place of the cache for each of `first`."""
    distinct = min(tokens, 256)
    chosen = torch.rand(distinct, length, device=DEVICE).argsort(1)[:, :KEYS].sort(1).values
    chosen = chosen.repeat((tokens + distinct - 1) // distinct, 1)[:tokens]
    return (chosen + first[:, None]).int().contiguous()


def sparse(tokens: int, length: int, heads: int, kind: str, *, decode: bool, batch_invariant: bool = False) -> Work:
    """One layer: each token of a decode has its own sequence, those of a prefill share one.

    With `batch_invariant` it is split at the same keys whatever else is in the batch, next to the default split.
    """
    torch.manual_seed(0)
    cache = random_cache(kind, length * (tokens if decode else 1))
    first = torch.arange(tokens, device=DEVICE) * (length if decode else 0)
    slots = random_selection(tokens, length, first)
    q_latent = torch.randn(tokens, heads, layout.LATENT_RANK, device=DEVICE, dtype=torch.bfloat16)
    q_rope = torch.randn(tokens, heads, layout.ROPE_DIM, device=DEVICE, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q_latent), torch.empty(tokens, heads, device=DEVICE)
    kernel = function_for("sparse_mla", cache.device)
    copied = kind == "fp8" and not decode
    table = torch.arange(length // layout.PAGE_SIZE, dtype=torch.int32, device=DEVICE).unsqueeze(0)
    ends = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)

    def attend(batch_invariant: bool) -> None:
        rows = cache
        if copied:
            rows = kernels.gather_latents(cache, table, ends, length, dtype=q_latent.dtype)
            rows = rows.unflatten(0, (-1, layout.PAGE_SIZE))
        kernel(q_latent, q_rope, rows, slots, SCALE, batch_invariant=batch_invariant, out=out, lse=lse)

    ours = functools.partial(attend, batch_invariant)

    def check() -> None:
        out.fill_(float("nan"))
        ours()
        some = torch.linspace(0, tokens - 1, min(tokens, 8)).long().to(DEVICE)
        with force("reference"):
            want, want_lse = reference(q_latent[some].float(), q_rope[some].float(), cache, slots[some], SCALE)
        error = (out[some] - want).norm() / want.norm()
        assert error < 0.01, f"relative error {error:.4f}"
        assert (lse[some] - want_lse).abs().max() < 0.01
        assert out.isfinite().all()

    def agrees(launch: Callable[[], Any]) -> Callable[[], None]:
        def compare() -> None:
            error = (launch() - out).norm() / out.norm()
            assert error < 0.02, f"differs from ours by {error:.4f}"

        return compare

    notes = "ours: over a copy in bfloat16 that is made each time, as in a layer" if copied else ""
    rivals = {} if batch_invariant else vllm_attention(q_latent, q_rope, cache, slots, decode=decode)
    absent = {} if rivals or batch_invariant else dict.fromkeys(("FlashMLA sparse", "FA3 sparse"), peers.load()[1])
    row_bytes = cache.shape[2] * cache.element_size()
    rows = tokens * KEYS if decode else length
    results = out.numel() * 2 + lse.numel() * 4
    return Work(
        ours=ours,
        check=check,
        bytes=rows * row_bytes + slots.numel() * 4 + (q_latent.numel() + q_rope.numel()) * 2 + results,
        peers={"default split": functools.partial(attend, False)} if batch_invariant else rivals,
        peer_checks={name: agrees(launch) for name, launch in rivals.items()},
        missing=absent,
        flops=2 * tokens * heads * KEYS * (2 * layout.LATENT_RANK + layout.ROPE_DIM),
        notes=notes,
    )


def case(name: str, tokens: int, length: int, heads: int, kind: str) -> Case:
    decode = name == "sparse decode"
    shape: dict[str, int | str] = {"B" if decode else "T": tokens, "L": length, "H": heads, "cache": kind}
    return Case(name, shape, functools.partial(sparse, tokens, length, heads, kind, decode=decode))


def invariant(tokens: int, length: int, heads: int) -> Callable[[], Work]:
    return functools.partial(sparse, tokens, length, heads, "fp8", decode=True, batch_invariant=True)


def cases() -> list[Case]:
    found = []
    for heads, batches, kinds in ((16, (8, 16, 64, 128), ("fp8",)), (128, (1, 16, 64, 128), ("fp8", "bf16"))):
        for batch in batches:
            for kind in kinds:
                found.append(case("sparse decode", batch, 32768, heads, kind))
    for heads in (16, 128):
        for batch in (1, 8, 16, 64, 128):
            shape: dict[str, int | str] = {"B": batch, "L": 32768, "H": heads, "cache": "fp8"}
            found.append(Case("batch-invariant decode", shape, invariant(batch, 32768, heads)))
    for heads in (16, 128):
        for kind in ("fp8", "bf16"):
            found.append(case("sparse prefill", PREFILL_TOKENS, 32768, heads, kind))
    return found


def tiny_cases() -> list[Case]:
    found = [case("sparse decode", 2, 4096, 4, kind) for kind in ("fp8", "bf16")]
    return [*found, Case("batch-invariant decode", {"B": 2}, invariant(2, 4096, 4))]
