"""Weights that change under a running engine: in any buckets the model becomes the new one, or stays the old one."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import SPEC, Build, edit_weight
from engines import installed
from safetensors.torch import load_file

from dsv32_plugin.core.checkpoint import INDEX
from dsv32_plugin.tools.tiny import TinySpec

building = import_module(f"building_{installed().name}")
pytestmark = pytest.mark.engine

Checkpoints = Callable[[TinySpec], Path]
Stored = list[tuple[str, torch.Tensor]]
FP8 = replace(SPEC, fp8=True, hidden_size=128)
GLM = replace(
    TinySpec.glm_defaults(), hidden_size=64, num_hidden_layers=3, num_attention_heads=2, index_topk_pattern="FSF"
)
SPECS = [pytest.param(SPEC, id="float32"), pytest.param(FP8, id="fp8"), pytest.param(GLM, id="glm")]


def stored(folder: Path) -> Stored:
    """In the order of their names."""
    found = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return sorted(found.items())


def buckets(tensors: Stored, order: str) -> Iterator[Stored]:
    """`tensors` in parts: matrices and their scales come in different ones but for "bucketed"."""
    if order == "one-by-one":
        tensors = random.Random(0).sample(tensors, len(tensors))
    elif order == "scales-first":
        tensors = sorted(tensors, key=lambda item: not item[0].endswith("_scale_inv"))
    elif order == "scales-last":
        tensors = sorted(tensors, key=lambda item: item[0].endswith("_scale_inv"))
    size = 1 if order == "one-by-one" else 17
    for first in range(0, len(tensors), size):
        yield tensors[first : first + size]


ORDERS = ["one-by-one", "scales-first", "scales-last", "bucketed"]


@contextmanager
def nothing(model: torch.nn.Module) -> Iterator[None]:
    yield


@contextmanager
def layerwise(model: torch.nn.Module) -> Iterator[None]:
    """What vLLM's `reload_weights` and its weight transfer do around an update."""
    if installed().name != "vllm":
        pytest.skip("vLLM's")
    from vllm.config import ModelConfig
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    yield
    finalize_layerwise_reload(model, object.__new__(ModelConfig))


AROUND = [pytest.param(nothing, id="in-place"), pytest.param(layerwise, id="layerwise")]


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def differing(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> list[str]:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    # A padded vocabulary has rows that mean nothing.
    return [name for name, parameter in found.items() if not torch.equal(parameter, expected[name])]


def scrambled(bucket: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Whoever sent a bucket may use its memory again."""
    for _, tensor in bucket:
        tensor.view(torch.uint8).fill_(3)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spec", SPECS)
def test_in_any_buckets_the_model_becomes_the_new_one(
    build: Build, checkpoint: Checkpoints, spec: TinySpec, order: str, around: Callable
) -> None:
    """The first bucket was refused: the rest of the checkpoint was missing."""
    new = checkpoint(replace(spec, seed=1))
    expected = parameters(build(new))
    model = build(checkpoint(spec))
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert differing(model, expected)
    with around(model):
        for bucket in buckets(stored(new), order):
            model.load_weights(bucket)
            if around is nothing:
                scrambled(bucket)
    assert differing(model, expected) == []
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses, "as graphs know"


BAD = [
    pytest.param("model.layers.1.mlp.gate.wait", lambda tensor: tensor, "is not a weight of", id="unknown"),
    pytest.param("model.layers.7.input_layernorm.weight", lambda tensor: tensor, "is not a weight of", id="layer"),
    pytest.param(
        "model.layers.0.self_attn.kv_b_proj.weight", lambda tensor: tensor[:-1], "does not fit the sizes", id="shape"
    ),
    pytest.param(
        "model.layers.1.mlp.experts.3.up_proj.weight", lambda tensor: tensor.T, "does not fit the sizes", id="expert"
    ),
    pytest.param("lm_head.weight", lambda tensor: tensor.to(torch.float8_e4m3fn), "is fp8", id="dtype"),
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("name", "change", "says"), BAD)
def test_a_bucket_that_is_refused_changes_nothing(
    build: Build, checkpoint: Checkpoints, name: str, change: Callable, says: str, around: Callable
) -> None:
    model = build(checkpoint(SPEC))
    before = parameters(model)
    tensors = dict(stored(checkpoint(replace(SPEC, seed=1))))
    bad = change(tensors.get(name, tensors["model.norm.weight"])).contiguous()
    with around(model):
        with pytest.raises(ValueError, match=f"checkpoint: {name}") as error:
            model.load_weights([*tensors.items(), (name, bad)])
        assert says in str(error.value)
        assert differing(model, before) == []
    assert differing(model, before) == []
    # And the next update is taken.
    with around(model):
        model.load_weights(list(tensors.items()))
    assert len(differing(model, before)) == len(before)


@pytest.mark.parametrize("around", AROUND)
def test_an_update_that_was_given_up_leaves_nothing_to_the_next(
    build: Build, checkpoint: Checkpoints, around: Callable
) -> None:
    """A scale that waits was taken for that of the next update's matrix."""
    first, second = (checkpoint(replace(FP8, seed=seed)) for seed in (1, 2))
    expected = parameters(build(second))
    model = build(checkpoint(FP8))
    with around(model):
        model.load_weights([item for item in stored(first) if item[0].endswith("scale_inv")])
    for order in ("scales-last", "one-by-one", "scales-first"):
        with around(model):
            model.load_weights([item for item in stored(first) if not item[0].endswith("scale_inv")][:40])
        with around(model):
            for bucket in buckets(stored(second), order):
                model.load_weights(bucket)
        assert differing(model, expected) == []


def test_a_model_that_started_with_made_up_weights_takes_buckets(build: Build, checkpoint: Checkpoints) -> None:
    """As trainers start servers, `--load-format dummy`: the first call of all is no whole checkpoint."""
    folder = checkpoint(SPEC)
    expected = parameters(build(folder))
    model = build(folder, load_format="dummy")
    for bucket in buckets(stored(folder), "one-by-one"):
        model.load_weights(bucket)
    assert differing(model, expected) == []


@pytest.mark.parametrize("spec", [pytest.param(SPEC, id="float32"), pytest.param(FP8, id="fp8")])
def test_a_thousand_updates_leave_nothing_behind(build: Build, checkpoint: Checkpoints, spec: TinySpec) -> None:
    """What a bucket leaves is what the next one replaces."""
    model, rounds = build(checkpoint(spec)), 1000
    # All but the vocabulary, which is most of the bytes.
    versions = [
        [
            item
            for item in stored(checkpoint(replace(spec, seed=seed)))
            if "embed" not in item[0] and "head" not in item[0]
        ]
        for seed in (1, 2)
    ]
    used = []
    for update in range(rounds):
        for bucket in buckets(versions[update % 2], "bucketed"):
            model.load_weights(bucket)
        if update in (rounds // 10, rounds - 1):
            used.append(psutil.Process().memory_info().rss)
    one = sum(tensor.nbytes for _, tensor in versions[0])
    assert used[1] - used[0] < 20 * one, f"{used[1] - used[0]} bytes more, a version has {one}"


def test_a_good_folder_is_taken(build: Build, checkpoint: Checkpoints) -> None:
    """A reload by vLLM left `kv_b_proj` as it was."""
    new = checkpoint(replace(FP8, seed=1))
    expected = parameters(build(new))
    model = build(checkpoint(FP8))
    building.update_from_disk(model, new)
    assert differing(model, expected) == []


def without_a_layer(folder: Path) -> None:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    for name in [name for name in names if name.startswith("model.layers.1.")]:
        edit_weight(folder, name, lambda tensor: {})


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def with_a_shard_cut_off(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])


def with_another_width(folder: Path) -> None:
    edit_weight(folder, "model.norm.weight", lambda tensor: {"model.norm.weight": tensor[:-1].clone()})


def with_a_name_of_no_tensor(folder: Path) -> None:
    edit_weight(folder, "model.norm.weight", lambda tensor: {"model.norm.weight": tensor, "model.norm.w": tensor + 1})


def without_a_scale(folder: Path) -> None:
    edit_weight(folder, "model.layers.0.self_attn.q_a_proj.weight_scale_inv", lambda tensor: {})


def with_an_index_that_is_none(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def with_bytes_for_fp8(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_a_proj.weight"
    edit_weight(folder, name, lambda tensor: {name: tensor.view(torch.uint8)})


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(without_a_layer, "weights are missing, among them model.layers.1.", id="layer"),
        pytest.param(without_a_shard, "cannot be read", id="shard"),
        pytest.param(with_a_shard_cut_off, "cannot be read", id="cut"),
        pytest.param(with_another_width, "model.norm.weight (127,) does not fit the sizes", id="shape"),
        pytest.param(with_a_name_of_no_tensor, "model.norm.w is not a weight of", id="unknown"),
        pytest.param(without_a_scale, "q_a_proj.weight_scale_inv", id="scale"),
        pytest.param(with_an_index_that_is_none, "copy the index again", id="index"),
        pytest.param(with_bytes_for_fp8, "q_a_proj.weight is U8; expected", id="bytes"),
        pytest.param(gone, "", id="gone"),
    ],
)
def test_a_bad_folder_is_an_error_and_the_old_weights_serve_on(
    build: Build, checkpoint: Checkpoints, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    """SGLang went back to the bad folder, and its server ended; vLLM's model was left without parameters."""
    model = build(checkpoint(FP8))
    # What came in buckets is in no folder.
    model.load_weights([("lm_head.weight", torch.ones_like(dict(stored(checkpoint(FP8)))["lm_head.weight"]))])
    before = parameters(model)
    folder = Path(shutil.copytree(checkpoint(replace(FP8, seed=1)), tmp_path / "new"))
    damage(folder)
    with pytest.raises(Exception, match=re.escape(says)):
        building.update_from_disk(model, folder)
    assert differing(model, before) == []


def test_a_path_that_no_system_has_is_an_error(build: Build, checkpoint: Checkpoints) -> None:
    """It ended SGLang's server, which answers with an error now."""
    model = build(checkpoint(FP8))
    before = parameters(model)
    with pytest.raises(ValueError if installed().name == "sglang" else OSError, match="too long"):
        building.update_from_disk(model, Path("a" * 5000))
    assert differing(model, before) == []
