"""The attention backend: what SGLang tells us about each step, as a `Step`.

SGLang asks it for metadata and CUDA graphs only: the computation is in `core.attention`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from dsv32_plugin.core.attention import DsaAttention
from dsv32_plugin.core.planner import gathered_keys
from dsv32_plugin.core.policy import Policy
from dsv32_plugin.core.step import Step, mixed_batch, uniform_decodes
from dsv32_plugin.sglang_adapter import guard, warmup
from dsv32_plugin.sglang_adapter.arguments import in_effect, longest_sequence
from dsv32_plugin.sglang_adapter.caches import as_dsa_pool
from dsv32_plugin.sglang_adapter.upstream import AttentionBackend

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import ForwardBatch, ModelRunner


class DsaBackend(AttentionBackend):
    """Holds the description of the step that runs."""

    needs_cpu_seq_lens = False
    """SGLang need not wait for the lengths that a verdict on drafts leaves, and then keeps none on the host."""

    def __init__(self, runner: ModelRunner, *, warms_up: bool = True) -> None:
        super().__init__()
        guard.check_model(runner.model, is_draft=runner.is_draft_worker)
        attentions = [module for module in runner.model.modules() if isinstance(module, DsaAttention)]
        selecting = [attention.layer for attention in attentions if attention.indexer is not None]
        self.token_to_kv_pool = as_dsa_pool(runner.token_to_kv_pool, selecting)
        self.req_to_token_pool = runner.req_to_token_pool
        self.page_size = runner.page_size
        options = in_effect(runner.server_args)
        self.max_context_len = longest_sequence(options)
        self.on_cpu = runner.device == "cpu"
        self.topk = runner.model.dsa_config.index_topk
        self.policy = Policy.from_settings()
        self.drafted = options.speculative_num_draft_tokens
        """Tokens of a sequence in a step that verifies drafts, the one before the first draft included."""
        self.forward_metadata: Step | None = None
        if warms_up and not self.on_cpu:
            warmup.run(runner, self.token_to_kv_pool, self.max_context_len, self.drafted or 1)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Describe a step that runs without a graph, if it is not idle, without waiting for the device."""
        self.forward_metadata = None
        if forward_batch.forward_mode.is_idle():
            return
        if forward_batch.forward_mode.is_extend_without_speculative():
            self.forward_metadata = self._extend_batch(forward_batch)
        else:
            self.forward_metadata = self._uniform_batch(forward_batch, in_graph=False)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Describe a step from SGLang's static buffers, as operations that the graph replays.

        Nothing is known on the host, so the context length bounds every sequence. While the graph runs SGLang may write
        slots of the next step: behind those that are visible, or of sequences whose token it throws away.
        """
        self.forward_metadata = self._uniform_batch(forward_batch, in_graph=True)

    def describe_draft_step(
        self, forward_batch: ForwardBatch, step: int, slots_bs: torch.Tensor, in_graph: bool
    ) -> None:
        """Describe a draft step, counted from 0, of a batch whose lengths are those before the first.

        Args:
            slots_bs: [B, steps] where each step's keys are written.
        """
        self.forward_metadata = self._decode_batch(
            forward_batch, slots_bs[:, step].contiguous(), queries=1, ahead=step + 1, in_graph=in_graph
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing is kept between graphs."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def _uniform_batch(self, forward_batch: ForwardBatch, in_graph: bool) -> Step:
        """A step in which every sequence has as many tokens as any other."""
        mode, slots_t = forward_batch.forward_mode, forward_batch.out_cache_loc
        if mode.is_decode():
            return self._decode_batch(forward_batch, slots_t, queries=1, ahead=0, in_graph=in_graph)
        if mode.is_target_verify():
            return self._decode_batch(
                forward_batch, slots_t, queries=self.drafted, ahead=self.drafted, in_graph=in_graph
            )
        if mode.is_draft_extend_v2():
            return self._decode_batch(forward_batch, slots_t, queries=self.drafted, ahead=0, in_graph=in_graph)
        raise NotImplementedError(
            f"forward mode {mode.name}: expected prefill, decode or one of EAGLE's; {guard.IN_TREE_HINT}"
        )

    def _decode_batch(
        self, forward_batch: ForwardBatch, slots_t: torch.Tensor, *, queries: int, ahead: int, in_graph: bool
    ) -> Step:
        """`queries` tokens of each sequence, which then has `ahead` more than SGLang's lengths say."""
        num_tokens = forward_batch.batch_size * queries
        max_visible = self.max_context_len if in_graph else self._max_visible(forward_batch, ahead)
        seq_lens_b = forward_batch.seq_lens.int()
        token_t = torch.arange(num_tokens, dtype=torch.int32, device=seq_lens_b.device)
        visible_bn = seq_lens_b[:, None] + (token_t[:queries] + (ahead + 1 - queries))
        return uniform_decodes(
            slots_t=slots_t[:num_tokens],
            block_table_bp=self._block_table(forward_batch),
            seq_t=token_t // queries,
            # A graph's padding is shorter than the tokens that it is given.
            visible_t=visible_bn.clamp_(min=0).view(-1),
            max_visible=max_visible,
            queries=queries,
            longest=self._longest(max_visible),
        )

    def _extend_batch(self, forward_batch: ForwardBatch) -> Step:
        """Prefills or chunks of them, behind them, in SGLang's mixed batches, decodes: extensions by one token.

        `extend_num_tokens` counts the rows by which SGLang pads a batch, too.
        """
        max_visible = self._max_visible(forward_batch)
        extend_seq_lens = forward_batch.extend_seq_lens_cpu
        num_decodes = sum(1 for _ in itertools.takewhile(lambda length: length == 1, reversed(extend_seq_lens)))
        return mixed_batch(
            slots_t=forward_batch.out_cache_loc[: sum(extend_seq_lens)],
            block_table_bp=self._block_table(forward_batch),
            seq_lens_b=forward_batch.seq_lens.int(),
            query_start_b1=_starts(forward_batch.extend_seq_lens),
            seq_lens_cpu_b=forward_batch.seq_lens_cpu.int(),
            query_start_cpu_b1=_starts(torch.tensor(extend_seq_lens, dtype=torch.int32)),
            max_visible=max_visible,
            num_decodes=num_decodes,
            decodes_last=True,
            longest=self._longest(max_visible),
            max_gathered_keys=gathered_keys(max_visible, self.topk),
        )

    def _max_visible(self, forward_batch: ForwardBatch, ahead: int = 0) -> int:
        """The longest of the batch; batch-invariant, the longest there can be: it decides whether keys are selected."""
        if self.policy.batch_invariant or forward_batch.seq_lens_cpu is None:
            return self.max_context_len
        return int(forward_batch.seq_lens_cpu.max()) + ahead

    def _longest(self, max_visible: int) -> int:
        """On a GPU decodes are given one bound for ever, so that their kernels come in few variants."""
        return max_visible if self.on_cpu else self.max_context_len

    def _block_table(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """[B, pages] int32, of one width for ever, which kernels are compiled for.

        A sequence's tokens lie in whole pages, so every page's first slot names it.
        """
        first_slots_bp = self.req_to_token_pool.req_to_token[:, : self.max_context_len : self.page_size]
        return (first_slots_bp[forward_batch.req_pool_indices] // self.page_size).int()


class DraftSteps:
    """A backend for each step that the draft model takes alone: the first draft comes with the last verdict."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner, num_drafts: int) -> None:
        self.num_drafts = num_drafts
        self.attn_backends = [DsaBackend(runner, warms_up=False) for _ in range(num_drafts - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._describe(forward_batch, in_graph=False)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Everything is described in the graph."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        self._describe(forward_batch, in_graph=True)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing is kept between graphs."""

    def _describe(self, forward_batch: ForwardBatch, in_graph: bool) -> None:
        slots_bs = forward_batch.out_cache_loc.view(-1, self.num_drafts)
        for step, backend in enumerate(self.attn_backends):
            backend.describe_draft_step(forward_batch, step, slots_bs, in_graph)


def _starts(lengths_b: torch.Tensor) -> torch.Tensor:
    """[0, l0, l0 + l1, ...]"""
    return torch.nn.functional.pad(lengths_b.cumsum(0, dtype=torch.int32), (1, 0))
