"""The operators that vLLM's CUDA wheel lacks on a CPU, on cases small enough to see through."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dsv32_plugin.vllm_adapter.cpu import operators

NOTHING = -1


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_the_last_valid_token_is_next() -> None:
    sampled = torch.tensor([[5, 6, 7], [5, NOTHING, NOTHING], [NOTHING] * 3, [5, 6, 99]])
    following, valid = ints(0, 0, 0, 0), ints(0, 0, 0, 0)
    discarded = torch.tensor([False, False, False, False])
    operators.eagle_prepare_next_token_padded_kernel_impl(
        sampled, discarded, ints(1, 2, 3, 4), following, valid, 50, 3, 4
    )
    assert following.tolist() == [7, 5, 3, 6]
    assert valid.tolist() == [3, 1, 0, 2]
    discarded[0] = True
    operators.eagle_prepare_next_token_padded_kernel_impl(
        sampled, discarded, ints(1, 2, 3, 4), following, valid, 50, 3, 4
    )
    assert (following[0], valid[0]) == (1, 0)


def test_rejected_tokens_are_counted_from_what_was_drafted() -> None:
    rejected, last = ints(9, 9, 9), ints(9, 9, 9)
    # Three, none and two were drafted; two of the first and both of the last were accepted.
    operators.eagle_prepare_inputs_padded_kernel_impl(ints(3, 3, 5), ints(3, 1, 3), ints(0, 4, 5, 8), last, rejected, 3)
    assert rejected.tolist() == [1, 0, 0]
    assert last.tolist() == [2, 4, 7]


def test_a_draft_step_moves_on_until_the_longest_context() -> None:
    seq_lens, positions, slots = ints(18, 32), ints(0, 0), ints(0, 0, 0)
    operators.eagle_step_slot_mapping_metadata_kernel_impl(
        ints(17, 31), torch.tensor([[7, 3], [8, 4]]), seq_lens, positions, slots, 16, 32, NOTHING
    )
    assert positions.tolist() == [18, 0]
    assert slots.tolist() == [3 * 16 + 2, NOTHING, NOTHING]
    assert seq_lens.tolist() == [19, 1]


def test_greedy_verification_stops_at_the_first_difference() -> None:
    output = torch.full((3, 3), NOTHING)
    operators.rejection_greedy_sample_kernel_impl(
        output, ints(2, 4, 4), ints(1, 2, 1, 9), ints(1, 2, 1, 3), ints(7, 8, 6)[:, None], None, 2
    )
    assert output.tolist() == [[1, 2, 7], [1, 3, NOTHING], [6, NOTHING, NOTHING]]


def test_sampled_verification_takes_what_is_likely_enough() -> None:
    target = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])
    draft = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
    tokens = ints(1, 0, 0)
    recovered = ints(NOTHING, NOTHING, NOTHING)
    operators.sample_recovered_tokens_kernel_impl(
        recovered, ints(2, 3), tokens, draft, target, torch.ones(2, 2), 2, False
    )
    assert recovered.tolist()[1:] == [1, 0], "the token whose probability the draft has underestimated"
    output = torch.full((2, 3), NOTHING)
    operators.rejection_random_sample_kernel_impl(
        output, ints(2, 3), tokens, draft, target, ints(5, 6), recovered, torch.full((3,), 0.5),
        torch.tensor([False, False]), 2, 2, False,
    )  # fmt: skip
    assert output.tolist() == [[1, 1, NOTHING], [0, 6, NOTHING]]


def test_a_value_for_each_request_is_repeated_for_its_tokens() -> None:
    output = ints(0, 0, 0, 0)
    operators.expand_kernel_impl(output, ints(4, -1), ints(3, 4), -1, 2)
    assert output.tolist() == [4, 4, 4, 2]


def test_experts_are_summed_by_their_weights() -> None:
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(5, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    weights, chosen = torch.rand(5, 2), torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [0, 1]])
    out = torch.empty(5, 8)
    operators.cpu_fused_moe(out, x, w13, w2, None, None, weights, chosen, False, "silu", "vec")
    for token in range(5):
        parts = []
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            gate, up = w13[expert][:6] @ x[token], w13[expert][6:] @ x[token]
            parts.append(weight * (w2[expert] @ (torch.nn.functional.silu(gate) * up)))
        torch.testing.assert_close(out[token], sum(parts))


def test_packed_weights_are_weights() -> None:
    x, weight, bias = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(5)
    packed, out = operators.convert_weight_packed(weight), torch.empty(3, 5).bfloat16()
    operators.write_packed_linear(out, x, packed, bias, True)
    expected = torch.nn.functional.linear(x, weight, bias.bfloat16())
    assert torch.equal(out, expected)
    assert torch.equal(operators.weight_packed_linear(x, packed, bias, True), expected)


@pytest.mark.engine
def test_packed_weights_are_taken_as_vllm_hands_them_over() -> None:
    """In a process of its own: the operators are defined while vLLM imports what calls them."""
    pytest.importorskip("vllm")
    program = """
import torch, vllm._custom_ops as calls
x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
if hasattr(calls, "weight_packed_linear_cpu"):
    found = calls.weight_packed_linear_cpu(x, torch.ops._C.convert_weight_packed(weight), 5, None)
else:
    found = torch.ops._C.weight_packed_linear(x, torch.ops._C.convert_weight_packed(weight), None, True)
assert torch.equal(found, torch.nn.functional.linear(x, weight))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_a_seeded_sample_follows_the_distribution_and_its_seed() -> None:
    probabilities = torch.tensor([0.7, 0.25, 0.05, 0.0])
    logits, seeds = probabilities.log().expand(4000, -1), torch.arange(4000)
    chosen = operators.fused_gumbel_argmax(logits, seeds)
    assert torch.equal(chosen, operators.fused_gumbel_argmax(logits, seeds))
    shares = torch.bincount(chosen, minlength=4) / 4000
    # Five standard deviations of a share.
    assert (shares - probabilities).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert operators.greedy_argmax(logits[:2]).tolist() == [0, 0]
