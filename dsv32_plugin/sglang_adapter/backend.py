"""The attention backend: what SGLang tells us about each step, as a `DsaBatch`.

SGLang asks it for metadata and CUDA graphs only: the computation is in `dsv32_plugin.attention`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from dsv32_plugin import dsa, settings
from dsv32_plugin.batch import DsaBatch, mixed_batch, uniform_decodes
from dsv32_plugin.sglang_adapter import guard, warmup
from dsv32_plugin.sglang_adapter.pool import as_dsa_pool

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class DsaBackend(AttentionBackend):
    """Holds the description of the step that runs."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        guard.check_model(runner.model)
        self.token_to_kv_pool = as_dsa_pool(runner.token_to_kv_pool)
        self.req_to_token_pool = runner.req_to_token_pool
        self.page_size = runner.page_size
        self.max_context_len = runner.model_config.context_len
        self.on_cpu = runner.device == "cpu"
        self.topk = runner.model.dsa_config.index_topk
        self.forward_metadata: DsaBatch | None = None
        if not self.on_cpu:
            warmup.run(runner, self.token_to_kv_pool)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Describe a step that runs without a graph, without waiting for the device."""
        assert forward_batch.seq_lens_cpu is not None, "needs_cpu_seq_lens asks for it"
        mode = forward_batch.forward_mode
        if mode.is_decode():
            self.forward_metadata = self._decode_batch(forward_batch, self._max_visible(forward_batch))
        elif mode.is_extend_without_speculative():
            self.forward_metadata = self._extend_batch(forward_batch)
        else:
            raise NotImplementedError(
                f"forward mode {mode.name}: the plugin has decode and extend; {guard.IN_TREE_HINT}"
            )

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Describe a decode step from SGLang's static buffers, as operations that the graph replays.

        Nothing is known on the host, so the context length bounds every sequence.
        """
        self.forward_metadata = self._decode_batch(forward_batch, self.max_context_len)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing is kept between graphs."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def _decode_batch(self, forward_batch: ForwardBatch, max_visible: int) -> DsaBatch:
        num_tokens = forward_batch.batch_size
        return uniform_decodes(
            slots_t=forward_batch.out_cache_loc[:num_tokens],
            block_table_bp=self._block_table(forward_batch),
            seq_t=torch.arange(num_tokens, dtype=torch.int32, device=forward_batch.seq_lens.device),
            visible_t=forward_batch.seq_lens.int(),
            max_visible=max_visible,
            queries=1,
            longest=self._longest(max_visible),
        )

    def _extend_batch(self, forward_batch: ForwardBatch) -> DsaBatch:
        """Prefills or chunks of them, behind them, in SGLang's mixed batches, decodes: extensions by one token."""
        max_visible = self._max_visible(forward_batch)
        extend_seq_lens = forward_batch.extend_seq_lens_cpu
        num_decodes = sum(1 for _ in itertools.takewhile(lambda length: length == 1, reversed(extend_seq_lens)))
        return mixed_batch(
            slots_t=forward_batch.out_cache_loc[: forward_batch.extend_num_tokens],
            block_table_bp=self._block_table(forward_batch),
            seq_lens_b=forward_batch.seq_lens.int(),
            query_start_b1=_starts(forward_batch.extend_seq_lens),
            seq_lens_cpu_b=forward_batch.seq_lens_cpu.int(),
            query_start_cpu_b1=_starts(torch.tensor(extend_seq_lens, dtype=torch.int32)),
            max_visible=max_visible,
            num_decodes=num_decodes,
            decodes_last=True,
            longest=self._longest(max_visible),
            max_gathered_keys=dsa.gathered_keys(max_visible, self.topk),
        )

    def _max_visible(self, forward_batch: ForwardBatch) -> int:
        """The longest of the batch; batch-invariant, the longest there can be: it decides whether keys are selected."""
        return self.max_context_len if settings.batch_invariant() else int(forward_batch.seq_lens_cpu.max())

    def _longest(self, max_visible: int) -> int:
        """On a GPU decodes are given one bound for ever, so that their kernels come in few variants."""
        return max_visible if self.on_cpu else self.max_context_len

    def _block_table(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """[B, pages] int32, of one width for ever, which kernels are compiled for.

        A sequence's tokens lie in whole pages, so every page's first slot names it.
        """
        first_slots_bp = self.req_to_token_pool.req_to_token[:, : self.max_context_len : self.page_size]
        return (first_slots_bp[forward_batch.req_pool_indices] // self.page_size).int()


def _starts(lengths_b: torch.Tensor) -> torch.Tensor:
    """[0, l0, l0 + l1, ...]"""
    return torch.nn.functional.pad(lengths_b.cumsum(0, dtype=torch.int32), (1, 0))
