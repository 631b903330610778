"""Loading and updating a model from a checkpoint's tensors, without an engine."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsv32_plugin.core import checkpoint, weights
from dsv32_plugin.core.block_fp8 import SCALE_SUFFIX, dequantise, quantise
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.tools.tiny import BLOCK, TinySpec

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
SPEC = TinySpec(**SMALL, fp8=True, mtp=True)
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"


def config(spec: TinySpec = SPEC) -> DsaConfig:
    return DsaConfig.from_hf({**spec.config(), "vocab_size": 32})


def stored(spec: TinySpec, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors; matrices that are not plain in fp8."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for tensor in checkpoint.tensors(config(spec)):
        value = torch.empty(tensor.shape).normal_(generator=generator)
        if spec.fp8 and len(tensor.shape) == 2 and not tensor.plain:
            found[tensor.name], found[tensor.name + SCALE_SUFFIX] = quantise(value, BLOCK)
        elif not tensor.unused:
            found[tensor.name] = value
    return found


class Model:
    """A parameter for each tensor of the target's layers; with `dequantise_all` none for scales."""

    def __init__(self, spec: TinySpec = SPEC, *, dequantise_all: bool = True) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        targets = {}
        for name, tensor in stored(spec, 0).items():
            layer = checkpoint.layer_of(name)
            is_dequantised = dequantise_all or ".kv_b_proj." in name
            if (layer is not None and layer >= spec.num_hidden_layers) or (is_dequantised and "scale" in name):
                continue
            module = nn.Module()
            dtype = torch.float32 if is_dequantised else tensor.dtype
            module.value = nn.Parameter(torch.zeros(tensor.shape, dtype=dtype), requires_grad=False)
            self.parameters[name] = module.value
            targets[name] = weights.Target(name, module, ("value",), lambda parameter, tensor: parameter.copy_(tensor))
        self.loader = weights.Loader(config(spec), targets.items())

    def differs_from(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        wrong = []
        for name, parameter in self.parameters.items():
            expected = tensors[name]
            if expected.dtype == torch.float8_e4m3fn and parameter.dtype == torch.float32:
                expected = dequantise(expected, tensors[name + SCALE_SUFFIX], BLOCK)
            if not torch.equal(parameter.float(), expected.float()):
                wrong.append(name)
        return wrong


@pytest.mark.parametrize("dequantise_all", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_any_buckets_in_any_order(dequantise_all: bool, seed: int) -> None:
    """Several updates one after another, some of them given up in the middle."""
    model, choose = Model(dequantise_all=dequantise_all), random.Random(seed)
    model.loader.load(stored(SPEC, 0).items(), whole=True)
    assert model.differs_from(stored(SPEC, 0)) == []
    for update in range(1, 5):
        tensors = stored(SPEC, update)
        given_up, whole = (choose.sample(list(tensors.items()), len(tensors)) for _ in range(2))
        for part in (given_up[: choose.randrange(len(given_up))], whole):
            while part:
                size = choose.randrange(1, 40)
                bucket = [(name, tensor.clone()) for name, tensor in part[:size]]
                model.loader.load(bucket, whole=False)
                for _, tensor in bucket:
                    tensor.view(torch.uint8).fill_(7)  # its sender uses the memory again
                part = part[size:]
        assert model.differs_from(tensors) == []


def test_the_start_needs_every_tensor_and_an_update_none() -> None:
    tensors = stored(SPEC, 1)
    del tensors[KV_B + SCALE_SUFFIX], tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"3 weights are missing, among them model\.layers\.1\.self_attn\.kv_b"):
        Model().loader.load(tensors.items(), whole=True)
    assert Model().loader.load([], whole=False) == set()


def test_what_was_loaded_is_told() -> None:
    tensors, model = stored(SPEC, 1), Model()
    assert model.loader.load([(KV_B, tensors[KV_B])], whole=False) == set()
    scale = KV_B + SCALE_SUFFIX
    assert model.loader.load([(scale, tensors[scale])], whole=False) == {f"{KV_B}.value"}


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        pytest.param("model.norm.wait", torch.zeros(64), "is not a weight of DeepseekV32ForCausalLM", id="unknown"),
        pytest.param("model.layers.3.enorm.weight", torch.zeros(64), "is not a weight of", id="layer"),
        pytest.param("model.norm.weight", torch.zeros(63), r"\(63,\) does not fit .* it is \(64,\)", id="shape"),
        pytest.param("model.norm.weight_scale_inv", torch.zeros(1, 1), "is not a weight of", id="scale"),
        pytest.param(
            "model.norm.weight", torch.zeros(64).to(torch.float8_e4m3fn), "is fp8, but the model's is a float", id="fp8"
        ),
        # Codes of fp8 as another type's: they were taken for the weights themselves.
        pytest.param(KV_B, stored(SPEC, 1)[KV_B].view(torch.uint8), "is torch.uint8; expected float32", id="bytes"),
        pytest.param(KV_B, stored(SPEC, 1)[KV_B].view(torch.float8_e5m2), "is torch.float8_e5m2; expected", id="e5m2"),
        pytest.param(
            KV_B + SCALE_SUFFIX,
            stored(SPEC, 1)[KV_B + SCALE_SUFFIX].to(torch.float8_e8m0fnu).view(torch.uint8),
            "is torch.uint8; expected float32, bfloat16, float16 or float8_e8m0fnu",
            id="bytes-of-a-scale",
        ),
        pytest.param(
            "model.norm.weight", torch.zeros(64, dtype=torch.int64), "is torch.int64; expected", id="integers"
        ),
    ],
)
def test_one_bad_tensor_and_its_bucket_changes_nothing(name: str, tensor: torch.Tensor, says: str) -> None:
    model, before = Model(dequantise_all=False), stored(SPEC, 0)
    model.loader.load(before.items(), whole=True)
    with pytest.raises(ValueError, match=f"checkpoint: {name} .*{says}|checkpoint: {name} {says}"):
        model.loader.load([*stored(SPEC, 1).items(), (name, tensor)], whole=False)
    assert model.differs_from(before) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_floats_of_a_trainer_are_quantised_where_the_model_is_fp8(dtype: torch.dtype) -> None:
    """They were refused: a trainer had to quantise as the checkpoint's makers did."""
    model = Model(dequantise_all=False)
    model.loader.load(stored(SPEC, 0).items(), whole=True)
    expected, floats = stored(SPEC, 1), stored(SPEC, 1)
    for name in [name for name in floats if name.endswith(SCALE_SUFFIX)]:
        weight = name.removesuffix(SCALE_SUFFIX)
        floats[weight] = dequantise(floats[weight], floats.pop(name), BLOCK).to(dtype)
    model.loader.load(list(floats.items()), whole=False)
    # Values that are fp8 already come back as they are, with a scale that is no larger.
    wrong = []
    for name, parameter in model.parameters.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = model.parameters.get(name + SCALE_SUFFIX)
        found = parameter.float() if scale is None else dequantise(parameter.data, scale.data, BLOCK)
        truth = floats.get(name, expected[name]).float()
        if not torch.equal(found, truth):
            wrong.append(name)
    assert wrong == []


def test_a_start_takes_no_floats_for_fp8() -> None:
    """There a matrix that is missing from the list of those that are not quantised would be served in fp8."""
    tensors, name = stored(SPEC, 0), "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = torch.zeros(64, 1024)
    with pytest.raises(ValueError, match=f"checkpoint: {name} is a float, but the model's is fp8"):
        Model(dequantise_all=False).loader.load(tensors.items(), whole=True)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    where = {name: f"{sum(map(ord, name)) % 2}.safetensors" for name in tensors}
    for shard in set(where.values()):
        save_file({name: tensors[name].contiguous() for name in tensors if where[name] == shard}, folder / shard)
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": where}))


DRAFT = "model.layers.2.enorm.weight"


@pytest.mark.parametrize(
    ("without", "drafts", "says"),
    [
        pytest.param([], True, None, id="good"),
        pytest.param(["model.norm.weight"], False, "among them model.norm.weight", id="a-tensor"),
        pytest.param([KV_B + SCALE_SUFFIX], False, "kv_b_proj.weight_scale_inv", id="a-scale"),
        pytest.param([DRAFT], True, f"among them {DRAFT}", id="a-draft-layers"),
        pytest.param([DRAFT], False, None, id="a-draft-layers-that-nobody-reads"),
        pytest.param(["model.layers.2.embed_tokens.weight"], True, None, id="what-drafts-share"),
    ],
)
def test_a_folder_is_judged_by_its_headers(tmp_path: Path, without: list[str], drafts: bool, says: str | None) -> None:
    write(tmp_path, {name: tensor for name, tensor in stored(SPEC, 1).items() if name not in without})
    loader = Model().loader
    if says is None:
        loader.check_folder(tmp_path, drafts=drafts)
    else:
        with pytest.raises(ValueError, match=f"1 weights are missing, .*{says}"):
            loader.check_folder(tmp_path, drafts=drafts)


def test_a_folder_of_damaged_shards(tmp_path: Path) -> None:
    loader = Model().loader
    loader.check_folder(tmp_path)  # other files than safetensors are not judged
    write(tmp_path, stored(SPEC, 1))
    shard = tmp_path / "0.safetensors"
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[:100], b""):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"0\.safetensors cannot be read: .*; copy the shard again"):
            loader.check_folder(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"0\.safetensors cannot be read"):
        loader.check_folder(tmp_path)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "1.safetensors")
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="are in no shard, among them"):
        loader.check_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 1}}', b"\xff", None],
    ids=["empty", "half", "list", "no-map", "a-list-for-a-map", "no-file-name", "not-utf-8", "folder"],
)
def test_a_folder_with_a_damaged_index(tmp_path: Path, content: str | bytes | None) -> None:
    """Some were a KeyError or a TypeError, which ended SGLang's server."""
    write(tmp_path, stored(SPEC, 1))
    index = tmp_path / checkpoint.INDEX
    index.unlink()
    if content is None:
        index.mkdir()
    else:
        index.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match="copy the index again"):
        Model().loader.check_folder(tmp_path)


def test_a_folder_of_another_type(tmp_path: Path) -> None:
    tensors = stored(SPEC, 1)
    write(tmp_path, {**tensors, KV_B: tensors[KV_B].view(torch.float8_e5m2)})
    with pytest.raises(ValueError, match=f"{KV_B} is F8_E5M2; expected"):
        Model().loader.check_folder(tmp_path)


def test_the_latent_up_projection_takes_its_own_heads() -> None:
    from dsv32_plugin.core.latent_up import LatentUpProjection

    sizes = config()
    whole = torch.randn(sizes.num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), sizes.kv_lora_rank)
    part = LatentUpProjection(sizes, 2, tp_rank=1)
    ((name, target),) = weights.latent_up_targets("model.layers.1.self_attn.kv_up", part)
    target.load(whole)
    assert name == KV_B
    keys, values = whole.unflatten(0, (sizes.num_heads, -1))[2:4].split(
        [sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1
    )
    assert torch.equal(part.w_uk_hdc, keys)
    assert torch.equal(part.w_uv_hcv, values.transpose(1, 2))
