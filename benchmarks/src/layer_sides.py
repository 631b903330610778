"""One attention layer, three ways, on the same inputs: dense MLA, vLLM's sparse kernels, and ours (`our_layer`).

A side is a list of stages in the order in which a layer runs them. Every side includes its projections as bfloat16
products of the real sizes. Left out on every side: the residual norm before the layer and what an engine builds once
a step for all layers (block tables, schedules).
"""

from __future__ import annotations

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import peers
from dsv32_plugin.benchmarks.clock import DEVICE
from dsv32_plugin.benchmarks.layer_inputs import (
    INDEX_DIM,
    INDEX_HEADS,
    LONGEST,
    NOPE,
    PAGE,
    Q_RANK,
    RANK,
    ROPE,
    SCALE,
    TOPK,
    VALUE,
    Inputs,
    Side,
    Step,
    check_attention,
    check_close,
    check_selection,
    index_cache_fp8,
    latent_cache_bf16,
    latent_cache_fp8,
    normal,
    slots_of,
)
from dsv32_plugin.benchmarks.layer_record import ATTENTION, INDEXER, NORMS, PROJECTIONS, SCORES, SELECTION, UP
from dsv32_plugin.benchmarks.our_layer import DenseLayer, OurLayer
from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.runtime.dispatch import force


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


class InTree(Side):
    """vLLM's `models/deepseek_v32`, with its fp8_ds_mla cache."""

    whose = "vLLM's fused norms, DeepGEMM, top-k and FlashMLA sparse"

    def __init__(self, inputs: Inputs, vllm: peers.Vllm, *, products: bool = True) -> None:
        self.inputs = i = inputs
        step = inputs.step
        pages = step.sequences * step.length // PAGE
        self.latent, self.index = latent_cache_fp8(pages), index_cache_fp8(pages)
        self.q_a = normal(step.tokens, Q_RANK)
        self.index_q = self.index_weights = self.q_rope = self.out = torch.empty(0)
        self.positions = torch.empty(step.tokens, TOPK, dtype=torch.int32, device=DEVICE)
        weights = (i.q_weight, i.kv_weight, *i.index_norm)
        self._norm = vllm.norm_rope(
            i.q_a, i.kv_a, i.k_rope, i.index_k, i.positions, i.slots, i.rope_table, weights, self.latent, self.index,
            self.positions, self.q_a,
        )  # fmt: skip
        self._queries = vllm.queries(i.index_q, i.index_weights, i.q_latent, i.q_rope, i.positions, i.rope_table)
        self.stages = [(NORMS, self._norms)]
        if products:
            projections = Projections(step, indexes=True, selects=True, absorbs=True)
            self.stages.insert(0, (PROJECTIONS, projections.run))
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
        slots = self._to_slots(self.selected)[token]
        chosen = slots[slots >= 0]
        query = self.index_q[token], self.index_weights[token]
        check_selection(f"token {token}", self.index, *query, table, visible, chosen)
        check_attention(self.inputs.q_latent[token], self.q_rope[token], self.latent, chosen, self.out[token])


class Dense(Side):
    """MLA over every key, in bfloat16: the kernels that vLLM takes on Hopper."""

    def __init__(self, inputs: Inputs, vllm: peers.Vllm) -> None:
        self.inputs = i = inputs
        step = inputs.step
        self.latent = latent_cache_bf16(step.sequences * step.length // PAGE)
        self.q_rope, self.k_rope = i.q_rope.clone(), i.k_rope.contiguous()
        self.out = torch.empty(0)
        self.expansion = None if step.decode else Expansion(step)
        self.projections = Projections(step, indexes=False, selects=False, absorbs=self.expansion is None)
        self.stages = [(PROJECTIONS, self.projections.run)]
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


class Missing(Exception):
    """The kernels of a side are not installed."""


def build(name: str, inputs: Inputs, *, products: bool = True) -> Side:
    """The side `name` on these inputs. Without `products` the sparse sides leave out their projections.

    Raises:
        Missing: its kernels are not installed; the message says why.
    """
    vllm, reason = peers.load()
    if name == "ours":
        return OurLayer(inputs, products=products)
    if name == "dense":
        return DenseLayer(inputs) if vllm is None else Dense(inputs, vllm)
    if vllm is None:
        raise Missing(reason)
    return InTree(inputs, vllm, products=products)
