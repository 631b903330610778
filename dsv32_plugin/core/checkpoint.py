"""What a checkpoint stores, by its config.json: the name and the shape of every tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.quantisation import FLOAT, FP8, INT8, PACKED, POWER, SIZES, Part, Scheme

INDEX = "model.safetensors.index.json"
PACKED_MODULES = {
    "q_index_kv_a_proj": ["q_a_proj", "indexer.wk", "kv_a_proj_with_mqa"],
    "q_kv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Our module -> the modules of the checkpoint that it joins."""
_KINDS = {
    **dict.fromkeys(("F64", "F32", "F16", "BF16"), FLOAT),
    "F8_E4M3": FP8,
    "F8_E8M0": POWER,
    "I8": INT8,
    "I32": PACKED,
    "I64": SIZES,
}
"""Types of tensors, as safetensors call them."""


class Stored(NamedTuple):
    """One tensor as the published checkpoints have it."""

    name: str
    shape: tuple[int, ...]
    float32: bool = False
    """In float32 whatever the checkpoint's dtype."""
    plain: bool = False
    """A matrix that a block-fp8 checkpoint does not quantise."""
    unused: bool = False
    """A checkpoint may have it, and no model reads it: the indexer of a layer that shares a selection."""


def parameters(config: DsaConfig) -> int:
    """How many numbers a checkpoint holds that repeats embedding and head in its draft layers."""
    return sum(math.prod(tensor.shape) for tensor in tensors(config) if not tensor.unused)


class Matrix(NamedTuple):
    """A matrix that is stored in parts."""

    scheme: Scheme
    rows: int
    columns: int

    def parts(self, module: str) -> dict[str, Part]:
        """Name of each tensor -> what it is."""
        return {f"{module}.{suffix}": part for suffix, part in self.scheme.parts(self.rows, self.columns).items()}


def parts(config: DsaConfig) -> dict[str, Part]:
    """Every tensor that a checkpoint may have; of a matrix that is quantised, its parts and its plain form."""
    found = {tensor.name: Part(tensor.shape, FLOAT) for tensor in tensors(config)}
    for module, matrix in matrices(config).items():
        found |= matrix.parts(module)
    return found


def matrices(config: DsaConfig) -> dict[str, Matrix]:
    """Module -> its matrix, of those that are quantised by the checkpoint's config."""
    found = {}
    for tensor in tensors(config) if config.quantisation is not None else ():
        module = tensor.name.removesuffix(".weight")
        if len(tensor.shape) == 2 and (scheme := scheme_of(config, module)) is not None:
            found[module] = Matrix(scheme, *tensor.shape)
    return found


def scheme_of(config: DsaConfig, module: str) -> Scheme | None:
    return None if config.quantisation is None else config.quantisation.scheme(module)


def alike(config: DsaConfig, prefix: str) -> bool:
    """Whether the matrices that a module of ours joins are stored alike, so that it can be quantised as one."""
    parent, _, name = prefix.rpartition(".")
    return len({scheme_of(config, f"{parent}.{part}") for part in PACKED_MODULES[name]}) == 1


def check_alike(config: DsaConfig) -> None:
    """Raise ConfigError unless the matrices that an engine multiplies at once are stored alike.

    These are all experts of a layer, and the two of a feed-forward block that share their input.
    """
    for layer in range(config.num_layers + config.num_nextn_predict_layers) if config.quantisation is not None else ():
        prefix = f"model.layers.{layer}.mlp"
        if not config.is_moe(layer):
            _check_alike(config, [f"{prefix}.gate_proj", f"{prefix}.up_proj"])
            continue
        names = [tensor.name.removesuffix(".weight") for tensor in _moe(prefix, config)]
        _check_alike(config, [name for name in names if ".experts." in name])
        _check_alike(config, [f"{prefix}.shared_experts.gate_proj", f"{prefix}.shared_experts.up_proj"])


def _check_alike(config: DsaConfig, modules: list[str]) -> None:
    first = scheme_of(config, modules[0])
    for module in modules:
        if (scheme := scheme_of(config, module)) != first:
            forms = ["not quantised" if form is None else form.name for form in (first, scheme)]
            raise ConfigError(
                "quantization_config",
                f"one format for what is multiplied at once, {modules[0]} is {forms[0]}",
                f"{module}: {forms[1]}",
                "quantise both or neither; a name among the modules that are left out may match too little or too much",
            )


def tensors(config: DsaConfig) -> Iterator[Stored]:
    """Every tensor of a checkpoint that is not quantised, in the order of the layers."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Stored("model.embed_tokens.weight", vocabulary, plain=True)
    for layer in range(config.num_layers + config.num_nextn_predict_layers):
        yield from _layer(f"model.layers.{layer}", config, layer)
    for layer in range(config.num_layers, config.num_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        yield Stored(f"{prefix}.embed_tokens.weight", vocabulary, plain=True)
        yield _norm(f"{prefix}.enorm", config.hidden_size)
        yield _norm(f"{prefix}.hnorm", config.hidden_size)
        yield _linear(f"{prefix}.eh_proj", config.hidden_size, 2 * config.hidden_size, plain=True)
        yield _norm(f"{prefix}.shared_head.norm", config.hidden_size)
        yield Stored(f"{prefix}.shared_head.head.weight", vocabulary, plain=True)
    yield _norm("model.norm", config.hidden_size)
    yield Stored("lm_head.weight", vocabulary, plain=True)


def _layer(prefix: str, config: DsaConfig, layer: int) -> Iterator[Stored]:
    yield _norm(f"{prefix}.input_layernorm", config.hidden_size)
    yield from _attention(f"{prefix}.self_attn", config)
    for tensor in _indexer(f"{prefix}.self_attn.indexer", config):
        yield tensor._replace(unused=not config.selects(layer))
    yield _norm(f"{prefix}.post_attention_layernorm", config.hidden_size)
    if config.is_moe(layer):
        yield from _moe(f"{prefix}.mlp", config)
    else:
        yield from _mlp(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)


def _attention(prefix: str, config: DsaConfig) -> Iterator[Stored]:
    heads, latent = config.num_heads, config.kv_lora_rank
    yield _linear(f"{prefix}.q_a_proj", config.q_lora_rank, config.hidden_size)
    yield _norm(f"{prefix}.q_a_layernorm", config.q_lora_rank)
    yield _linear(f"{prefix}.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
    yield _linear(f"{prefix}.kv_a_proj_with_mqa", latent + config.qk_rope_head_dim, config.hidden_size)
    yield _norm(f"{prefix}.kv_a_layernorm", latent)
    yield _linear(f"{prefix}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield _linear(f"{prefix}.o_proj", config.hidden_size, heads * config.v_head_dim)


def _indexer(prefix: str, config: DsaConfig) -> Iterator[Stored]:
    yield _linear(f"{prefix}.wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
    yield _linear(f"{prefix}.wk", config.index_head_dim, config.hidden_size)
    yield _norm(f"{prefix}.k_norm", config.index_head_dim, float32=True)
    yield Stored(f"{prefix}.k_norm.bias", (config.index_head_dim,), float32=True)
    yield _linear(f"{prefix}.weights_proj", config.index_n_heads, config.hidden_size, plain=True)


def _moe(prefix: str, config: DsaConfig) -> Iterator[Stored]:
    yield _linear(f"{prefix}.gate", config.n_routed_experts, config.hidden_size, plain=True)
    yield Stored(f"{prefix}.gate.e_score_correction_bias", (config.n_routed_experts,), float32=True)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{prefix}.experts.{expert}", config.hidden_size, config.moe_intermediate_size)
    shared = config.moe_intermediate_size * config.n_shared_experts
    yield from _mlp(f"{prefix}.shared_experts", config.hidden_size, shared)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[Stored]:
    yield _linear(f"{prefix}.gate_proj", intermediate, hidden)
    yield _linear(f"{prefix}.up_proj", intermediate, hidden)
    yield _linear(f"{prefix}.down_proj", hidden, intermediate)


def _linear(name: str, outputs: int, inputs: int, *, plain: bool = False) -> Stored:
    return Stored(f"{name}.weight", (outputs, inputs), plain=plain)


def _norm(name: str, size: int, *, float32: bool = False) -> Stored:
    return Stored(f"{name}.weight", (size,), float32=float32)


SHARED_WITH_TARGET = (".embed_tokens.weight", ".shared_head.head.weight")
"""Of a draft layer: GLM-5 leaves them out, DeepSeek repeats the target's."""


def unknown(config: DsaConfig, names: Iterable[str]) -> list[str]:
    """Of the names of a checkpoint's tensors those that the model has no place for."""
    known = parts(config)
    return [name for name in names if name not in known and not name.endswith("rotary_emb.inv_freq")]


def lacking(config: DsaConfig, names: Collection[str], *, drafts: bool) -> list[str]:
    """What a checkpoint lacks, by the names of its tensors: of its layers, or of its draft layers."""
    stored, split = set(names), matrices(config)
    found: list[str] = []
    for tensor in tensors(config):
        layer = layer_of(tensor.name)
        is_draft = layer is not None and layer >= config.num_layers
        if tensor.unused or is_draft != drafts or (is_draft and tensor.name.endswith(SHARED_WITH_TARGET)):
            continue
        module = tensor.name.removesuffix(".weight")
        needed = split[module].parts(module) if module in split and len(tensor.shape) == 2 else {tensor.name: None}
        # A matrix may be stored as it is, although by the config it is not; its name alone does not say.
        is_plain = tensor.name in stored and (tensor.plain or tensor.name not in needed)
        if not is_plain:
            found += [name for name in needed if name not in stored]
    return found


def layer_of(name: str) -> int | None:
    """The layer that a checkpoint's tensor belongs to."""
    split = name.split(".", 3)
    return int(split[2]) if split[:2] == ["model", "layers"] else None


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> shard, of the index of a checkpoint's folder; None where it has none.

    Raises:
        ValueError: the file is cut off, or is no index.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error!r}; copy the index again") from error
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"checkpoint: {path}: expected a weight_map of file names; copy the index again")
    return where


def check_shards(folder: Path) -> None:
    """Raise ValueError for a shard that a folder's index names and the folder lacks, with a tensor of it."""
    where = read_index(folder) or {}
    absent = sorted({shard for shard in where.values() if not (folder / shard).exists()})
    if absent:
        tensor = min(name for name, shard in where.items() if shard == absent[0])
        raise ValueError(
            f"checkpoint: {len(absent)} of {len(set(where.values()))} shards that {INDEX} names are missing, "
            f"among them {absent[0]} with {tensor}; copy them to {folder}"
        )


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    kind: str
    """The file's word for a type that no tensor of a checkpoint has."""
    dtype: str


def headers(folder: Path) -> dict[str, Header] | None:
    """Every tensor of a folder of safetensors, from the headers alone; None where there are no such files.

    Raises:
        ValueError: the index is no index, a shard is missing, is cut off or is no safetensors file, or a tensor is not
            where the index says.
    """
    from safetensors import SafetensorError, safe_open

    where: Mapping[str, str] = read_index(folder) or {}
    shards = sorted(set(where.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        return None
    found = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dict
                    part = file.get_slice(name)
                    dtype = part.get_dtype()
                    found[name] = Header(tuple(part.get_shape()), _KINDS.get(dtype, dtype), dtype)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint: {folder / shard} cannot be read: {error}; copy the shard again") from error
    if absent := where.keys() - found.keys():
        raise ValueError(
            f"checkpoint: {len(absent)} tensors of {INDEX} are in no shard, among them {min(absent)}; "
            "do index and shards belong together?"
        )
    return found
