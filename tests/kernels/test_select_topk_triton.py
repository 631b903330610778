"""select_topk in Triton is the exact selection on adversarial scores, whichever way a row is split; so is select_mask.

On a GPU at real sizes, and at tiny sizes under Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch

import cases

pytest.importorskip("triton")

from dsv32_plugin.kernels.limits import mask_words
from dsv32_plugin.kernels.ops.select_topk import reference
from dsv32_plugin.kernels.ops.select_topk.triton import Config, choose, launch, select_mask, select_topk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
either = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs a GPU or the interpreter")


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or not HAS_GPU, reason="needs a GPU")(test))


LISTS = {
    "short": None,
    "whole": Config(True, 1, 128, 256, 128, 1),
    "split": Config(True, 2, 128, 256, 128, 1),
}
"""Tiny blocks, so that small rows take every path: registers, list, plateau, memory."""


def select(inputs, config=None, **table):
    tokens, topk = len(inputs["logits_ts"]), inputs["topk"]
    out = torch.full((tokens, topk), -7, dtype=torch.int32, device=inputs["logits_ts"].device)
    if config is None:
        return select_topk(**inputs, **table, out=out)
    launch(inputs["logits_ts"], inputs["start_t"], inputs["end_t"], topk, None, None, None, 1, 0, out, config)
    return out


def select_bits(inputs, config=None):
    """[T, S] bool from a mask in rows that are further apart than they are long."""
    tokens, width = inputs["logits_ts"].shape
    wide = torch.full((tokens, mask_words(width) + 5), -7, dtype=torch.int32, device=inputs["logits_ts"].device)
    mask = wide[:, : mask_words(width)]
    if config is None:
        select_mask(**inputs, out=mask)
    else:
        mask.zero_()
        arguments = inputs["logits_ts"], inputs["start_t"], inputs["end_t"], inputs["topk"]
        launch(*arguments, None, None, None, 1, 0, mask, config, bits=True)
    assert (wide[:, mask_words(width) :] == -7).all()
    key = torch.arange(32 * mask.shape[1], device=mask.device)
    bits = mask[:, 4 * (key // 128) + key % 8 // 2] >> (2 * (key % 128 // 8) + key % 2) & 1
    assert not bits[:, width:].any()
    return bits[:, :width].bool()


def check(inputs, config=None):
    selected = select(inputs, config)
    assert torch.equal(selected, reference.select_topk(**inputs))
    bits = select_bits(inputs, config)
    for t, row in enumerate(bits):
        start = 0 if inputs["start_t"] is None else max(0, int(inputs["start_t"][t]))
        assert torch.equal(row.nonzero().squeeze(1) - start, selected[t][selected[t] >= 0].long())
    return selected


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", __file__, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


interpreted = pytest.mark.skipif(not INTERPRETED, reason="tiny blocks, for the interpreter")


@interpreted
@pytest.mark.parametrize("kind", ["random", "all_zero", "zero_plateau", "narrow_band", "ascending", "huge"])
@pytest.mark.parametrize("path", LISTS)
def test_paths(kind, path):
    check(cases.select_topk_inputs(kind, 3, 900, 20), LISTS[path])


@interpreted
@pytest.mark.parametrize("ranges", ["random", "empty", "fewer_than_k", "long_short_long"])
def test_ranges(ranges):
    for config in LISTS.values():
        check(cases.select_topk_inputs("quantised", 7, 500, 20, ranges=ranges, strided=True), config)


@interpreted
def test_nan_infinity_and_signed_zero():
    inputs = cases.select_topk_inputs("signed_zeros", 4, 300, 40)
    inputs["logits_ts"][0] = float("-inf")
    inputs["logits_ts"][1, ::3] = float("nan")
    inputs["logits_ts"][2, ::3] = float("inf")
    inputs["logits_ts"][3] = float("nan")
    for config in LISTS.values():
        check(inputs, config)


@either
def test_slots():
    inputs = cases.to(cases.select_topk_inputs("random", 6, 200, 30), DEVICE)
    table = torch.arange(39, dtype=torch.int32).flip(0).view(3, 13)
    table[1, 2] = -1
    table[2, 3] = 2**27 + 1
    table = table.to(DEVICE)
    for seq in (None, torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32, device=DEVICE)):
        resolved = {"block_table_bp": table, "seq_t": seq, "page_size": 16}
        assert torch.equal(select(inputs, **resolved), reference.select_topk(**inputs, **resolved))


@either
def test_no_rows():
    inputs = cases.to(cases.select_topk_inputs("random", 0, 200, 30), DEVICE)
    assert select(inputs).shape == (0, 30)


@pytest.mark.parametrize("topk", [1, 64, 1024, 2048, 4096])
@pytest.mark.parametrize("width", [1, 8192, 8193, 32768, 131072, 1 << 20])
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 4096, 200_000])
def test_configurations_hold_the_answer(rows, width, topk):
    config = choose(rows, width, topk, 132)
    assert config.long == (width > config.block)
    assert config.block >= min(width, 2 * topk)
    assert config.splits == 1 or config.splits * rows <= 132
    if config.long:
        assert config.tile % (128 * config.num_warps) == 0
        assert config.sample % (128 * config.num_warps) == 0


@gpu
@pytest.mark.parametrize("kind", cases.SCORES)
@pytest.mark.parametrize(("tokens", "width"), [(3, 8192), (2, 131072), (140, 20000)], ids=["short", "split", "whole"])
def test_scores(kind, tokens, width):
    check(cases.select_topk_inputs(kind, tokens, width, 2048, device=DEVICE))


@gpu
@pytest.mark.parametrize("ranges", cases.RANGES)
@pytest.mark.parametrize(("tokens", "width"), [(7, 4099), (7, 65537), (300, 16384)], ids=["short", "split", "whole"])
@pytest.mark.parametrize("topk", [1, 100, 2048])
def test_ranges_at_size(ranges, tokens, width, topk):
    check(cases.select_topk_inputs("random", tokens, width, topk, ranges=ranges, strided=True, device=DEVICE))


@gpu
@pytest.mark.parametrize("topk", [2048, 4096])
def test_a_million_keys(topk):
    check(cases.select_topk_inputs("random", 3, 1 << 20, topk, device=DEVICE))


@gpu
@pytest.mark.parametrize("count", [500, 1500, 4000, 20_000])
def test_candidates_in_one_place(count):
    """In one of 32 chunks: its list is longer than its share, than the other lists together, than all may be."""
    inputs = cases.select_topk_inputs("random", 2, 131072, 2048, device=DEVICE)
    inputs["logits_ts"][:, 50_000 : 50_000 + count] += 20
    check(inputs)


@gpu
def test_more_rows_than_a_grid_dimension():
    inputs = cases.select_topk_inputs("random", 1, 300, 8, device=DEVICE)
    logits = torch.randn(200_000, 300, device=DEVICE)
    inputs |= {"logits_ts": logits, "end_t": torch.full((200_000,), 300, dtype=torch.int32, device=DEVICE)}
    check(inputs)


@gpu
def test_the_batch_does_not_matter():
    inputs = cases.select_topk_inputs("quantised", 256, 40000, 2048, device=DEVICE)
    together = check(inputs)
    for row in (0, 100, 255):
        alone = {**inputs, "logits_ts": inputs["logits_ts"][row : row + 1], "end_t": inputs["end_t"][row : row + 1]}
        assert torch.equal(select(alone)[0], together[row])
    assert torch.equal(select(inputs), together)


@gpu
def test_lengths_change_under_a_captured_graph():
    inputs = cases.select_topk_inputs("random", 4, 65536, 2048, device=DEVICE)
    table = torch.randperm(4 * 1024, device=DEVICE).int().view(4, 1024)
    resolved = {"block_table_bp": table, "page_size": 64}
    out = select(inputs, **resolved)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        select_topk(**inputs, **resolved, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_topk(**inputs, **resolved, out=out)
    for lengths in ([65536, 1, 0, 30000], [0, 0, 0, 0], [2048, 2049, 4096, 8193]):
        inputs["end_t"].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, reference.select_topk(**inputs, **resolved))
