"""One layer's decode from the norms to the attention under one CUDA graph, beside vLLM's sequence of kernels.

The projections between the steps are the engine's on both sides and are left out; what is built once a step (vLLM's
two schedules) is outside the timing.
"""

from __future__ import annotations

import functools

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import peers
from dsv32_plugin.benchmarks.bench_cache import HEADS, INDEX, PAGE, POSITIONS, Q_WIDTH, RANK, ROPE, TOPK, rope_table
from dsv32_plugin.benchmarks.clock import DEVICE
from dsv32_plugin.benchmarks.harness import Case, Work
from dsv32_plugin.kernels.cache_layout import (
    INDEX_BYTES,
    LATENT_BYTES_FP8,
    LATENT_ROPE_OFFSET,
    LATENT_SCALES_OFFSET,
    index_scales_offset,
)
from dsv32_plugin.kernels.runtime.dispatch import force

SCALE = 0.135
FP8_ACCUMULATION = 2.0**-13
"""Hopper's matrix units add fp8 products with 13 bits after the point of the largest; both sides use them."""


class Decode:
    """B sequences of L tokens, each with one new token; the same inputs for both sides."""

    def __init__(self, batch: int, length: int, heads: int) -> None:
        self.batch, self.length, self.heads = batch, length, heads
        pages = batch * length // PAGE
        self.block_table = torch.randperm(pages, device=DEVICE).int().view(batch, -1)
        self.visible = torch.full((batch, 1), length, dtype=torch.int32, device=DEVICE)
        self.positions = torch.full((batch,), length - 1, device=DEVICE)
        self.slots = self.block_table[:, -1].long() * PAGE + PAGE - 1
        self.table = rope_table()
        fused = torch.randn(batch, Q_WIDTH + RANK + ROPE, device=DEVICE).bfloat16()
        self.q_a, self.kv_a, self.k_pe = fused.split((Q_WIDTH, RANK, ROPE), 1)
        narrow = torch.randn(batch, INDEX + HEADS, device=DEVICE).bfloat16()
        self.index_k, self.index_weights = narrow.split((INDEX, HEADS), 1)
        self.index_q = torch.randn(batch, HEADS, INDEX, device=DEVICE).bfloat16()
        self.q_latent = torch.randn(batch, heads, RANK, device=DEVICE).bfloat16()
        self.q_rope = torch.randn(batch, heads, ROPE, device=DEVICE).bfloat16()
        self.weights = tuple(torch.rand(n, device=DEVICE).bfloat16() for n in (Q_WIDTH, RANK))
        self.norms = torch.rand(INDEX, device=DEVICE), torch.rand(INDEX, device=DEVICE)
        self.latent, self.index = self._caches(pages)

    @staticmethod
    def _caches(pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randn(pages * PAGE, RANK, device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8)
        latent = torch.empty(pages * PAGE, LATENT_BYTES_FP8, dtype=torch.uint8, device=DEVICE)
        latent[:, :RANK] = codes
        latent[:, LATENT_SCALES_OFFSET:LATENT_ROPE_OFFSET].view(torch.float32).fill_(1.0)
        latent[:, LATENT_ROPE_OFFSET:].view(torch.bfloat16).normal_()
        index = torch.empty(pages, PAGE * INDEX_BYTES, dtype=torch.uint8, device=DEVICE)
        begin = index_scales_offset(PAGE)
        values = torch.randn(pages, PAGE * INDEX, device=DEVICE) * 64
        index[:, :begin] = values.to(torch.float8_e4m3fn).view(torch.uint8)
        index[:, begin:].view(torch.float32).fill_(2.0**-6)
        return latent.view(pages, PAGE, -1), index.view(pages, PAGE, INDEX_BYTES)


class Ours:
    """Six operations, each into tensors that exist before the capture."""

    def __init__(self, d: Decode) -> None:
        self.d = d
        batch, heads = d.batch, d.heads
        self.q_a = torch.empty(batch, Q_WIDTH, dtype=torch.bfloat16, device=DEVICE)
        self.index_q = torch.empty(batch, HEADS, INDEX, dtype=torch.float8_e4m3fn, device=DEVICE)
        self.index_weights = torch.empty(batch, HEADS, device=DEVICE)
        self.q_rope = torch.empty(batch, heads, ROPE, dtype=torch.bfloat16, device=DEVICE)
        self.logits = torch.empty(batch, 1, d.length, device=DEVICE)
        self.selected = torch.empty(batch, TOPK, dtype=torch.int32, device=DEVICE)
        self.out = torch.empty(batch, heads, RANK, dtype=torch.bfloat16, device=DEVICE)
        self.lse = torch.empty(batch, heads, device=DEVICE)

    def norm(self) -> None:
        d = self.d
        kernels.norm_rope_cache(
            d.q_a, d.kv_a, d.k_pe, d.index_k, d.positions, d.slots, d.table, q_a_weight_l=d.weights[0],
            kv_a_weight_c=d.weights[1], eps=1e-6, latent_cache=d.latent, index_k_weight_d=d.norms[0],
            index_k_bias_d=d.norms[1], index_cache=d.index, rotate=True, out=self.q_a,
        )  # fmt: skip

    def queries(self) -> None:
        d = self.d
        kernels.index_query(
            d.index_q, d.index_weights, d.positions, d.table, rotate=True, quantize=True, out=self.index_q,
            weights_out=self.index_weights,
        )  # fmt: skip
        kernels.rope_query(d.q_rope, d.positions, d.table, out=self.q_rope)

    def score(self) -> None:
        d = self.d
        kernels.index_logits_paged(
            self.index_q.unsqueeze(1), self.index_weights.unsqueeze(1), d.index, d.block_table, d.visible,
            max_visible=d.length, out=self.logits,
        )  # fmt: skip

    def select(self) -> None:
        d = self.d
        kernels.select_topk(
            self.logits.squeeze(1), None, d.visible.squeeze(1), TOPK, block_table_bp=d.block_table, page_size=PAGE,
            out=self.selected,
        )  # fmt: skip

    def attend(self) -> None:
        d = self.d
        kernels.sparse_mla(d.q_latent, self.q_rope, d.latent, self.selected, SCALE, out=self.out, lse=self.lse)

    def run(self) -> None:
        self.norm()
        self.queries()
        self.score()
        self.select()
        self.attend()

    def check(self) -> None:
        """Every step against the reference on the inputs that the step really had."""
        results = ("q_a", "index_q", "q_rope", "logits", "selected", "out")
        for name in results:
            getattr(self, name).view(torch.uint8).fill_(0xFF)
        self.run()
        got = {name: getattr(self, name).clone() for name in results}
        with force("reference"):
            self.norm()
            self.queries()
            self._same("q_a", got, 2**-6)
            self._same("q_rope", got, 2**-6)
            codes = self.index_q.view(torch.uint8) != got["index_q"].view(torch.uint8)
            assert codes.float().mean() < 0.002, "index query"
            self.index_q.copy_(got["index_q"])
            self.score()
            assert ((got["logits"] - self.logits).abs() <= FP8_ACCUMULATION * self._magnitudes()).all(), "logits"
            self.logits.copy_(got["logits"])
            self.select()
            assert torch.equal(got["selected"], self.selected), "selection"
            self.q_rope.copy_(got["q_rope"])
            self.attend()
            error = (got["out"].float() - self.out.float()).norm() / self.out.float().norm()
            assert error < 1e-2, f"attention: {error}"

    def _magnitudes(self) -> torch.Tensor:
        """The scores with every term positive: what the rounding of the accumulation is relative to."""
        d = self.d
        page_values = index_scales_offset(PAGE)
        index = d.index.view(len(d.index), -1).clone()
        index[:, :page_values] &= 0x7F
        query = (self.index_q.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn).unsqueeze(1)
        weights = self.index_weights.abs().unsqueeze(1)
        return kernels.index_logits_paged(
            query, weights, index.view(d.index.shape), d.block_table, d.visible, max_visible=d.length
        )

    def _same(self, name: str, got: dict[str, torch.Tensor], tolerance: float) -> None:
        torch.testing.assert_close(got[name], getattr(self, name), rtol=tolerance, atol=1e-5)


class Theirs:
    """vLLM 0.26.0, `models/deepseek_v32/nvidia`, FlashMLA sparse with an fp8 cache."""

    def __init__(self, d: Decode, vllm: peers.Vllm) -> None:
        self.d = d
        self.latent, self.index = d.latent.clone(), d.index.clone()
        q_a = torch.empty(d.batch, Q_WIDTH, dtype=torch.bfloat16, device=DEVICE)
        buffer = torch.empty(d.batch, TOPK, dtype=torch.int32, device=DEVICE)
        weights = (d.weights[0], d.weights[1], *d.norms)
        self.norm = vllm.norm_rope(
            d.q_a,
            d.kv_a,
            d.k_pe,
            d.index_k,
            d.positions,
            d.slots,
            d.table,
            weights,
            self.latent,
            self.index,
            buffer,
            q_a,
        )
        self.queries = vllm.queries(d.index_q, d.index_weights, d.q_latent, d.q_rope, d.positions, d.table)
        self.score = vllm.paged_logits(d.visible, d.block_table, d.length)
        self.select = vllm.select(d.batch, TOPK, d.length)
        self.slots = vllm.slots(torch.arange(d.batch, dtype=torch.int32, device=DEVICE), d.block_table, d.heads)
        self.attend = vllm.sparse_decode(d.heads, SCALE)

    def run(self) -> torch.Tensor:
        d = self.d
        self.norm()
        index_q, index_weights, q_rope = self.queries()
        logits = self.score(index_q.unsqueeze(1), index_weights, self.index)
        slots = self.slots(self.select(logits, d.visible))
        return self.attend(d.q_latent, q_rope, self.latent, slots)


def chain(batch: int, length: int, heads: int) -> Work:
    d = Decode(batch, length, heads)
    ours = Ours(d)
    read = length * INDEX_BYTES + TOPK * LATENT_BYTES_FP8 + 2 * heads * (2 * RANK + ROPE) + 2 * HEADS * INDEX
    work = Work(
        ours.run,
        ours.check,
        bytes=batch * read,
        flops=batch * 2 * (length * HEADS * INDEX + heads * TOPK * (2 * RANK + ROPE)),
        dtype="fp8",
        notes="theirs does not rotate the index query and key",
    )
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["vllm chain"] = reason
        return work
    theirs = Theirs(d, vllm)
    work.peers["vllm chain"] = theirs.run

    def peer_check() -> None:
        # It does not rotate, so that it selects other keys; its kernels are checked one by one elsewhere in the grid.
        assert theirs.run().isfinite().all()

    work.peer_checks["vllm chain"] = peer_check
    return work


def cases() -> list[Case]:
    assert POSITIONS >= 1 << 17
    shapes = [(b, 1 << 15, h) for h in (16, 128) for b in (1, 4, 16)] + [(1, 1 << 17, 16), (16, 1 << 17, 128)]
    return [
        Case("decode chain", {"B": b, "L": length, "H": h}, functools.partial(chain, b, length, h))
        for b, length, h in shapes
    ]


def tiny_cases() -> list[Case]:
    return [Case("decode chain", {"B": 1, "L": 4096, "H": 4}, functools.partial(chain, 1, 4096, 4))]
