"""What one attention layer is asked, on every side that is measured: the same step, caches alike, and the checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks.clock import DEVICE, Launch
from dsv32_plugin.benchmarks.sizes import REAL
from dsv32_plugin.core import step as core_step
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.planner import gathered_keys
from dsv32_plugin.core.rope import rope_table, softmax_scale
from dsv32_plugin.core.step import mixed_batch, uniform_decodes
from dsv32_plugin.kernels import cache_layout as layout
from dsv32_plugin.kernels.ops.sparse_mla.reference import sparse_mla as attend_exactly
from dsv32_plugin.kernels.runtime.dispatch import force

CONFIG = DsaConfig.from_hf(REAL.config())
Q_RANK, NOPE, VALUE = CONFIG.q_lora_rank, CONFIG.qk_nope_head_dim, CONFIG.v_head_dim
INDEX_HEADS, TOPK = CONFIG.index_n_heads, CONFIG.index_topk
RANK, ROPE, INDEX_DIM, PAGE = layout.LATENT_RANK, layout.ROPE_DIM, layout.INDEX_DIM, layout.PAGE_SIZE
SCALE = softmax_scale(CONFIG.qk_head_dim, CONFIG.rope)

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
        self.rope_table = rope_table(ROPE, step.length, None, CONFIG.rope).to(DEVICE)
        self.hidden = normal(tokens, step.hidden)
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


class Side:
    """One way to run the layer."""

    whose = ""
    """Whose kernels, for the record."""
    inputs: Inputs
    stages: list[tuple[str, Launch]]
    """What a layer runs, in order."""

    @property
    def operations(self) -> list[str]:
        return [name for name, _ in self.stages]

    def through(self, last: int) -> Launch:
        """Launches the layer as far as the operation of this index."""
        launches = [launch for _, launch in self.stages[: last + 1]]

        def run() -> None:
            for launch in launches:
                launch()

        return run

    def whole(self) -> Launch:
        return self.through(len(self.operations) - 1)

    def check(self) -> None:
        """Run the layer and raise AssertionError if the result of some sampled token is wrong."""
        self.whole()()
        inputs = self.inputs
        for token in sampled(inputs.step):
            self.check_token(token, inputs.block_table[inputs.sequence[token]], int(inputs.positions[token]) + 1)

    def check_token(self, token: int, table: torch.Tensor, visible: int) -> None:
        raise NotImplementedError


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


def check_close(got: torch.Tensor, want: torch.Tensor, name: str = "attention", most: float = ATTENTION_ERROR) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < most, f"{name}: relative error {error:.4f}"


def check_selection(
    name: str,
    index_cache: torch.Tensor,
    index_q_id: torch.Tensor,
    index_weights_i: torch.Tensor,
    table: torch.Tensor,
    visible: int,
    chosen: torch.Tensor,
) -> None:
    """These slots are those of the best keys, but for the rounding of the scores."""
    assert chosen.unique().numel() == chosen.numel() == min(TOPK, visible), f"{name}: not {TOPK} slots"
    lengths = torch.tensor([0, len(table) * PAGE], dtype=torch.int32, device=DEVICE)
    with force("reference"):
        keys, scale = kernels.gather_index_keys(index_cache, table.unsqueeze(0), lengths, len(table) * PAGE)
    assert scale is not None
    dots = keys.view(torch.float8_e4m3fn).double() @ index_q_id.double().T
    scores = (dots.relu() @ index_weights_i.double()) * scale.double()
    slots = slots_of(table, visible)
    order = slots.argsort()
    mine = order[torch.searchsorted(slots[order], chosen.long())]
    assert torch.equal(slots[mine], chosen.long()), f"{name}: a slot of another sequence"
    kth = scores[:visible].topk(min(TOPK, visible)).values[-1]
    error = FP8_ERROR * scores[:visible].abs().max()
    assert scores[mine].min() >= kth - 2 * error, f"{name}: not the best {TOPK} keys"
