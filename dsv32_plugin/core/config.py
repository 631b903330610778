"""What a DeepSeek Sparse Attention checkpoint's `config.json` says, checked once, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dsv32_plugin.core import quantisation, relatives
from dsv32_plugin.core.quantisation import Quantisation
from dsv32_plugin.kernels.cache_layout import LATENT_RANK, ROPE_DIM
from dsv32_plugin.kernels.limits import MAX_TOPK

DEEPSEEK_V32 = "DeepseekV32ForCausalLM"
GLM_MOE_DSA = "GlmMoeDsaForCausalLM"
ARCHITECTURES = {"deepseek_v32": DEEPSEEK_V32, "glm_moe_dsa": GLM_MOE_DSA}
ENCODED = (DEEPSEEK_V32,)
"""Those whose conversations our encoder renders, where no template does; the others bring a template."""

_MISSING = object()
_INDEX_DIMS = (16, 32, 64, 128, 256)
_LAYER_TYPES = {"indexed_attention", "deepseek_sparse_attention"}
"""What Transformers and GLM-5.2 call a layer with sparse attention."""
_ROPE_TYPES = {"default": "default", "yarn": "yarn", "deepseek_yarn": "yarn"}
_T = TypeVar("_T")


class ConfigError(ValueError):
    """A key of the checkpoint's config is missing, malformed or not supported."""

    def __init__(self, key: str, expected: str, got: Any, then: str) -> None:
        came = "nothing" if got is None else repr(got)
        super().__init__(f"config key {key}: expected {expected}, got {came}; {then}")
        self.key = key


@dataclass(frozen=True)
class DsaConfig:
    """The sizes and switches of one checkpoint, in the field's names.

    Build it with `from_hf`, which checks everything that does not depend on the deployment; `check` does the rest.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    index_rope_interleave: bool
    indexer_types: tuple[str, ...]
    """For each layer "full" (it selects) or "shared" (it reuses the selection of the last full layer)."""
    mlp_layer_types: tuple[str, ...]
    """For each layer "dense" or "sparse" (a mixture of experts)."""
    rms_norm_eps: float
    rope: Mapping[str, Any]
    """`rope_theta`, `rope_type` ("default" or "yarn") and, for yarn, its own keys."""
    max_position_embeddings: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    scoring_func: str
    num_nextn_predict_layers: int
    quantisation: Quantisation | None
    """How the checkpoint stores its matrices, None where it has them as they are."""

    @classmethod
    def from_hf(cls, config: Any) -> DsaConfig:
        """Read a config.json as a dict, or a Hugging Face config object; raises ConfigError."""
        read = _Reader(config)
        architecture = _architecture(read)
        layers = read.size("num_hidden_layers")
        topk_method = read("topk_method", str, default="noaux_tc")
        if topk_method != "noaux_tc":
            raise ConfigError("topk_method", "'noaux_tc'", topk_method, "no other router is supported")
        scoring_func = read("scoring_func", str, default="sigmoid")
        if scoring_func != "sigmoid":
            raise ConfigError("scoring_func", "'sigmoid'", scoring_func, "no other router is supported")
        hidden_act = read("hidden_act", str, default="silu")
        if hidden_act != "silu":
            raise ConfigError("hidden_act", "'silu'", hidden_act, "no other activation is supported")
        if read("attention_bias", bool, default=False):
            raise ConfigError("attention_bias", "false", True, "biases in the attention are not supported")
        if read("tie_word_embeddings", bool, default=False):
            raise ConfigError("tie_word_embeddings", "false", True, "tied embeddings are not supported")

        _refuse_variants(read)
        made = cls(
            architecture=architecture,
            vocab_size=read.size("vocab_size"),
            hidden_size=read.size("hidden_size"),
            intermediate_size=read.size("intermediate_size"),
            moe_intermediate_size=read.size("moe_intermediate_size"),
            num_layers=layers,
            num_heads=read.size("num_attention_heads"),
            q_lora_rank=read.size("q_lora_rank"),
            kv_lora_rank=read.size("kv_lora_rank"),
            qk_nope_head_dim=read.size("qk_nope_head_dim"),
            qk_rope_head_dim=read.size("qk_rope_head_dim"),
            v_head_dim=read.size("v_head_dim"),
            index_n_heads=read.size("index_n_heads"),
            index_head_dim=read.size("index_head_dim"),
            index_topk=read.size("index_topk", most=MAX_TOPK),
            index_rope_interleave=read("indexer_rope_interleave", bool, default=architecture == GLM_MOE_DSA),
            indexer_types=_indexer_types(read, layers),
            mlp_layer_types=_mlp_layer_types(read, layers),
            rms_norm_eps=read("rms_norm_eps", float),
            rope=_rope(read),
            max_position_embeddings=read.size("max_position_embeddings"),
            n_routed_experts=read.size("n_routed_experts"),
            n_shared_experts=read.size("n_shared_experts"),
            num_experts_per_tok=read.size("num_experts_per_tok"),
            n_group=read.size("n_group", default=1),
            topk_group=read.size("topk_group", default=1),
            norm_topk_prob=read("norm_topk_prob", bool),
            routed_scaling_factor=read("routed_scaling_factor", float),
            scoring_func=scoring_func,
            num_nextn_predict_layers=read.size("num_nextn_predict_layers", default=0, least=0),
            quantisation=_quantisation(read),
        )
        made._check_shapes()
        return made

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def selects(self, layer: int) -> bool:
        """Whether this layer has an indexer of its own; the others reuse the selection of the last one that does.

        Layers past the last one (multi-token prediction) always select.
        """
        return layer >= self.num_layers or self.indexer_types[layer] == "full"

    def is_moe(self, layer: int) -> bool:
        """Whether this layer is a mixture of experts; multi-token prediction layers are."""
        return layer >= self.num_layers or self.mlp_layer_types[layer] == "sparse"

    @property
    def routes_in_float32(self) -> bool:
        """Whether the router multiplies in float32: GLM's does, DeepSeek's in the model's dtype."""
        return self.architecture == GLM_MOE_DSA

    def check_kernels(self) -> None:
        """Raise ConfigError for a size that the kernels of GPUs do not have; the references take any."""
        for key, value, fits, expected in (
            ("kv_lora_rank", self.kv_lora_rank, self.kv_lora_rank == LATENT_RANK, LATENT_RANK),
            ("qk_rope_head_dim", self.qk_rope_head_dim, self.qk_rope_head_dim == ROPE_DIM, ROPE_DIM),
            (
                "index_head_dim",
                self.index_head_dim,
                self.index_head_dim in _INDEX_DIMS,
                "a power of two from 16 to 256",
            ),
        ):
            if not fits:
                raise ConfigError(key, f"{expected} on a GPU", value, "such a model runs on a CPU only")

    def check(self, tp_size: int, *, attention: int | None = None, experts: int | None = None) -> None:
        """Raise ConfigError unless the model can be cut over `tp_size` ranks.

        Args:
            attention: ranks over which the heads are cut, where it is not all.
            experts: likewise of each expert.
        """
        for key, value, size in (
            ("num_attention_heads", self.num_heads, attention or tp_size),
            ("intermediate_size", self.intermediate_size, tp_size),
            ("moe_intermediate_size", self.moe_intermediate_size, experts or tp_size),
        ):
            if value % size:
                raise ConfigError(
                    key, f"a multiple of the tensor parallel size {size}", value, "choose a size that divides it"
                )

    def _check_shapes(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ConfigError("qk_rope_head_dim", "an even number", self.qk_rope_head_dim, "rope turns pairs")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(
                "index_head_dim",
                f"at least qk_rope_head_dim ({self.qk_rope_head_dim})",
                self.index_head_dim,
                "the first qk_rope_head_dim values of an index head are rotated",
            )
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                "n_group", f"a divisor of n_routed_experts ({self.n_routed_experts})", self.n_group, "fix the config"
            )
        group_size = self.n_routed_experts // self.n_group
        if group_size < 2:
            raise ConfigError(
                "n_group",
                f"groups of two experts or more (n_routed_experts is {self.n_routed_experts})",
                self.n_group,
                "a group is ranked by the sum of its best two",
            )
        if self.topk_group > self.n_group:
            raise ConfigError("topk_group", f"at most n_group ({self.n_group})", self.topk_group, "fix the config")
        if self.num_experts_per_tok > self.topk_group * group_size:
            raise ConfigError(
                "num_experts_per_tok",
                f"at most the {self.topk_group * group_size} experts of topk_group groups",
                self.num_experts_per_tok,
                "fix the config",
            )


class _Reader:
    """Typed look-ups in a dict or in a config object; None counts as missing."""

    def __init__(self, config: Any) -> None:
        self._get: Callable[[str], Any] = (
            (lambda key: config.get(key)) if isinstance(config, Mapping) else (lambda key: getattr(config, key, None))
        )

    def raw(self, key: str) -> Any:
        return self._get(key)

    def __call__(self, key: str, kind: Callable[[Any], _T], *, default: Any = _MISSING) -> _T:
        value = self._get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(
                    key, "a value", None, "is this a DeepSeek Sparse Attention checkpoint with its own config.json?"
                )
            value = default
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):  # type: ignore[arg-type]
            name = getattr(kind, "__name__", str(kind))
            raise ConfigError(key, f"a value of type {name}", value, "fix the checkpoint's config.json")
        return kind(value)

    def size(self, key: str, *, default: Any = _MISSING, least: int = 1, most: int | None = None) -> int:
        value = self(key, int, default=default)
        if value < least:
            raise ConfigError(key, f"an integer of at least {least}", value, "fix the checkpoint's config.json")
        if most is not None and value > most:
            raise ConfigError(key, f"an integer of at most {most}", value, "the kernels select no more keys")
        return value


def _architecture(read: _Reader) -> str:
    model_type = read.raw("model_type")
    named = read.raw("architectures") or [ARCHITECTURES.get(str(model_type), model_type)]
    known = tuple(ARCHITECTURES.values())
    if named[0] not in known:
        lacking = relatives.needs(str(named[0]), str(model_type))
        then = "this plugin does not serve it"
        if lacking is not None:
            then += f": its indexer is the same, but it would need {lacking}"
        raise ConfigError("architectures", f"one of {', '.join(known)}", named[0], then)
    return str(named[0])


def _refuse_variants(read: _Reader) -> None:
    """Raise ConfigError for what Transformers' classes of these architectures do not compute either, or differently."""
    if not read("rope_interleave", bool, default=True):
        raise ConfigError("rope_interleave", "true", False, "the attention's rope turns neighbours")
    if (dtype := read("moe_router_dtype", str, default="float32")) != "float32":
        raise ConfigError("moe_router_dtype", "'float32'", dtype, "no other is supported")
    if read("mlp_bias", bool, default=False):
        raise ConfigError("mlp_bias", "false", True, "biases in the experts are not supported")
    if strange := sorted(set(read.raw("layer_types") or ()) - _LAYER_TYPES):
        raise ConfigError("layer_types", " or ".join(sorted(_LAYER_TYPES)), strange[0], "all layers are sparse")


def _indexer_types(read: _Reader, layers: int) -> tuple[str, ...]:
    """An explicit list wins over a pattern, a pattern over the schedule, as in transformers' GlmMoeDsaConfig."""
    key = "indexer_types" if read.raw("indexer_types") is not None else "index_topk_pattern"
    given = read.raw(key)
    if given is None:
        every = max(read("index_topk_freq", int, default=1), 1)
        offset = read("index_skip_topk_offset", int, default=2)
        key = "index_skip_topk_offset"
        types = ["full" if max(layer - offset + 1, 0) % every == 0 else "shared" for layer in range(layers)]
    else:
        types = [{"F": "full", "S": "shared"}.get(mark, mark) for mark in given]
    if len(types) < layers or not set(types) <= {"full", "shared"}:
        raise ConfigError(key, f"'full'/'shared' (or 'F'/'S') for each of {layers} layers", given, "fix the config")
    if types[0] != "full":
        raise ConfigError(
            key, "a first layer that selects", given or read.raw(key), "layer 0 has no earlier selection to share"
        )
    return tuple(types[:layers])


def _mlp_layer_types(read: _Reader, layers: int) -> tuple[str, ...]:
    given = read.raw("mlp_layer_types")
    if given is not None:
        if len(given) != layers or not set(given) <= {"dense", "sparse"}:
            raise ConfigError("mlp_layer_types", f"'dense' or 'sparse' for each of {layers} layers", given, "fix it")
        return tuple(given)
    dense = read.size("first_k_dense_replace", least=0)
    every = read.size("moe_layer_freq", default=1)
    return tuple("sparse" if layer >= dense and layer % every == 0 else "dense" for layer in range(layers))


def _rope(read: _Reader) -> Mapping[str, Any]:
    """One dict from `rope_parameters` (transformers 5) or from `rope_scaling` and `rope_theta` (checkpoints)."""
    key = "rope_parameters" if read.raw("rope_parameters") else "rope_scaling"
    rope = {"rope_theta": read.raw("rope_theta"), **(read.raw(key) or {})}
    rope_type = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if rope_type not in _ROPE_TYPES:
        raise ConfigError(key, f"a rope type among {', '.join(_ROPE_TYPES)}", rope_type, "no other is supported")
    needed = ["rope_theta"]
    if _ROPE_TYPES[rope_type] == "yarn":
        needed += ["factor", "original_max_position_embeddings"]
    for name in needed:
        if not isinstance(rope.get(name), (int, float)):
            full_name = name if name == "rope_theta" else f"{key}.{name}"
            raise ConfigError(full_name, "a number", rope.get(name), "fix the checkpoint's config.json")
    return {**rope, "rope_type": _ROPE_TYPES[rope_type]}


def _quantisation(read: _Reader) -> Quantisation | None:
    """compressed-tensors has written its own under another key, too; both engines take either."""
    key = "quantization_config" if read.raw("quantization_config") else "compression_config"
    try:
        return quantisation.read(read.raw(key))
    except quantisation.Unsupported as refusal:
        inner, *rest = refusal.args
        raise ConfigError(f"{key}.{inner}", *rest) from refusal
