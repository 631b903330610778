"""What `dsv32 train-tiny` trains: the sizes of the model and the paper's three stages, small."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dsv32_plugin.core.config import DEEPSEEK_V32, DsaConfig
from dsv32_plugin.training.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

StageKind = Literal["dense", "warmup", "sparse"]

TRAINED_LENGTH = 4096

MODEL: dict[str, Any] = {
    "architectures": [DEEPSEEK_V32],
    "model_type": "deepseek_v32",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "hidden_size": 256,
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 64,
    "intermediate_size": 512,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    # transformers reads this older name too, and it must agree with n_routed_experts.
    "num_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "use_cache": True,
}


@dataclass(frozen=True)
class Stage:
    """Steps at one context length after another; the learning rate warms up once and falls as a cosine over all."""

    kind: StageKind
    lengths: tuple[tuple[int, int], ...]
    """(context length, steps), in order."""
    tokens_per_step: int
    matrix_lr: float
    """Muon's, for matrices."""
    lr: float
    """AdamW's, for embeddings, the head, norms, the router; in the warm-up for everything."""
    warmup_steps: int = 50
    probes: int = 0
    """Queries of each sequence on which the indexer learns; 0 trains no indexer."""

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.lengths)


@dataclass(frozen=True)
class Recipe:
    """All that decides the result, but for the machine."""

    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage("dense", ((512, 400), (TRAINED_LENGTH, 600)), 65536, 0.01, 2e-3),
        Stage("warmup", ((TRAINED_LENGTH, 200),), 65536, 0.0, 2e-3, warmup_steps=20, probes=192),
        Stage("sparse", ((TRAINED_LENGTH, 200),), 65536, 2e-3, 4e-4, warmup_steps=20, probes=192),
    )
    needle_share: float = 0.6
    context_weight: float = 0.05
    """What a token of the prompt counts in the language model's loss, where one of an answer counts 1."""
    mtp_weight: float = 0.3
    indexer_weight: float = 1.0
    balance_speed: float = 1e-3
    clip_norm: float = 1.0
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))

    @property
    def config(self) -> DsaConfig:
        return DsaConfig.from_hf(self.model)

    def resized(self, **sizes: Any) -> Recipe:
        return replace(self, model={**self.model, **sizes})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
