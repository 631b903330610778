"""norm_rope_cache and index_query beside vLLM's fused kernels of the same steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import peers
from dsv32_plugin.benchmarks.clock import DEVICE
from dsv32_plugin.benchmarks.harness import Case, Work
from dsv32_plugin.kernels.cache_layout import (
    INDEX_BYTES,
    LATENT_BYTES_FP8,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    LATENT_TILE,
)
from dsv32_plugin.kernels.runtime.dispatch import force

Q_WIDTH, RANK, ROPE, INDEX, HEADS, TOPK, PAGE = 1536, 512, 64, 128, 64, 2048, 64
POSITIONS = 1 << 17
BF16_ROUNDING = 2.0**-8
"""How far rounding to bfloat16 moves a value at most, relative to it."""


def rope_table() -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, ROPE, 2, device=DEVICE, dtype=torch.float64) / ROPE)
    angle = torch.arange(POSITIONS, device=DEVICE, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1).float()


def latents(cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latents of these slots as float32, how far rounding to e4m3 can have moved each, and the rope keys.

    Half a step of e4m3 is at most 2^-4 of a normal value and 2^-10 of the scale of a subnormal one.
    """
    rows = cache.view(-1, LATENT_BYTES_FP8)[slots]
    scales = rows[:, LATENT_SCALES_OFFSET:LATENT_ROPE_OFFSET].contiguous().view(torch.float32)
    scales = scales.repeat_interleave(LATENT_TILE, 1)
    values = rows[:, :RANK].contiguous().view(torch.float8_e4m3fn).float() * scales
    rounding = torch.maximum(values.abs() * 2**-4, scales * 2**-10)
    return values, rounding, rows[:, LATENT_ROPE_OFFSET:].contiguous().view(torch.bfloat16).float()


def norm_rope_cache(tokens: int) -> Work:
    fused = torch.randn(tokens, Q_WIDTH + RANK + ROPE, device=DEVICE).bfloat16()
    q_a, kv_a, k_pe = fused.split((Q_WIDTH, RANK, ROPE), 1)
    index_k = torch.randn(tokens, INDEX + HEADS, device=DEVICE).bfloat16()[:, :INDEX]
    positions = torch.randint(0, POSITIONS, (tokens,), device=DEVICE)
    pages = -(-tokens // PAGE) * 2
    slots = torch.randperm(pages * PAGE, device=DEVICE)[:tokens]
    table = rope_table()
    q_weight = torch.rand(Q_WIDTH, device=DEVICE).bfloat16()
    kv_weight = torch.rand(RANK, device=DEVICE).bfloat16()
    index_weight, index_bias = torch.rand(INDEX, device=DEVICE), torch.rand(INDEX, device=DEVICE)
    latent = torch.zeros(pages, PAGE, LATENT_BYTES_FP8, dtype=torch.uint8, device=DEVICE)
    index = torch.zeros(pages, PAGE, INDEX_BYTES, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(tokens, Q_WIDTH, dtype=torch.bfloat16, device=DEVICE)
    ours = functools.partial(
        kernels.norm_rope_cache, q_a, kv_a, k_pe, index_k, positions, slots, table, q_a_weight_l=q_weight,
        kv_a_weight_c=kv_weight, eps=1e-6, latent_cache=latent, index_k_weight_d=index_weight,
        index_k_bias_d=index_bias, index_cache=index, rotate=True, out=out,
    )  # fmt: skip

    def check() -> None:
        results = []
        for implementation in (None, "reference"):
            latent.zero_(), index.zero_(), out.fill_(float("nan"))
            if implementation is None:
                ours()
            else:
                with force(implementation):
                    ours()
            results.append((out.clone(), latent.clone(), index.clone()))
        got, expected = results
        torch.testing.assert_close(got[0], expected[0], rtol=2**-6, atol=1e-6)
        for mine, theirs in zip(got[1:], expected[1:], strict=True):
            # The two round in float32 at different places: a code in many goes to its neighbour.
            assert (mine != theirs).float().mean() < 0.002, "cache bytes differ"

    work = Work(ours, check, bytes=tokens * (2 * (2 * Q_WIDTH + RANK + ROPE + INDEX) + LATENT_BYTES_FP8 + INDEX_BYTES))
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["vllm fused_norm_rope"] = reason
        return work
    buffer = torch.empty(tokens, TOPK, dtype=torch.int32, device=DEVICE)
    their_latent, their_index, their_out = torch.zeros_like(latent), torch.zeros_like(index), torch.empty_like(out)
    weights = (q_weight, kv_weight, index_weight, index_bias)
    work.peers["vllm fused_norm_rope"] = vllm.norm_rope(
        q_a, kv_a, k_pe, index_k, positions, slots, table, weights, their_latent, their_index, buffer, their_out
    )

    def peer_check() -> None:
        torch.testing.assert_close(their_out, out, rtol=2**-6, atol=1e-6)
        want, rounding, want_rope = latents(latent, slots)
        got, their_rounding, got_rope = latents(their_latent, slots)
        # Ours is also rounded to bfloat16 before and after the weight, as in Hugging Face's model; theirs is not.
        twice_rounded = ((1 + BF16_ROUNDING) ** 2 - 1) * (got.abs() + their_rounding)
        assert ((got - want).abs() <= rounding + their_rounding + twice_rounded).all(), "other latents"
        torch.testing.assert_close(got_rope, want_rope, rtol=2 * BF16_ROUNDING, atol=1e-6)

    work.peer_checks["vllm fused_norm_rope"] = peer_check
    work.notes = "theirs fills the selection with -1 and does not rotate the index key"
    return work


def index_query(tokens: int) -> Work:
    q = torch.randn(tokens, HEADS, INDEX, device=DEVICE).bfloat16()
    weights = torch.randn(tokens, INDEX + HEADS, device=DEVICE).bfloat16()[:, INDEX:]
    positions = torch.randint(0, POSITIONS, (tokens,), device=DEVICE)
    table = rope_table()
    out = torch.empty(tokens, HEADS, INDEX, dtype=torch.float8_e4m3fn, device=DEVICE)
    weights_out = torch.empty(tokens, HEADS, device=DEVICE)
    ours = functools.partial(
        kernels.index_query, q, weights, positions, table, rotate=True, quantize=True, out=out, weights_out=weights_out
    )

    def check() -> None:
        weights_out.fill_(float("nan"))
        ours()
        with force("reference"):
            expected, expected_weights = kernels.index_query(q, weights, positions, table, rotate=True, quantize=True)
        differs = out.view(torch.uint8) != expected.view(torch.uint8)
        assert differs.float().mean() < 0.002, "codes differ"
        torch.testing.assert_close(weights_out, expected_weights, rtol=1e-6, atol=0)

    work = Work(ours, check, bytes=tokens * HEADS * (3 * INDEX + 6))
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["vllm fused_indexer_q_rope_quant"] = reason
        return work
    from vllm.model_executor.layers.sparse_attn_indexer import fused_indexer_q_rope_quant

    theirs = functools.partial(fused_indexer_q_rope_quant, positions, q, table, weights, INDEX**-0.5, HEADS**-0.5, True)

    def peer_check() -> None:
        with force("reference"):
            expected, expected_weights = kernels.index_query(q, weights, positions, table, rotate=False, quantize=True)
        codes, folded = theirs()
        want = expected.float() * expected_weights.unsqueeze(-1)
        got = codes.float() * folded.unsqueeze(-1)
        # Their scales may differ, and with them the rounding of every code.
        assert (got - want).norm() < 2**-4 * want.norm(), "other queries"

    work.peers["vllm fused_indexer_q_rope_quant"] = theirs
    work.peer_checks["vllm fused_indexer_q_rope_quant"] = peer_check
    work.notes = "theirs does not rotate"
    return work


def cases(sizes: Sequence[int] = (1, 16, 128, 4096)) -> list[Case]:
    rows = []
    for name, setup in (("norm_rope_cache", norm_rope_cache), ("index_query", index_query)):
        rows += [Case(name, {"T": tokens}, functools.partial(setup, tokens)) for tokens in sizes]
    return rows


def tiny_cases() -> list[Case]:
    return cases((3,))
