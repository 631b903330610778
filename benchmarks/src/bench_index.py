"""index_logits, select_topk and index_topk beside vLLM's DeepGEMM and top-k kernels, at DeepSeek-V3.2's sizes."""

from __future__ import annotations

import functools

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import peers
from dsv32_plugin.benchmarks.clock import DEVICE
from dsv32_plugin.benchmarks.harness import Case, Work
from dsv32_plugin.kernels.cache_layout import INDEX_BYTES, index_scales_offset

HEADS, INDEX, TOPK, PAGE = 64, 128, 2048, 64
PAIR_FLOPS = 2 * HEADS * INDEX
"""Operations of one query token and one key."""
FP8_ERROR = 2.0**-10
"""Of the largest logit: Hopper's fp8 product keeps about 13 bits below the largest of the 32 terms of a step."""


def fp8(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(torch.float8_e4m3fn)


def index_cache(pages: int) -> torch.Tensor:
    cache = torch.empty(pages, PAGE * INDEX_BYTES, dtype=torch.uint8, device=DEVICE)
    begin = index_scales_offset(PAGE)
    cache[:, :begin] = fp8(pages, begin).view(torch.uint8)
    cache[:, begin:].view(torch.float32).uniform_(0.5, 2.0)
    return cache.view(pages, PAGE, INDEX_BYTES)


def lengths(rows: int, length: int) -> torch.Tensor:
    return torch.full((rows,), length, dtype=torch.int32, device=DEVICE)


def block_table(sequences: int, length: int) -> torch.Tensor:
    return torch.randperm(sequences * length // PAGE, device=DEVICE).int().view(sequences, -1)


def scores(q_tid: torch.Tensor, weights_ti: torch.Tensor, k_sd: torch.Tensor, scale_s: torch.Tensor) -> torch.Tensor:
    """The definition in float64."""
    dots = torch.einsum("tid,sd->tis", q_tid.double(), k_sd.double()).relu()
    return torch.einsum("ti,tis->ts", weights_ti.double(), dots) * scale_s.double()


def assert_scores(got: torch.Tensor, exact: torch.Tensor) -> None:
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert error < FP8_ERROR, f"relative error {float(error):.2g}"


def exact_topk(logits_ts: torch.Tensor, end_t: torch.Tensor) -> torch.Tensor:
    """Ascending positions of the exact selection: a stable sort, which puts the lower of equals first."""
    outside = torch.arange(logits_ts.shape[1], device=DEVICE) >= end_t.unsqueeze(1)
    order = logits_ts.masked_fill(outside, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    return order[:, :TOPK].sort(1).values.int()


def paged(sequences: int, length: int, tokens: int) -> Work:
    cache, table = index_cache(sequences * length // PAGE), block_table(sequences, length)
    q, weights = fp8(sequences, tokens, HEADS, INDEX), torch.randn(sequences, tokens, HEADS, device=DEVICE)
    visible = lengths(sequences, length).unsqueeze(1).repeat(1, tokens)
    out = torch.empty(sequences, tokens, length, device=DEVICE)
    ours = functools.partial(kernels.index_logits_paged, q, weights, cache, table, visible, max_visible=length, out=out)

    def check() -> None:
        out.fill_(float("nan"))
        ours()
        assert not out.isnan().any()
        keys, scale = kernels.gather_index_keys(
            cache, table[:1], torch.tensor([0, 4096], dtype=torch.int32, device=DEVICE), 4096
        )
        assert scale is not None
        assert_scores(out[0, :, :4096], scores(q[0], weights[0], keys.view(torch.float8_e4m3fn), scale))

    pairs = sequences * tokens * length
    moved = sequences * length * INDEX_BYTES + 4 * pairs + q.numel()
    work = Work(ours, check, bytes=moved, flops=PAIR_FLOPS * pairs, dtype="fp8")
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["vllm deepgemm"] = reason
        return work
    rows = sequences * tokens
    theirs = vllm.paged_logits(lengths(rows, length), table.repeat_interleave(tokens, 0), length)
    flat_q, flat_weights = q.view(rows, 1, HEADS, INDEX), weights.view(rows, HEADS)
    work.peers["vllm deepgemm"] = lambda: theirs(flat_q, flat_weights, cache)
    work.peer_checks["vllm deepgemm"] = lambda: assert_scores(
        theirs(flat_q, flat_weights, cache)[:, :length], out.view(rows, length).double()
    )
    work.notes = "theirs: every query token a sequence of its own" if tokens > 1 else ""
    return work


def select(rows: int, length: int) -> Work:
    logits, end, table = torch.randn(rows, length, device=DEVICE), lengths(rows, length), block_table(rows, length)
    out = torch.empty(rows, TOPK, dtype=torch.int32, device=DEVICE)
    ours = functools.partial(
        kernels.select_topk, logits, None, end, TOPK, block_table_bp=table, page_size=PAGE, out=out
    )

    def check() -> None:
        out.fill_(-7)
        ours()
        position = exact_topk(logits, end).long()
        slots = table.gather(1, position // PAGE) * PAGE + position % PAGE
        assert torch.equal(out, slots.int()), "another selection"

    moved = 4 * rows * (length + TOPK + length // PAGE)
    work = Work(ours, check, bytes=moved)
    work.peers["torch.topk, positions only"] = lambda: torch.topk(logits, TOPK, dim=1)  # right by definition
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["vllm top-k and index conversion"] = reason
        return work
    convert = vllm.slots(torch.arange(rows, dtype=torch.int32, device=DEVICE), table, HEADS)

    def add(name: str) -> None:
        choose = vllm.select(rows, TOPK, length, name)

        def peer_check() -> None:
            assert torch.equal(convert(choose(logits, end)).sort(1).values, out.sort(1).values), "another selection"

        peer = f"vllm {name} top-k and index conversion"
        work.peers[peer], work.peer_checks[peer] = lambda: convert(choose(logits, end)), peer_check

    for name in vllm.selections(rows):
        add(name)
    return work


class Prefill:
    """The last T tokens of a sequence of L: queries, keys, and the ranges that a causal mask leaves."""

    def __init__(self, tokens: int, length: int) -> None:
        self.q, self.weights = fp8(tokens, HEADS, INDEX), torch.randn(tokens, HEADS, device=DEVICE)
        self.keys, self.scale = fp8(length, INDEX), torch.rand(length, device=DEVICE) + 0.5
        self.start = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
        self.end = torch.arange(length - tokens + 1, length + 1, dtype=torch.int32, device=DEVICE)
        self.pairs = tokens * (length - tokens) + tokens * (tokens + 1) // 2
        self.arguments = (self.q, self.weights, self.keys, self.scale, self.start, self.end)
        self.input_bytes = self.q.numel() + 4 * self.weights.numel() + length * INDEX_BYTES

    def exact(self, rows: slice) -> torch.Tensor:
        return scores(self.q[rows], self.weights[rows], self.keys, self.scale)


def ragged(tokens: int, length: int) -> Work:
    data = Prefill(tokens, length)
    out = torch.empty(tokens, length, device=DEVICE)
    ours = functools.partial(kernels.index_logits_ragged, *data.arguments, out=out)

    def check() -> None:
        out.fill_(float("nan"))
        ours()
        last = slice(tokens - 2, tokens)
        assert_scores(out[-1:], data.exact(last)[-1:])
        assert out[0, data.end[0] :].isinf().all(), "not filled"

    moved = data.input_bytes + 4 * out.numel()
    work = Work(ours, check, bytes=moved, flops=PAIR_FLOPS * data.pairs, dtype="fp8")
    work.notes = "ours fills what is not visible with -inf"
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["vllm deepgemm"] = reason
        return work
    theirs = functools.partial(vllm.ragged_logits, *data.arguments)

    def peer_check() -> None:
        logits = theirs()
        for row in (0, tokens - 1):
            visible = int(data.end[row])
            assert_scores(logits[row, :visible], out[row, :visible].double())

    work.peers["vllm deepgemm"], work.peer_checks["vllm deepgemm"] = theirs, peer_check
    return work


def scored_topk(tokens: int, length: int) -> Work:
    data = Prefill(tokens, length)
    out = torch.empty(tokens, TOPK, dtype=torch.int32, device=DEVICE)
    ours = functools.partial(kernels.index_topk_ragged, *data.arguments, TOPK, out=out)

    def check() -> None:
        out.fill_(-7)
        ours()
        for rows in (slice(0, 64), slice(tokens - 64, tokens)):
            part = (data.q[rows], data.weights[rows], data.keys, data.scale, data.start[rows], data.end[rows])
            logits = kernels.index_logits_ragged(*part)
            assert torch.equal(out[rows], exact_topk(logits, data.end[rows])), "another selection"

    moved = data.input_bytes + 4 * out.numel()
    work = Work(ours, check, bytes=moved, flops=PAIR_FLOPS * data.pairs, dtype="fp8")
    vllm, reason = peers.load()
    if vllm is None:
        work.missing["vllm deepgemm and top-k"] = reason
        return work
    ops, theirs = vllm.ops, torch.empty_like(out)

    def launch() -> None:
        logits = vllm.ragged_logits(*data.arguments)
        ops.top_k_per_row_prefill(logits, data.start, data.end, theirs, tokens, *logits.stride(), TOPK)

    def peer_check() -> None:
        launch()
        for row in (0, tokens // 2, tokens - 1):
            # Both round their scores, so that keys at the edge of the selection may differ.
            shared = torch.isin(theirs[row], out[row]).float().mean()
            assert shared > 0.98, f"shares {float(shared):.3f} of the selection"

    work.peers["vllm deepgemm and top-k"], work.peer_checks["vllm deepgemm and top-k"] = launch, peer_check
    work.notes = "theirs holds all scores at once"
    return work


def cases() -> list[Case]:
    rows = []
    for b, length in (
        (1, 8192),
        (1, 32768),
        (1, 131072),
        (16, 8192),
        (16, 32768),
        (16, 131072),
        (64, 8192),
        (64, 32768),
    ):
        rows.append(Case("select_topk", {"B": b, "L": length}, functools.partial(select, b, length)))
    rows.append(Case("select_topk", {"B": 128, "L": 8192}, functools.partial(select, 128, 8192)))
    for length in (32768, 131072):
        setup = functools.partial(scored_topk, 4096, length)
        rows.append(Case("index_topk_ragged", {"T": 4096, "L": length}, setup))
    for b, length in ((1, 131072), (16, 32768), (64, 32768), (128, 8192)):
        for tokens in (1, 4):
            setup = functools.partial(paged, b, length, tokens)
            rows.append(Case("index_logits_paged", {"B": b, "N": tokens, "L": length}, setup))
    rows.append(Case("index_logits_ragged", {"T": 4096, "L": 32768}, functools.partial(ragged, 4096, 32768)))
    return rows


def tiny_cases() -> list[Case]:
    return [
        Case("select_topk", {"B": 2, "L": 4096}, functools.partial(select, 2, 4096)),
        Case("index_topk_ragged", {"T": 4, "L": 4096}, functools.partial(scored_topk, 4, 4096)),
        Case("index_logits_paged", {"B": 1, "N": 2, "L": 4096}, functools.partial(paged, 1, 4096, 2)),
        Case("index_logits_ragged", {"T": 4, "L": 4096}, functools.partial(ragged, 4, 4096)),
    ]
