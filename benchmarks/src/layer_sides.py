"""One attention layer, three ways, on the same inputs: dense MLA, vLLM's sparse kernels, and ours.

A side is a list of stages in the order in which a layer runs them. Every side includes its projections as bfloat16
products of the real sizes. Left out on every side: the residual norm before the layer and what an engine builds once
a step for all layers (block tables, schedules).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import peers
from dsv32_plugin.benchmarks.clock import DEVICE
from dsv32_plugin.benchmarks.layer_record import ATTENTION, INDEXER, NORMS, PROJECTIONS, SCORES, SELECTION, UP
from dsv32_plugin.core import dsa
from dsv32_plugin.core import step as core_step
from dsv32_plugin.core.plan import Planner, gathered_keys
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import mixed_batch, uniform_decodes
from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.ops.select_topk.reference import positions_to_slots
from dsv32_plugin.kernels.ops.sparse_mla.reference import sparse_mla as attend_exactly
from dsv32_plugin.kernels.runtime.dispatch import force

Q_RANK, NOPE, VALUE, INDEX_HEADS, TOPK = 1536, 128, 128, 64, 2048
RANK, ROPE, INDEX_DIM, PAGE = layout.LATENT_RANK, layout.ROPE_DIM, layout.INDEX_DIM, layout.PAGE_SIZE
SCALE = (NOPE + ROPE) ** -0.5
EPS = 1e-6

LONGEST = 1 << 17
"""Tokens that the engine is started for: kernels that serve every length are compiled and captured for it."""
FP8_ERROR = 2.0**-10
"""Of the largest score: Hopper's fp8 product keeps about 13 bits below the largest of the 32 terms of a step."""
ATTENTION_ERROR = 0.01
"""Relative, of bfloat16 inputs and outputs with float32 accumulation."""


@dataclass(frozen=True)
class Step:
    """What the layer is asked: `sequences` of `length` tokens each, of which the last `new` are the step's."""

    sequences: int
    length: int
    new: int
    heads: int
    hidden: int = 7168

    @property
    def decode(self) -> bool:
        return self.new == 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.new


class Inputs:
    """Random activations and pages of one step. Sides copy what they overwrite."""

    def __init__(self, step: Step) -> None:
        self.step = step
        tokens, heads = step.tokens, step.heads
        pages = step.sequences * step.length // PAGE
        self.block_table = torch.randperm(pages, device=DEVICE).int().view(step.sequences, -1)
        last = torch.arange(step.length - step.new, step.length, device=DEVICE)
        self.positions = last.repeat(step.sequences)
        self.sequence = torch.arange(step.sequences, device=DEVICE).repeat_interleave(step.new)
        page = self.block_table[self.sequence, self.positions // PAGE].long()
        self.slots = page * PAGE + self.positions % PAGE
        frequency = 10000.0 ** (-torch.arange(0, ROPE, 2, device=DEVICE, dtype=torch.float64) / ROPE)
        angle = torch.arange(step.length, device=DEVICE, dtype=torch.float64)[:, None] * frequency
        self.rope_table = torch.cat((angle.cos(), angle.sin()), 1).float()
        self.q_a, self.kv_a, self.k_rope = normal(tokens, Q_RANK + RANK + ROPE).split((Q_RANK, RANK, ROPE), 1)
        self.index_k, self.index_weights = normal(tokens, INDEX_DIM + INDEX_HEADS).split((INDEX_DIM, INDEX_HEADS), 1)
        self.index_q = normal(tokens, INDEX_HEADS, INDEX_DIM)
        self.q_latent, self.q_rope = normal(tokens, heads, RANK), normal(tokens, heads, ROPE)
        self.q_weight, self.kv_weight = (torch.rand(n, device=DEVICE).bfloat16() for n in (Q_RANK, RANK))
        self.index_norm = torch.rand(INDEX_DIM, device=DEVICE), torch.rand(INDEX_DIM, device=DEVICE)

    def batch(self) -> core_step.Step:
        step = self.step
        visible = (self.positions + 1).int()
        if step.decode:
            return uniform_decodes(
                slots_t=self.slots, block_table_bp=self.block_table, seq_t=self.sequence.int(), visible_t=visible,
                max_visible=step.length, queries=1, longest=LONGEST,
            )  # fmt: skip
        starts = torch.arange(0, step.tokens + 1, step.new, dtype=torch.int32)
        lengths = torch.full((step.sequences,), step.length, dtype=torch.int32)
        gathered = gathered_keys(step.length, TOPK)
        return mixed_batch(
            slots_t=self.slots, block_table_bp=self.block_table, seq_lens_b=lengths.to(DEVICE),
            query_start_b1=starts.to(DEVICE), seq_lens_cpu_b=lengths, query_start_cpu_b1=starts,
            max_visible=step.length, num_decodes=0, longest=LONGEST, max_gathered_keys=gathered,
        )  # fmt: skip


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


DISTINCT_PAGES = 1 << 11
"""So many pages are random, one sequence of 128K tokens; larger caches repeat them, which costs less than to draw."""


def repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.repeat(-(-count // len(rows)), *(1,) * (rows.dim() - 1))[:count].contiguous()


def latent_cache_fp8(pages: int) -> torch.Tensor:
    some = torch.empty(min(pages, DISTINCT_PAGES) * PAGE, layout.LATENT_BYTES_FP8, device=DEVICE, dtype=torch.uint8)
    values = (normal(len(some), RANK) * 64).clamp(-layout.FP8_MAX, layout.FP8_MAX)
    some[:, :RANK] = values.to(torch.float8_e4m3fn).view(torch.uint8)
    some[:, layout.LATENT_SCALES_OFFSET : layout.LATENT_ROPE_OFFSET].view(torch.float32).fill_(2.0**-6)
    some[:, layout.LATENT_ROPE_OFFSET :].view(torch.bfloat16).normal_()
    return repeated(some, pages * PAGE).view(pages, PAGE, -1)


def latent_cache_bf16(pages: int) -> torch.Tensor:
    return repeated(normal(min(pages, DISTINCT_PAGES) * PAGE, layout.LATENT_WIDTH), pages * PAGE).view(pages, PAGE, -1)


def index_cache_fp8(pages: int) -> torch.Tensor:
    some = torch.empty(min(pages, DISTINCT_PAGES), PAGE * layout.INDEX_BYTES, device=DEVICE, dtype=torch.uint8)
    begin = layout.index_scales_offset(PAGE)
    some[:, :begin] = normal(len(some), begin).to(torch.float8_e4m3fn).view(torch.uint8)
    some[:, begin:].view(torch.float32).uniform_(0.5, 2.0)
    return repeated(some, pages).view(pages, PAGE, layout.INDEX_BYTES)


class Projections:
    """The products around the operations, into buffers of their own: they cost what they cost whatever the data."""

    def __init__(self, step: Step, *, indexes: bool, selects: bool, absorbs: bool) -> None:
        shapes = [
            (step.hidden, Q_RANK + RANK + ROPE),
            (Q_RANK, step.heads * (NOPE + ROPE)),
            (step.heads * VALUE, step.hidden),
        ]
        if indexes:
            shapes.append((step.hidden, INDEX_DIM + (INDEX_HEADS if selects else 0)))
        if selects:
            shapes.append((Q_RANK, INDEX_HEADS * INDEX_DIM))
        self._products = [(normal(step.tokens, k), normal(k, n), normal(step.tokens, n)) for k, n in shapes]
        batched = [(NOPE, RANK), (RANK, VALUE)] if absorbs else []
        self._batched = [
            (normal(step.heads, step.tokens, k), normal(step.heads, k, n), normal(step.heads, step.tokens, n))
            for k, n in batched
        ]

    def run(self) -> None:
        for a, b, out in self._products:
            torch.mm(a, b, out=out)
        for a, b, out in self._batched:
            torch.bmm(a, b, out=out)


class Side:
    """One way to run the layer."""

    whose = ""
    """Whose kernels, for the record."""
    inputs: Inputs
    stages: list[tuple[str, Callable[[], None]]]
    """What a layer runs, in order."""

    def check(self) -> None:
        """Run the layer and raise AssertionError if the result of some sampled token is wrong."""
        for _, launch in self.stages:
            launch()
        inputs = self.inputs
        for token in sampled(inputs.step):
            self.check_token(token, inputs.block_table[inputs.sequence[token]], int(inputs.positions[token]) + 1)

    def check_token(self, token: int, table: torch.Tensor, visible: int) -> None:
        raise NotImplementedError


class Expansion:
    """The latents of one sequence as keys and values of every head, for attention that is not absorbed."""

    def __init__(self, step: Step) -> None:
        self.weight = normal(RANK, step.heads * (NOPE + VALUE)) * RANK**-0.5
        self._kv = normal(step.length, step.heads, NOPE + VALUE)
        self.k = normal(step.length, step.heads, NOPE + ROPE)
        self.v = self._kv[..., NOPE:]
        self.q_nope = normal(step.tokens, step.heads, NOPE)

    def run(self, rows: torch.Tensor) -> None:
        """rows [S, C + R] bfloat16."""
        torch.mm(rows[:, :RANK], self.weight, out=self._kv.view(len(rows), -1))
        self.k[..., :NOPE] = self._kv[..., :NOPE]
        self.k[..., NOPE:] = rows[:, None, RANK:]

    def check(self, q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, visible: int, out: torch.Tensor) -> None:
        """One token from the cache again, in float32 but for the rounding of keys and values."""
        lengths = torch.tensor([0, visible], dtype=torch.int32, device=DEVICE)
        with force("reference"):
            rows = kernels.gather_latents(cache, table.unsqueeze(0), lengths, visible, dtype=torch.bfloat16)
        wide = (rows[:, :RANK].float() @ self.weight.float()).bfloat16().view(visible, -1, NOPE + VALUE)
        scores = torch.einsum("hd,shd->hs", q[:, :NOPE].float(), wide[..., :NOPE].float())
        scores += q[:, NOPE:].float() @ rows[:, RANK:].float().T
        check_close(out, torch.einsum("hs,shv->hv", (scores * SCALE).softmax(1), wide[..., NOPE:].float()))


class Sparse(Side):
    """What both sparse sides keep for the check, and the check."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        step = inputs.step
        pages = step.sequences * step.length // PAGE
        self.latent, self.index = latent_cache_fp8(pages), index_cache_fp8(pages)
        self.q_a = normal(step.tokens, Q_RANK)
        self.index_q: torch.Tensor | None = None
        self.index_weights = self.q_rope = self.out = torch.empty(0)
        self.slots: torch.Tensor | None = None

    def check_token(self, token: int, table: torch.Tensor, visible: int) -> None:
        if self.slots is None:
            chosen = slots_of(table, visible)
        else:
            chosen = self.slots[token][self.slots[token] >= 0]
            self._check_selection(token, table, visible, chosen)
        check_attention(self.inputs.q_latent[token], self.q_rope[token], self.latent, chosen, self.out[token])

    def _check_selection(self, token: int, table: torch.Tensor, visible: int, chosen: torch.Tensor) -> None:
        assert chosen.unique().numel() == chosen.numel() == min(TOPK, visible), f"token {token}: not {TOPK} slots"
        assert self.index_q is not None
        lengths = torch.tensor([0, len(table) * PAGE], dtype=torch.int32, device=DEVICE)
        with force("reference"):
            keys, scale = kernels.gather_index_keys(self.index, table.unsqueeze(0), lengths, len(table) * PAGE)
        assert scale is not None
        dots = keys.view(torch.float8_e4m3fn).double() @ self.index_q[token].double().T
        scores = (dots.relu() @ self.index_weights[token].double()) * scale.double()
        slots = slots_of(table, visible)
        order = slots.argsort()
        mine = order[torch.searchsorted(slots[order], chosen.long())]
        assert torch.equal(slots[mine], chosen.long()), f"token {token}: a slot of another sequence"
        kth = scores[:visible].topk(min(TOPK, visible)).values[-1]
        error = FP8_ERROR * scores[:visible].abs().max()
        assert scores[mine].min() >= kth - 2 * error, f"token {token}: not the best {TOPK} keys"


class Ours(Sparse):
    """The operations as the adapters call them."""

    whose = "dsv32-plugin"

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        step = inputs.step
        self.batch = inputs.batch()
        planner = Planner(TOPK, step.heads, Policy.from_settings())
        self.plan = planner.plan(self.batch, self.latent.dtype, torch.bfloat16)
        self.selects, expands = self.plan.selects, isinstance(self.plan, dsa.Expanded)
        self.expansion = Expansion(step) if expands else None
        self.selected: torch.Tensor | None = None
        self.projections = Projections(step, indexes=True, selects=self.selects, absorbs=not expands)
        self.stages = [(PROJECTIONS, self.projections.run), (NORMS, self._norms)]
        if self.selects:
            self.selected = torch.empty(step.tokens, TOPK, dtype=torch.int32, device=DEVICE)
            self.stages += [(INDEXER, self._select), (ATTENTION, self._attend)]
        elif expands:
            self.stages += [(UP, self._expand), (ATTENTION, self._attend_expanded)]
        else:
            self.stages += [(ATTENTION, self._attend)]

    def _norms(self) -> None:
        i = self.inputs
        kernels.norm_rope_cache(
            i.q_a, i.kv_a, i.k_rope, i.index_k, i.positions, i.slots, i.rope_table, q_a_weight_l=i.q_weight,
            kv_a_weight_c=i.kv_weight, eps=EPS, latent_cache=self.latent, index_k_weight_d=i.index_norm[0],
            index_k_bias_d=i.index_norm[1], index_cache=self.index, rotate=True, out=self.q_a,
        )  # fmt: skip
        if self.selects:
            self.index_q, self.index_weights = kernels.index_query(
                i.index_q, i.index_weights, i.positions, i.rope_table, rotate=True, quantize=True
            )
        self.q_rope = kernels.rope_query(i.q_rope, i.positions, i.rope_table)

    def _select(self) -> None:
        assert self.index_q is not None
        assert self.selected is not None
        self.plan.select(self.index_q, self.index_weights, self.index, self.selected)

    def _attend(self) -> None:
        self.out = self.plan.over_latents(self.inputs.q_latent, self.q_rope, self.latent, self.selected, SCALE)

    def _expand(self) -> None:
        assert self.expansion is not None
        (chunk,) = self.batch.prefill_chunks
        rows = kernels.gather_latents(
            self.latent, chunk.block_table_bp, chunk.cu_seqlens_b1, chunk.total_keys, dtype=torch.bfloat16
        )
        self.expansion.run(rows)

    def _attend_expanded(self) -> None:
        assert self.expansion is not None
        (chunk,) = self.batch.prefill_chunks
        q = torch.cat((self.expansion.q_nope, self.q_rope), -1)
        self.out = kernels.masked_mha(q, self.expansion.k, self.expansion.v, chunk.start_t, chunk.end_t, SCALE)[0]

    def check_token(self, token: int, table: torch.Tensor, visible: int) -> None:
        if self.expansion is None:
            self.slots = self.selected
            if isinstance(self.plan, dsa.Staged) and self.selected is not None:
                (chunk,) = self.batch.prefill_chunks
                # One sequence: a slot of the copy is a position.
                self.slots = positions_to_slots(self.selected, self.inputs.block_table, chunk.seq_t, PAGE)
            super().check_token(token, table, visible)
        else:
            q = torch.cat((self.expansion.q_nope[token], self.q_rope[token]), -1)
            self.expansion.check(q, self.latent, table, visible, self.out[token])


class InTree(Sparse):
    """vLLM 0.26.0, `models/deepseek_v32/nvidia`, with its fp8_ds_mla cache."""

    whose = "vLLM's fused norms, DeepGEMM, top-k and FlashMLA sparse"

    def __init__(self, inputs: Inputs, vllm: peers.Vllm) -> None:
        super().__init__(inputs)
        i, step = inputs, inputs.step
        self.projections = Projections(step, indexes=True, selects=True, absorbs=True)
        self.positions = torch.empty(step.tokens, TOPK, dtype=torch.int32, device=DEVICE)
        weights = (i.q_weight, i.kv_weight, *i.index_norm)
        self._norm = vllm.norm_rope(
            i.q_a, i.kv_a, i.k_rope, i.index_k, i.positions, i.slots, i.rope_table, weights, self.latent, self.index,
            self.positions, self.q_a,
        )  # fmt: skip
        self._queries = vllm.queries(i.index_q, i.index_weights, i.q_latent, i.q_rope, i.positions, i.rope_table)
        self.stages = [(PROJECTIONS, self.projections.run), (NORMS, self._norms)]
        lengths = torch.full((step.sequences,), step.length, dtype=torch.int32, device=DEVICE)
        self._to_slots = vllm.slots(inputs.sequence.int(), i.block_table, step.heads)
        if step.decode:
            self._logits = vllm.paged_logits(lengths.unsqueeze(1), i.block_table, LONGEST)
            self._topk = vllm.select(step.tokens, TOPK, step.length)
            self._lengths = lengths.unsqueeze(1)
            self._attend_to = vllm.sparse_decode(step.heads, SCALE)
            self.stages += [(SCORES, self._score), (SELECTION, self._select), (ATTENTION, self._decode)]
        else:
            begin = torch.zeros(step.tokens, dtype=torch.int32, device=DEVICE)
            end = (i.positions + 1).int()
            self._select_ragged = vllm.ragged_select(i.block_table, lengths, self.index, begin, end, step.length)
            self._attend_to = vllm.sparse_prefill(step.heads, SCALE, i.block_table, step.length)
            self.stages += [(INDEXER, self._score_and_select), (ATTENTION, self._prefill)]

    def _norms(self) -> None:
        self._norm()
        self.index_q, self.index_weights, self.q_rope = self._queries()

    def _score(self) -> None:
        assert self.index_q is not None
        self._scores = self._logits(self.index_q.unsqueeze(1), self.index_weights, self.index)

    def _select(self) -> None:
        self.selected = self._topk(self._scores, self._lengths)

    def _decode(self) -> None:
        # Its backend turns positions into slots as a part of the attention.
        slots = self._to_slots(self.selected)
        self.out = self._attend_to(self.inputs.q_latent, self.q_rope, self.latent, slots)

    def _score_and_select(self) -> None:
        self.selected = self._select_ragged(self.index_q, self.index_weights, self.positions)

    def _prefill(self) -> None:
        self.out = self._attend_to(self.inputs.q_latent, self.q_rope, self.latent, self.selected)

    def check_token(self, token: int, table: torch.Tensor, visible: int) -> None:
        self.slots = self._to_slots(self.selected)
        super().check_token(token, table, visible)


class Dense(Side):
    """MLA over every key, in bfloat16: the kernels that vLLM takes on Hopper, or ours where vLLM is missing."""

    def __init__(self, inputs: Inputs, vllm: peers.Vllm | None) -> None:
        self.inputs = i = inputs
        step = inputs.step
        self.latent = latent_cache_bf16(step.sequences * step.length // PAGE)
        self.q_rope, self.k_rope = i.q_rope.clone(), i.k_rope.contiguous()
        self.out = torch.empty(0)
        self.expansion = Expansion(step) if vllm is not None and not step.decode else None
        self.projections = Projections(step, indexes=False, selects=False, absorbs=self.expansion is None)
        self.stages = [(PROJECTIONS, self.projections.run)]
        if vllm is None:
            self.whose = "dsv32-plugin's dense_mla"
            self.batch = i.batch()
            self.stages += [(NORMS, self._our_norms), (ATTENTION, self._our_attention)]
            return
        norms = vllm.dense_norm_rope(
            i.q_a, i.kv_a, self.k_rope, self.q_rope, i.positions, i.slots, i.rope_table, (i.q_weight, i.kv_weight),
            self.latent,
        )  # fmt: skip
        self.stages.append((NORMS, norms))
        if step.decode:
            self.whose = "vLLM's FlashAttention-3, absorbed"
            lengths = torch.full((step.sequences,), step.length, dtype=torch.int32, device=DEVICE)
            self._decode = vllm.dense_decode_fa3(i.block_table, lengths, step.length, SCALE)
            self.stages.append((ATTENTION, self._attend_latent))
        else:
            self.whose = "vLLM's FlashAttention-3"
            self._prefill = vllm.dense_prefill(step.tokens, step.length, SCALE)
            self.context = normal(step.length, layout.LATENT_WIDTH)
            self.stages += [(UP, self._expand), (ATTENTION, self._attend_expanded)]

    def _our_norms(self) -> None:
        i = self.inputs
        kernels.norm_rope_cache(
            i.q_a, i.kv_a, i.k_rope, None, i.positions, i.slots, i.rope_table, q_a_weight_l=i.q_weight,
            kv_a_weight_c=i.kv_weight, eps=EPS, latent_cache=self.latent,
        )  # fmt: skip
        self.q_rope = kernels.rope_query(i.q_rope, i.positions, i.rope_table)

    def _our_attention(self) -> None:
        self.out = dsa.Dense(self.batch).over_latents(self.inputs.q_latent, self.q_rope, self.latent, None, SCALE)

    def _expand(self) -> None:
        assert self.expansion is not None
        pages = self.context.view(-1, *self.latent.shape[1:])
        torch.index_select(self.latent, 0, self.inputs.block_table[0], out=pages)
        self.expansion.run(self.context)

    def _attend_expanded(self) -> None:
        assert self.expansion is not None
        q = torch.cat((self.expansion.q_nope, self.q_rope), -1)
        self.out = self._prefill(q, self.expansion.k, self.expansion.v)

    def _attend_latent(self) -> None:
        self.out = self._decode(self.inputs.q_latent, self.q_rope, self.latent)

    def check_token(self, token: int, table: torch.Tensor, visible: int) -> None:
        if self.expansion is None:
            slots = slots_of(table, visible)
            check_attention(self.inputs.q_latent[token], self.q_rope[token], self.latent, slots, self.out[token])
        else:
            q = torch.cat((self.expansion.q_nope[token], self.q_rope[token]), -1)
            self.expansion.check(q, self.latent, table, visible, self.out[token])


def sampled(step: Step) -> list[int]:
    return sorted({0, step.tokens // 2, step.tokens - 1})


def slots_of(table: torch.Tensor, visible: int) -> torch.Tensor:
    position = torch.arange(visible, device=DEVICE)
    return table[position // PAGE].long() * PAGE + position % PAGE


def check_attention(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
) -> None:
    want, _ = attend_exactly(q_latent[None].float(), q_rope[None].float(), cache, slots[None].int(), SCALE)
    check_close(out, want[0])


def check_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.float() - want).norm() / want.norm())
    assert error < ATTENTION_ERROR, f"attention: relative error {error:.4f}"


class Missing(Exception):
    """The kernels of a side are not installed."""


def build(name: str, inputs: Inputs) -> Side:
    """The side `name` on these inputs.

    Raises:
        Missing: its kernels are not installed; the message says why.
    """
    vllm, reason = peers.load()
    if name == "ours":
        return Ours(inputs)
    if name == "dense":
        return Dense(inputs, vllm)
    if vllm is None:
        raise Missing(reason)
    return InTree(inputs, vllm)
