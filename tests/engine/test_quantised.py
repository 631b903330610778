"""Checkpoints in other formats than block-fp8: read right, dequantised once, served as what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import client
import pytest
import quantised
import torch
from checkpoints import Build
from engines import installed
from oracle import clear_cut, dequantized_weights
from quantised import KINDS

from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.dequantise import Gatherer
from dsv32_plugin.tools.tiny import TinySpec

ENGINE = installed()
pytestmark = pytest.mark.engine
Checkpoints = Callable[[TinySpec], Path]
SMALL = replace(TinySpec.glm_defaults(), num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8, mtp=False)


@pytest.fixture(scope="module", params=KINDS)
def folders(
    request: pytest.FixtureRequest, checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A quantised checkpoint, and what it stands for."""
    if request.param == "w4a16-ordered" and not quantised.library_orders():
        pytest.skip("compressed-tensors from 0.20 on writes no order of activations")
    return quantised.write(checkpoint(SMALL), tmp_path_factory.mktemp("quantised"), KINDS[request.param])


def test_every_matrix_is_read_as_its_own_library_does(folders: tuple[Path, Path]) -> None:
    found, truth = (dequantized_weights(folder) for folder in folders)
    assert found.keys() == truth.keys()
    for name, number in truth.items():
        assert torch.equal(found[name], number), name


def test_packed_as_vllm_packs() -> None:
    """AWQ's and GPTQ's own libraries are not here; vLLM has packers of its own, for tests of its kernels."""
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    value_kn = torch.randint(0, 16, (64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert torch.equal(quantised._pack(value_kn.long(), quantised.AWQ_ORDER), utils.awq_pack(value_kn, 4, 64, 48))
    assert torch.equal(quantised._pack(value_kn.T.long()).T, utils.gptq_pack(value_kn, 4, 64, 48))


def test_any_order_and_any_cut_gives_the_same(folders: tuple[Path, Path]) -> None:
    from safetensors.torch import load_file

    stored = load_file(folders[0] / "model.safetensors")
    config = DsaConfig.from_hf(json.loads((folders[0] / "config.json").read_text()))
    gatherer = Gatherer(checkpoint.matrices(config))
    found: dict[str, torch.Tensor] = {}
    for name in sorted(stored, key=lambda name: name[::-1]):
        found.update(gatherer.dequantised([(name, stored[name])], keep=True))
    assert found.keys() == dequantized_weights(folders[1]).keys()
    assert not gatherer.incomplete()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they are repacked for the engine's kernels")
def test_the_model_is_built_as_what_it_stands_for(build: Build, folders: tuple[Path, Path]) -> None:
    """On a CPU, where all of it is dequantised."""
    found, truth = (dict(build(folder).named_parameters()) for folder in folders)
    assert found.keys() == truth.keys()
    assert [name for name, parameter in truth.items() if not torch.equal(found[name], parameter)] == []


@pytest.mark.wide
@pytest.mark.parametrize("folders", ["w4a8"], indirect=True)
def test_it_is_served_as_what_it_stands_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """With `compression_config`, and matrices of two formats."""
    truths = clear_cut(folders[1], (17, 130, 300), 16)
    with ENGINE.serve(folders[0], tmp_path / "server.log") as url:
        answers = client.complete_together(url, [truth.prompt for truth in truths], 16, ENGINE.complete)
    for answer, truth in zip(answers, truths, strict=True):
        assert answer.tokens == truth.tokens
        assert answer.logprobs == pytest.approx(truth.logprobs, abs=1e-3)
