"""The operators that vLLM's CPU worker calls by name and that the CUDA wheel does not hold, in plain torch.

vLLM's own CPU build compiles them; each does what the Triton kernel of that name does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dsv32_plugin.vllm_adapter.upstream import packs_experts, writes_packed_products

REJECTED = -1


def init_cpu_memory_env(nodes: list[int]) -> str:
    """Do nothing: memory is not bound to a NUMA node."""
    return ""


def compute_slot_mapping_kernel_impl(
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> None:
    """slot[t] = block_table[seq(t), position // block_size] * block_size + position % block_size; -1 past the batch."""
    num_tokens = int(query_start_loc[-1])
    seq_t = torch.repeat_interleave(
        torch.arange(query_start_loc.numel() - 1), query_start_loc.diff().long(), output_size=num_tokens
    )
    positions_t = positions[:num_tokens]
    pages_t = block_table[seq_t, positions_t // block_size].long()
    slot_mapping[:num_tokens] = pages_t * block_size + positions_t % block_size
    slot_mapping[num_tokens:] = -1


def bookkeeping_around(original: Callable[..., Any], runner: Any, *args: Any) -> Any:
    """A generator of a `seed` draws for each part of a prompt, though only the last draw counts.

    vLLM sets it back by an offset, which ends the process of the model: a generator of a CPU has none (vLLM 0.26.0).
    """
    batch = runner.input_batch
    unfinished = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs])
    drawn = {index: batch.generators.pop(index) for index in map(int, unfinished) if index in batch.generators}
    done = original(runner, *args)
    for index, generator in drawn.items():
        if not runner.requests[batch.req_ids[index]].output_token_ids:
            generator.manual_seed(generator.initial_seed())
        batch.generators[index] = generator
    return done


def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def eagle_prepare_inputs_padded_kernel_impl(
    cu_num_draft_tokens: torch.Tensor,
    valid_sampled_tokens_count: torch.Tensor,
    query_start_loc: torch.Tensor,
    token_indices_to_sample: torch.Tensor,
    num_rejected_tokens: torch.Tensor,
    num_reqs: int,
) -> None:
    """After verification: how many drafted tokens were rejected, and the last token that was not."""
    drafted = cu_num_draft_tokens[:num_reqs].diff(prepend=cu_num_draft_tokens.new_zeros(1))
    rejected = torch.where(drafted > 0, drafted + 1 - valid_sampled_tokens_count[:num_reqs], 0)
    num_rejected_tokens[:num_reqs] = rejected
    token_indices_to_sample[:num_reqs] = query_start_loc[1 : num_reqs + 1] - 1 - rejected


def eagle_prepare_next_token_padded_kernel_impl(
    sampled_token_ids: torch.Tensor,
    discard_request_mask: torch.Tensor,
    backup_next_token_ids: torch.Tensor,
    next_token_ids: torch.Tensor,
    valid_sampled_tokens_count: torch.Tensor,
    vocab_size: int,
    num_sampled_tokens_per_req: int,
    num_reqs: int,
) -> None:
    """The last valid token of each request, or its backup where there is none; and how many are valid."""
    sampled = sampled_token_ids[:num_reqs, :num_sampled_tokens_per_req]
    valid = (sampled != REJECTED) & (sampled < vocab_size) & ~discard_request_mask[:num_reqs, None]
    position = torch.arange(1, sampled.shape[1] + 1)
    last = (valid * position).amax(1)
    chosen = sampled.gather(1, (last - 1).clamp(min=0)[:, None])[:, 0]
    next_token_ids[:num_reqs] = torch.where(last > 0, chosen, backup_next_token_ids[:num_reqs])
    valid_sampled_tokens_count[:num_reqs] = valid.sum(1)


def eagle_step_slot_mapping_metadata_kernel_impl(
    positions: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out_clamped_positions: torch.Tensor,
    out_slot_mapping: torch.Tensor,
    block_size: int,
    max_model_len: int,
    pad_id: int,
) -> None:
    """One draft step further: position, slot and length of each sequence; past the longest context nothing is kept."""
    num_reqs = positions.shape[0]
    following = positions + 1
    exceeds = following >= max_model_len
    following = following.masked_fill(exceeds, 0)
    page = (following // block_size).clamp(max=block_table.shape[1] - 1)
    slots = block_table[:num_reqs].gather(1, page[:, None].long())[:, 0].long() * block_size + following % block_size
    longer = (seq_lens[:num_reqs] + 1).masked_fill(exceeds, 1).clamp(max=max_model_len)
    out_clamped_positions[:num_reqs] = following
    out_slot_mapping[:num_reqs] = slots.masked_fill(exceeds, pad_id)
    out_slot_mapping[num_reqs:] = pad_id
    seq_lens[:num_reqs] = longer


def rejection_greedy_sample_kernel_impl(
    output_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_argmax: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    is_greedy: torch.Tensor | None,
    max_spec_len: int,
) -> None:
    """The target's tokens up to the first that was not drafted, or all of them and the bonus token."""
    begin = 0
    for request, end in enumerate(cu_num_draft_tokens.tolist()):
        if is_greedy is None or is_greedy[request]:
            wrong = (draft_token_ids[begin:end] != target_argmax[begin:end]).nonzero()
            kept = int(wrong[0]) + 1 if len(wrong) else end - begin
            output_token_ids[request, :kept] = target_argmax[begin : begin + kept]
            if not len(wrong):
                output_token_ids[request, kept] = bonus_token_ids.flatten()[request]
        begin = end


def expand_kernel_impl(
    output: torch.Tensor, x: torch.Tensor, cu_num_tokens: torch.Tensor, replace_from: int, replace_to: int
) -> None:
    """A value for each request -> one for each of its tokens."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    output[: int(cu_num_tokens[-1])] = x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)


def sample_recovered_tokens_kernel_impl(
    output_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    inv_q: torch.Tensor,
    vocab_size: int,
    no_draft_probs: bool,
) -> None:
    """A sample of what the target adds to the draft, for the case that the drafted token is rejected."""
    counts = cu_num_draft_tokens.diff(prepend=cu_num_draft_tokens.new_zeros(1))
    if no_draft_probs or draft_probs is None:
        probs = target_probs.scatter(1, draft_token_ids[:, None], 0.0)
    else:
        probs = (target_probs - draft_probs).clamp(min=0)
    output_token_ids.copy_((probs * inv_q[: len(counts)].repeat_interleave(counts, 0)).argmax(1))


def rejection_random_sample_kernel_impl(
    output_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    recovered_token_ids: torch.Tensor,
    uniform_probs: torch.Tensor,
    is_greedy: torch.Tensor,
    max_spec_len: int,
    vocab_size: int,
    no_draft_probs: bool,
) -> None:
    """Drafted tokens as long as target / draft >= u; then the recovered token, or behind all of them the bonus one."""
    chosen = draft_token_ids[:, None]
    target = target_probs.gather(1, chosen)[:, 0]
    draft = torch.ones_like(target) if no_draft_probs or draft_probs is None else draft_probs.gather(1, chosen)[:, 0]
    accepted = (draft > 0) & (target >= uniform_probs * draft)
    begin = 0
    for request, end in enumerate(cu_num_draft_tokens.tolist()):
        if not is_greedy[request]:
            wrong = (~accepted[begin:end]).nonzero()
            kept = int(wrong[0]) if len(wrong) else end - begin
            output_token_ids[request, :kept] = draft_token_ids[begin : begin + kept]
            following = recovered_token_ids[begin + kept] if len(wrong) else bonus_token_ids.flatten()[request]
            output_token_ids[request, kept] = following
        begin = end


def convert_weight_packed(weight: torch.Tensor) -> torch.Tensor:
    """Pack nothing."""
    return weight


def weight_packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_packed: bool
) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def write_packed_linear(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_packed: bool
) -> None:
    out.copy_(weight_packed_linear(x, weight, bias, is_packed))


def prepack_moe_weight(weight: torch.Tensor, out: torch.Tensor, isa: str) -> None:
    """Pack nothing."""
    out.copy_(weight)


def cpu_fused_moe(
    out: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    skip_weighted: bool,
    act: str,
    isa: str,
) -> None:
    """out[t] = sum over k of topk_weights[t, k] * expert topk_ids[t, k] of x[t]; the sum is in float32."""
    assert (act, w13_bias, w2_bias, skip_weighted) == ("silu", None, None, False), "experts of DeepSeek-V3.2"
    total = torch.zeros(out.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token_n, k_n = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(x[token_n], w13[expert]).chunk(2, dim=-1)
        made = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[expert])
        total.index_add_(0, token_n, made.float() * topk_weights[token_n, k_n, None].float())
    out.copy_(total)


def greedy_argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def fused_gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """A sample of softmax(logits) for each row, by Gumbel's noise from the row's seed alone."""
    noise = torch.empty_like(logits)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.exponential_(generator=torch.Generator().manual_seed(seed))
    return (logits - noise.log()).argmax(-1)


_SCHEMAS: dict[Callable[..., object], str] = {
    init_cpu_memory_env: "(SymInt[] nodes) -> str",
    compute_slot_mapping_kernel_impl: (
        "(Tensor query_start_loc, Tensor positions, Tensor block_table, Tensor(a!) slot_mapping, "
        "SymInt block_size) -> ()"
    ),
    silu_and_mul: "(Tensor(a!) out, Tensor x) -> ()",
    eagle_prepare_inputs_padded_kernel_impl: (
        "(Tensor cu_num_draft_tokens, Tensor valid_sampled_tokens_count, Tensor query_start_loc, "
        "Tensor(a!) token_indices_to_sample, Tensor(b!) num_rejected_tokens, SymInt num_reqs) -> ()"
    ),
    eagle_prepare_next_token_padded_kernel_impl: (
        "(Tensor sampled_token_ids, Tensor discard_request_mask, Tensor backup_next_token_ids, "
        "Tensor(a!) next_token_ids, Tensor(b!) valid_sampled_tokens_count, SymInt vocab_size, "
        "SymInt num_sampled_tokens_per_req, SymInt num_reqs) -> ()"
    ),
    eagle_step_slot_mapping_metadata_kernel_impl: (
        "(Tensor positions, Tensor block_table, Tensor(a!) seq_lens, Tensor(b!) out_clamped_positions, "
        "Tensor(c!) out_slot_mapping, SymInt block_size, SymInt max_model_len, SymInt pad_id) -> ()"
    ),
    rejection_greedy_sample_kernel_impl: (
        "(Tensor(a!) output_token_ids, Tensor cu_num_draft_tokens, Tensor draft_token_ids, Tensor target_argmax, "
        "Tensor bonus_token_ids, Tensor? is_greedy, SymInt max_spec_len) -> ()"
    ),
    expand_kernel_impl: (
        "(Tensor(a!) output, Tensor x, Tensor cu_num_tokens, SymInt replace_from, SymInt replace_to) -> ()"
    ),
    sample_recovered_tokens_kernel_impl: (
        "(Tensor(a!) output_token_ids, Tensor cu_num_draft_tokens, Tensor draft_token_ids, Tensor? draft_probs, "
        "Tensor target_probs, Tensor inv_q, SymInt vocab_size, bool no_draft_probs) -> ()"
    ),
    rejection_random_sample_kernel_impl: (
        "(Tensor(a!) output_token_ids, Tensor cu_num_draft_tokens, Tensor draft_token_ids, Tensor? draft_probs, "
        "Tensor target_probs, Tensor bonus_token_ids, Tensor recovered_token_ids, Tensor uniform_probs, "
        "Tensor is_greedy, SymInt max_spec_len, SymInt vocab_size, bool no_draft_probs) -> ()"
    ),
    greedy_argmax: "(Tensor logits) -> Tensor",
    fused_gumbel_argmax: "(Tensor logits, Tensor seeds) -> Tensor",
    convert_weight_packed: "(Tensor(a) weight) -> Tensor(a)",
}
_EXPERTS: dict[Callable[..., object], str] = {
    prepack_moe_weight: "(Tensor weight, Tensor(a!) out, str isa) -> ()",
    cpu_fused_moe: (
        "(Tensor(a!) out, Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor topk_weights, "
        "Tensor topk_ids, bool skip_weighted, str act, str isa) -> ()"
    ),
}
_PACKED_LINEAR: dict[Callable[..., object], str] = {
    weight_packed_linear: "(Tensor x, Tensor weight, Tensor? bias, bool is_packed) -> Tensor"
}
_WRITTEN_LINEAR: dict[Callable[..., object], str] = {
    write_packed_linear: "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, bool is_packed) -> ()"
}


def define_missing() -> None:
    """Define those operators in `torch.ops._C` that this build of vLLM lacks."""
    # Where experts can go without these two, they take the presence of one for that of all.
    experts = _EXPERTS if packs_experts() else {}
    linear = _WRITTEN_LINEAR if writes_packed_products() else _PACKED_LINEAR
    names: dict[Callable[..., object], str] = {write_packed_linear: weight_packed_linear.__name__}
    for function, schema in (_SCHEMAS | experts | linear).items():
        name = names.get(function, function.__name__)
        if not hasattr(torch.ops._C, name):
            torch.library.define(f"_C::{name}", schema)
            # No tensor argument decides the dispatch of init_cpu_memory_env.
            key = "CPU" if "Tensor" in schema else "CompositeExplicitAutograd"
            torch.library.impl(f"_C::{name}", key, function)
