"""Drafts and verdicts without a GPU: what SGLang has only as kernels, in torch, for one draft after another.

Each function or class stands in for the one of the same name (docs/patches.md).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dsv32_plugin.sglang_adapter.cpu.devices import without_gpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv32_plugin.sglang_adapter.upstream import EagleVerifyInput, LogitsProcessorOutput, ScheduleBatch


class _Kernel:
    """Launched as a Triton kernel is: `kernel[grid](...)`."""

    def __class_getitem__(cls, grid: tuple[int, ...]) -> Callable[..., None]:
        return cls.run

    @staticmethod
    def run(*args: Any, **options: Any) -> None:
        raise NotImplementedError


class AssignDraftCacheLocs(_Kernel):
    """The slots of the positions from the sequence's length on, one for each draft."""

    @staticmethod
    def run(
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        seq_lens: torch.Tensor,
        out_cache_loc: torch.Tensor,
        pool_len: int,
        topk: int,
        steps: int,
        **of_gpus: Any,
    ) -> None:
        position_bs = seq_lens[:, None] + torch.arange(steps)
        out_cache_loc.copy_(req_to_token[req_pool_indices[:, None], position_bs].flatten())


class FillBonusTokens(_Kernel):
    """The last accepted token of each sequence."""

    @staticmethod
    def run(accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, width: int) -> None:
        accepted_bn = accept_tokens.view(-1, width)
        bonus_tokens.copy_(accepted_bn.gather(1, accept_lens[:, None].long() - 1)[:, 0])


def assign_req_to_token_pool_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Note the slots of the positions start .. end - 1 of each sequence."""
    row_t, position_t = _positions(req_pool_indices, start_offset, end_offset)
    req_to_token[row_t, position_t] = out_cache_loc.to(req_to_token.dtype)


def assign_extend_cache_locs_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> torch.Tensor:
    """The slots of the positions start .. end - 1 of each sequence."""
    return req_to_token[_positions(req_pool_indices, start_offset, end_offset)].long()


def build_tree_kernel_efficient(
    bonus_tokens: torch.Tensor,
    parent_list: Any,
    top_scores_index: torch.Tensor,
    draft_tokens: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_sum: int,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    *of_masks: Any,
    **more_of_masks: Any,
) -> tuple[torch.Tensor | None, ...]:
    """A tree that is a chain, in which each token but the last has one child.

    Returns:
        mask, which our attention has no need of; positions [B * N]; [B, N] each: rows, next token and next sibling in
        the tree, -1 where there is none; tokens [B * N].
    """
    batch_size = seq_lens.numel()
    step_n = torch.arange(num_verify_tokens)
    none_bn = torch.full((batch_size, num_verify_tokens), -1)
    next_bn = none_bn.clone()
    next_bn[:, :-1] = step_n[1:]
    return (
        None,
        (seq_lens[:, None] + step_n).flatten(),
        torch.arange(batch_size * num_verify_tokens).view(batch_size, -1),
        next_bn,
        none_bn,
        torch.cat((bonus_tokens[:, None], draft_tokens), dim=1).flatten(),
    )


def eagle_sample(
    verify_input: EagleVerifyInput,
    batch: ScheduleBatch,
    logits_output: LogitsProcessorOutput,
    vocab_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose a token after every one that was verified, as without drafts; drafts are accepted up to the first other.

    Returns:
        the chosen tokens [B * N]; how many of each sequence hold [B], the one after its last right draft included;
        their rows [B, N], then -1.
    """
    mask = None
    if vocab_mask is not None:
        mask = partial(verify_input.grammar.apply_vocab_mask, vocab_mask=vocab_mask)
    return _verdict(verify_input, batch, logits_output.next_token_logits, mask)


def eagle_sample_masked(
    verify_input: EagleVerifyInput,
    batch: ScheduleBatch,
    logits_output: LogitsProcessorOutput,
    grammar_mask: Any = None,
    *of_other_algorithms: Any,
    **of_watermarks: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`eagle_sample` from 0.5.17 on; the guard lets no watermarks in here."""
    mask = None if grammar_mask is None else grammar_mask.apply
    return _verdict(verify_input, batch, logits_output.next_token_logits, mask)


def draft_around(original: Callable[..., EagleVerifyInput], *arguments: Any, **options: Any) -> EagleVerifyInput:
    """For an idle batch 0.5.15 makes what is verified on a GPU."""
    with without_gpu():
        return original(*arguments, **options)


def _verdict(
    verify_input: EagleVerifyInput, batch: ScheduleBatch, logits_tv: torch.Tensor, mask: Callable[..., None] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drafted = verify_input.draft_token_num
    _penalise(logits_tv, batch.sampling_info, drafted)
    if mask is not None:
        mask(logits=logits_tv)
    chosen_t = _choose(logits_tv, batch.sampling_info, drafted)
    tokens_bn = verify_input.draft_token.view(-1, drafted)
    right_bd = tokens_bn[:, 1:] == chosen_t.view(-1, drafted)[:, :-1]
    held_b = right_bd.int().cumprod(1).sum(1, dtype=torch.int32) + 1
    row_bn = torch.arange(tokens_bn.numel(), dtype=torch.int32).view(-1, drafted)
    return chosen_t, held_b, torch.where(torch.arange(drafted) < held_b[:, None], row_bn, -1)


def _penalise(logits_tv: torch.Tensor, info: Any, repeats: int) -> None:
    from dsv32_plugin.sglang_adapter.upstream import apply_scaling_penalties

    if info.acc_additive_penalties is not None:
        logits_tv.add_(info.acc_additive_penalties.repeat_interleave(repeats, 0))
    if info.acc_scaling_penalties is not None:
        apply_scaling_penalties(logits_tv, info.acc_scaling_penalties.repeat_interleave(repeats, 0))
    if info.logit_bias is not None:
        logits_tv.add_(info.logit_bias.repeat_interleave(repeats, 0))


def _choose(logits_tv: torch.Tensor, info: Any, repeats: int) -> torch.Tensor:
    from dsv32_plugin.sglang_adapter.upstream import top_k_top_p_min_p_sampling_from_probs_torch

    if info.is_all_greedy:
        return logits_tv.argmax(-1).int()
    temperature_t1, top_k_t, top_p_t, min_p_t = (
        values.repeat_interleave(repeats, 0) for values in (info.temperatures, info.top_ks, info.top_ps, info.min_ps)
    )
    return top_k_top_p_min_p_sampling_from_probs_torch(
        (logits_tv / temperature_t1).softmax(-1),
        top_k_t,
        top_p_t,
        min_p_t,
        info.need_min_p_sampling,
        None,
        torch.empty(0),
    )


def _positions(
    req_pool_indices: torch.Tensor, start_b: torch.Tensor, end_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of `req_to_token`, and position, of every token."""
    lengths_b = end_b - start_b
    position = [torch.arange(start, end) for start, end in zip(start_b.tolist(), end_b.tolist(), strict=True)]
    return req_pool_indices.repeat_interleave(lengths_b), torch.cat(position)
