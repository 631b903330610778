"""index_logits and index_topk in Triton and in Gluon against float64.

On a GPU, and at tiny sizes under Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch

import cases
import oracles

pytest.importorskip("triton")

from dsv32_plugin.kernels.ops.index_logits import reference
from dsv32_plugin.kernels.ops.index_logits.triton import Config
from dsv32_plugin.kernels.runtime.dispatch import implementation_for, implementation_module, named

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
either = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs a GPU or the interpreter")
ON_HOPPER = DEVICE == "cuda" and implementation_for("index_logits_paged", "cuda").name == "hopper"
DTYPES = [torch.uint8, torch.float32] if INTERPRETED or not HAS_GPU else [torch.uint8, torch.bfloat16, torch.float32]
HEADS = 4 if INTERPRETED or not HAS_GPU else 64

# Hopper's fp8 product aligns the 32 terms of one step to the largest and keeps about 13 bits below it.
FP8_STEP, FP8_EPS = 32, 2.0**-13
LENGTH = 128 + 64


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or not HAS_GPU, reason="needs a GPU")(test))


def judge(actual, exact, dtype):
    if dtype == torch.uint8 and DEVICE == "cuda":
        cases.assert_close_to_float64(actual, exact, length=FP8_STEP, accumulator_eps=FP8_EPS)
    else:
        cases.assert_close_to_float64(actual, exact, length=LENGTH)


class Operations:
    """The operations of one implementation; results are written into NaN."""

    def __init__(self, name):
        self.name = name
        self.logits_paged, self.logits_ragged = named("index_logits_paged", name), named("index_logits_ragged", name)
        self.module = implementation_module("index_logits", name)
        self.topk, self.topk_paged = named("index_topk_ragged", name), named("index_topk_paged", name)

    def paged(self, inputs, **config):
        sequences, tokens = inputs["visible_bn"].shape
        out = torch.full((sequences, tokens, inputs["max_visible"]), float("nan"), device=inputs["q_bnid"].device)
        return self.logits_paged(**inputs, out=out, **config)

    def ragged(self, inputs):
        out = torch.full((len(inputs["q_tid"]), len(inputs["k_sd"])), float("nan"), device=inputs["q_tid"].device)
        return self.logits_ragged(**inputs, out=out)


@pytest.fixture(params=["triton", "hopper"] if ON_HOPPER else ["triton"])
def kernels(request):
    return Operations(request.param)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", __file__, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@either
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_paged(kernels, dtype, tokens):
    inputs = cases.index_logits_paged_inputs(
        [70, 0, 131, 5], tokens, HEADS, dtype=dtype, page_padding=64, max_visible=150, device=DEVICE
    )
    judge(kernels.paged(inputs), oracles.index_logits_paged(**inputs), dtype)


@either
@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_that_are_absent(kernels, page_size):
    inputs = cases.index_logits_paged_inputs([256], 2, HEADS, page_size=page_size, device=DEVICE)
    inputs["block_table_bp"][0, :3] = torch.tensor([-1, 2**30, -(2**31)], dtype=torch.int32)
    inputs["visible_bn"] += 1000
    inputs["max_visible"] = 400
    inputs["block_table_bp"] = inputs["block_table_bp"][:, :4]
    configs = (Config(1, 128, 4, 2), Config(2, 64, 4, 2)) if kernels.name == "triton" else ()
    for config in ({}, *({"config": config} for config in configs)):
        judge(kernels.paged(inputs, **config), oracles.index_logits_paged(**inputs), torch.uint8)


@either
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged(kernels, dtype):
    inputs = cases.index_logits_ragged_inputs(
        [70, 0, 41], [9, 0, 13], HEADS, dtype=dtype, strided=dtype != torch.uint8, device=DEVICE
    )
    judge(kernels.ragged(inputs), oracles.index_logits_ragged(**inputs), dtype)


@either
def test_ranges_that_are_empty_or_reversed_see_nothing(kernels):
    inputs = cases.index_logits_ragged_inputs([6], heads=HEADS, dtype=torch.float32, device=DEVICE)
    inputs["start_t"].copy_(torch.tensor([0, 3, 6, 5, 0, 6]))
    inputs["end_t"].copy_(torch.tensor([0, 3, 6, 2, 6, 0]))
    assert kernels.ragged(inputs).isfinite().sum(1).tolist() == [0, 0, 0, 0, 6, 0]


@either
def test_bytes_and_values_are_the_same(kernels):
    inputs = cases.index_logits_ragged_inputs([80], [6], HEADS, device=DEVICE)
    as_bytes = {**inputs, "q_tid": inputs["q_tid"].view(torch.uint8), "k_sd": inputs["k_sd"].view(torch.uint8)}
    assert torch.equal(kernels.ragged(inputs), kernels.ragged(as_bytes))


@either
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_topk_in_chunks(kernels, rows):
    inputs = cases.index_logits_ragged_inputs([70, 41], [9, 13], HEADS, device=DEVICE)
    selected = kernels.topk(**inputs, topk=16, workspace_bytes=4 * 112 * rows)
    logits = kernels.ragged(inputs)
    cases.assert_topk_exact(selected, logits, inputs["start_t"], inputs["end_t"], 16)


@either
@pytest.mark.parametrize("tokens", [1, 2])
def test_what_is_selected_whole_is_not_scored(kernels, tokens):
    inputs = cases.index_logits_paged_inputs([70, 5, 131, 16], tokens, HEADS, device=DEVICE)
    expected = kernels.paged(inputs)
    del inputs["max_visible"]
    out = torch.full_like(expected, float("nan"))
    kernels.module.launch_paged(**inputs, out=out, fill=False, selected=16)
    for seq, visible in enumerate(inputs["visible_bn"].max(1).values.tolist()):
        if visible > 16:
            assert torch.equal(out[seq, :, :visible], expected[seq, :, :visible])
        else:
            assert out[seq].isnan().all()


@either
@pytest.mark.parametrize("sequences", [1, 1000])
@pytest.mark.parametrize("longest", [131, 5000])
def test_paged_topk_whatever_bound_it_is_given(kernels, sequences, longest):
    """A graph captured for long sequences gives short ones the same slots, and reads no score that was not written."""
    inputs = cases.index_logits_paged_inputs([70, 0, 131, 5], 2, HEADS, device=DEVICE)
    visible, table = inputs["visible_bn"], inputs["block_table_bp"]
    logits = kernels.paged(inputs).flatten(0, 1)
    inputs["max_visible"] = longest
    slots = kernels.topk_paged(**inputs, topk=16, workspace_bytes=8 * longest * sequences)
    positions = torch.full((8, 16), -1, dtype=torch.int32, device=DEVICE)
    for row, slot in enumerate(slots.flatten(0, 1)):
        seq = row // 2
        of_slot = {int(page) * 64 + i: p * 64 + i for p, page in enumerate(table[seq]) for i in range(64)}
        found = [of_slot[int(s)] for s in slot if s >= 0]
        positions[row, : len(found)] = torch.tensor(found, dtype=torch.int32)
    cases.assert_topk_exact(positions, logits, None, visible.flatten(), 16)


@either
def test_topk_resolves_slots_across_chunks(kernels):
    inputs = cases.index_logits_ragged_inputs([60, 60], [20, 20], HEADS, device=DEVICE)
    table = torch.arange(8, dtype=torch.int32, device=DEVICE).flip(0).view(2, 4)
    position = kernels.topk(**inputs, topk=16, workspace_bytes=4 * 120 * 8)
    slots = kernels.topk(**inputs, topk=16, workspace_bytes=4 * 120 * 8, block_table_bp=table, page_size=16)
    seq = torch.arange(40, device=DEVICE).unsqueeze(1) // 20
    assert torch.equal(slots, table[seq, position // 16] * 16 + position % 16)


def assert_like_reference(got, expected):
    """Against the reference, which has its own tests; float64 by the token would take minutes."""
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    error = (got - expected)[finite].abs().max() / expected[finite].abs().max()
    assert error < 8 * FP8_STEP**0.5 * FP8_EPS


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("lengths", [[4000, 0, 8192, 1, 2500], [1500, 0, 37] * 40], ids=["long", "many"])
def test_paged_at_size(kernels, lengths, tokens):
    """Many sequences leave each program more pages than it has buffers."""
    inputs = cases.index_logits_paged_inputs(lengths, tokens, 64, device=DEVICE)
    assert_like_reference(kernels.paged(inputs), reference.index_logits_paged(**inputs))


@gpu
def test_ragged_at_size(kernels):
    inputs = cases.index_logits_ragged_inputs([9000, 701], [300, 13], 64, device=DEVICE)
    assert_like_reference(kernels.ragged(inputs), reference.index_logits_ragged(**inputs))


@gpu
def test_offsets_past_two_gigabytes(kernels):
    """The last page of a cache of 2^31 bytes and more, and the last row of a result of 2^31 elements and more."""
    pages = 2**31 // (64 * 132) + 10
    cache = torch.zeros(pages, 64, 132, dtype=torch.uint8, device=DEVICE)
    inputs = cases.index_logits_paged_inputs([64], 1, 64, device=DEVICE)
    cache[-1] = inputs["index_cache"][int(inputs["block_table_bp"][0, 0])]
    table = torch.full((1, 1), pages - 1, dtype=torch.int32, device=DEVICE)
    far = {**inputs, "index_cache": cache, "block_table_bp": table}
    assert torch.equal(kernels.paged(far), kernels.paged(inputs))


@gpu
def test_a_sequence_does_not_see_the_others(kernels):
    inputs = cases.index_logits_paged_inputs([3000, 700, 2000], 2, 64, device=DEVICE)
    together = kernels.paged(inputs)
    part = ("q_bnid", "weights_bni", "block_table_bp", "visible_bn")
    for seq in range(3):
        alone = {name: value[seq : seq + 1] if name in part else value for name, value in inputs.items()}
        assert torch.equal(kernels.paged(alone)[0], together[seq])


@gpu
def test_topk_at_size(kernels):
    inputs = cases.index_logits_ragged_inputs([9000, 3000], [300, 100], 64, device=DEVICE)
    selected = kernels.topk(**inputs, topk=2048, workspace_bytes=4 * 12000 * 128)
    cases.assert_topk_exact(selected, kernels.ragged(inputs), inputs["start_t"], inputs["end_t"], 2048)
