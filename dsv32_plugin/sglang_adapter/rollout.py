"""Selected positions in SGLang's answers: its own option, request field and way back, filled by our layers.

`--enable-return-indexer-topk` at the start, `return_indexer_topk` in a request of `/generate`, `indexer_topk` in the
answer's metadata. SGLang's own capturer is for one rank of a GPU, keeps 4 bytes for each selected key of every slot,
and returns that. Ours keeps and returns the bytes of `rollout.selection`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsv32_plugin.core.attention import DsaAttention
from dsv32_plugin.core.recorder import Recorder
from dsv32_plugin.rollout.store import SelectionStore
from dsv32_plugin.sglang_adapter import arguments, guard
from dsv32_plugin.sglang_adapter.layers import AttentionLayers

if TYPE_CHECKING:
    from dsv32_plugin.sglang_adapter.upstream import ForwardBatch, ModelRunner


def returns_selections(options: Any) -> bool:
    """Whether a server was started to tell what it selects."""
    return bool(getattr(options, "enable_return_indexer_topk", False))


def init_capturer_around(original: Callable[[Any], None], runner: ModelRunner) -> None:
    """Goes around `ModelRunner.init_indexer_capturer`, which runs when there are caches and no graphs yet."""
    if guard.is_our_draft(runner.model):
        return
    options = arguments.in_effect(runner.server_args)
    if not guard.is_ours(runner.model) or not returns_selections(options):
        original(runner)
        return
    from dsv32_plugin.sglang_adapter.upstream import set_global_indexer_capturer

    # All ranks select the same, and the first one answers.
    set_global_indexer_capturer(_capturer(runner, options) if AttentionLayers(None).tp_rank == 0 else None)


def collect_around(original: Callable[[Any, Any], None], processor: Any, req: Any) -> None:
    """Goes around `_maybe_collect_indexer_topk`, which collects for requests that did not ask, too."""
    if req.return_indexer_topk:
        original(processor, req)


def _capturer(runner: ModelRunner, options: Any) -> SelectionCapturer:
    attentions = [module for module in runner.model.modules() if isinstance(module, DsaAttention)]
    selecting = [attention for attention in attentions if attention.indexer is not None]
    topk = runner.model.dsa_config.index_topk
    decodes = runner.max_running_requests * (options.speculative_num_draft_tokens or 1)
    chunk = options.chunked_prefill_size or -1
    prefills = chunk if chunk > 0 else max(options.max_prefill_tokens, arguments.longest_sequence(options))
    layers = [attention.layer for attention in selecting]
    recorder = Recorder(layers, topk, prefills + decodes, torch.device(runner.device))
    for attention in selecting:
        attention.recorder = recorder
    return SelectionCapturer(recorder, SelectionStore(layers, topk, 2 * decodes), runner)


class SelectionCapturer:
    """What SGLang asks of a capturer, around a recorder and a store."""

    def __init__(self, recorder: Recorder, kept: SelectionStore, runner: ModelRunner) -> None:
        self.recorder, self.kept = recorder, kept
        self.req_to_token_pool = runner.req_to_token_pool
        slots = runner.token_to_kv_pool.size + runner.page_size
        self.position_s = torch.zeros(slots, dtype=torch.int32, device=runner.device)
        """Of the token in each slot: sequences that share one share its position."""

    def on_forward_end(
        self,
        forward_batch: ForwardBatch,
        can_run_graph: bool,
        cuda_graph_batch: int | None,
        no_copy_to_cpu: bool = False,
    ) -> Captured | None:
        """What the step that has run selected; kept at once, or handed on with tensors that SGLang copies meanwhile."""
        spec, mode = forward_batch.spec_info, forward_batch.forward_mode
        if mode.is_idle() or (spec is not None and spec.is_draft_input()):
            return None
        slots_t = forward_batch.out_cache_loc
        positions_t = forward_batch.positions[: len(slots_t)]
        self.position_s[slots_t] = positions_t.int()
        lengths = forward_batch.seq_lens_cpu
        if lengths is not None and int(lengths.max()) + len(slots_t) <= self.kept.topk:
            return None
        captured = self._captured(forward_batch, slots_t, positions_t, drafts=mode.is_target_verify())
        if no_copy_to_cpu:
            return captured
        captured.map_device_tensors(torch.Tensor.cpu)
        captured.finalize()
        return None

    def _captured(
        self, forward_batch: ForwardBatch, slots_t: torch.Tensor, positions_t: torch.Tensor, *, drafts: bool
    ) -> Captured:
        num_tokens = len(slots_t)
        if forward_batch.forward_mode.is_extend_without_speculative():
            tokens_b = forward_batch.extend_seq_lens
        else:
            tokens_b = num_tokens // forward_batch.batch_size
        req_t = torch.repeat_interleave(forward_batch.req_pool_indices, tokens_b, output_size=num_tokens)
        before_t = self.req_to_token_pool.req_to_token[req_t, (positions_t - 1).clamp_(min=0)]
        selected_tlk = self.recorder.slots_tlk[:num_tokens]
        selected_tlk = torch.where(selected_tlk < 0, -1, self.position_s[selected_tlk.clamp(min=0)])
        # The next step may write to SGLang's tensors before these are copied.
        return Captured(self.kept, slots_t.clone(), positions_t.clone(), before_t, selected_tlk, drafts)

    def get_topk(self, req_pool_idx: int, seqlen: int, req_to_token_pool: Any) -> torch.Tensor:
        """The bytes of a sequence that has ended; its last token was sampled and never run."""
        slots_p = req_to_token_pool.req_to_token[req_pool_idx, : seqlen - 1].tolist()
        return torch.from_numpy(np.frombuffer(self.kept.stream(slots_p), dtype=np.uint8).copy())

    def destroy(self) -> None:
        """Nothing is registered with the device."""


class Captured:
    """The selections of one step on their way to the store."""

    def __init__(
        self,
        kept: SelectionStore,
        slots_t: torch.Tensor,
        positions_t: torch.Tensor,
        before_t: torch.Tensor,
        selected_tlk: torch.Tensor,
        drafts: bool,
    ) -> None:
        self.kept, self.drafts = kept, drafts
        self.held = [slots_t, positions_t, before_t, selected_tlk]

    def map_device_tensors(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """SGLang copies what is on the device."""
        self.held = [copy(tensor) for tensor in self.held]

    def finalize(self) -> None:
        """The copies are there."""
        *lists, selected_tlk = self.held
        slots, positions, before = (tensor.tolist() for tensor in lists)
        self.kept.add(slots, positions, before, selected_tlk.numpy(), any_may_be_last=self.drafts)
