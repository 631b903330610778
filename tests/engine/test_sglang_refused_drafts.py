"""Which draft models SGLang is not served with: said at start-up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from building_sglang import builder
from checkpoints import SPEC, Build

from dsv32_plugin.tools.tiny import TinySpec

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    with builder() as build:
        yield build


@pytest.mark.parametrize("algorithm", ["EAGLE", "STANDALONE"])
def test_another_draft_model_is_refused(
    build: Build, checkpoint: Callable[[TinySpec], Path], tmp_path: Path, algorithm: str
) -> None:
    model = checkpoint(SPEC)
    other = shutil.copytree(model, tmp_path / "other")
    with pytest.raises(NotImplementedError, match="--speculative-") as error:
        build(model, speculative_algorithm=algorithm, speculative_draft_model_path=str(other))
    says = f"expected nothing, got {other}" if algorithm == "EAGLE" else "expected EAGLE, got STANDALONE"
    assert says in str(error.value)


def test_drafts_without_a_draft_layer_are_refused(build: Build, checkpoint: Callable[[TinySpec], Path]) -> None:
    with pytest.raises(ValueError, match="config key num_nextn_predict_layers: expected 1 for --speculative-algorithm"):
        build(checkpoint(SPEC), speculative_algorithm="EAGLE")
