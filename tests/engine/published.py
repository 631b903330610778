"""What published checkpoints say of themselves: the facts of their config.json, and folders made of them.

Sources, read in stored copies of the model pages, of Transformers' classes (5.24) and of public tests that pin these
files: zai-org/GLM-5, GLM-5-FP8, GLM-5.1, GLM-5.2, GLM-5.2-FP8, GLM-5.3 (block-fp8 itself), deepseek-ai/DeepSeek-V3.2,
-V3.2-Exp, -V3.2-Speciale; gpustack/GLM-5.3-W4A8, PhalaCloud/GLM-5.3-W4AFP8, mconcat/GLM-5.1-FP8-Dynamic,
QuantTrio/GLM-5-AWQ, nvidia/GLM-5.2-NVFP4. No file of theirs is copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {**BLOCK_FP8, "scale_fmt": "ue8m0"},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

GLM_5: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "attention_bias": False,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": [154820, 154827, 154829],
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 78,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 154820,
    "pretraining_tp": 1,
    "q_lora_rank": 2048,
    "qk_head_dim": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}

SELECTING = (0, 1, 2, *range(6, 78, 4))
"""The layers of GLM-5.2 and 5.3 that have an indexer."""

GLM_52: dict[str, Any] = {
    **GLM_5,
    "index_share_for_mtp_iteration": True,
    "index_skip_topk_offset": 3,
    "index_topk_freq": 4,
    "index_topk_pattern": None,
    "indexer_types": ["full" if layer in SELECTING else "shared" for layer in range(78)],
    "layer_types": ["deepseek_sparse_attention"] * 78,
    "max_position_embeddings": 1048576,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "moe_router_dtype": "float32",
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
}

GLM_FP8 = {**BLOCK_FP8, "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}

_DYNAMIC = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}
W4A8 = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*weights_proj$", "re:.*eh_proj$"],
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "targets": ["re:.*mlp.experts.*"],
            "weights": {"group_size": 128, "num_bits": 4, "strategy": "group", "symmetric": True, "type": "int"},
            "input_activations": _DYNAMIC,
        },
        "group_1": {
            "format": "float-quantized",
            "targets": ["Linear"],
            "weights": {"block_structure": [128, 128], "num_bits": 8, "strategy": "block", "type": "float"},
            "input_activations": _DYNAMIC,
        },
    },
}
FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*weights_proj$", "re:.*eh_proj$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
            "input_activations": _DYNAMIC,
        }
    },
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": ["self_attn", "shared_experts", "mlp.gate.", "model.layers.0.", "model.layers.78."],
}
W4AFP8 = {"quant_method": "w4afp8", "linear_activation_scheme": "dynamic", "moe_activation_scheme": "static"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "config_groups": {}}

CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3.2": V32,
    "DeepSeek-V3.2-Exp": V32,
    "DeepSeek-V3.2-Speciale": V32,
    "GLM-5": GLM_5,
    "GLM-5-FP8": {**GLM_5, "quantization_config": GLM_FP8},
    "GLM-5.1": GLM_5,
    "GLM-5.2": GLM_52,
    "GLM-5.2-FP8": {**GLM_52, "quantization_config": GLM_FP8},
    "GLM-5.3": {**GLM_52, "quantization_config": GLM_FP8},
    "GLM-5.3-W4A8": {**GLM_52, "compression_config": W4A8},
    "GLM-5.1-FP8-Dynamic": {**GLM_5, "quantization_config": FP8_DYNAMIC},
    "GLM-5-AWQ": {**GLM_5, "quantization_config": AWQ},
}
"""Those that are served."""

REFUSED: dict[str, dict[str, Any]] = {
    "GLM-5.3-W4AFP8": {**GLM_52, "quantization_config": W4AFP8},
    "GLM-5.2-NVFP4": {**GLM_52, "quantization_config": NVFP4},
}

TEMPLATES = {
    "DeepSeek-V3.2-Exp": "{{ bos_token }}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' }}",
    **dict.fromkeys(
        ("GLM-5", "GLM-5-FP8", "GLM-5.1", "GLM-5.2", "GLM-5.2-FP8", "GLM-5-AWQ", "GLM-5.1-FP8-Dynamic"),
        "[gMASK]<sop>{% if enable_thinking %}{% endif %}{{ '<tool_call>' + tc.name }}<arg_key>k</arg_key><arg_value>",
    ),
    **dict.fromkeys(
        ("GLM-5.3", "GLM-5.3-W4A8"),
        "[gMASK]<sop>Reasoning Effort: {{ '<tool_call>' + tc.name }}<arg_key>k</arg_key><arg_value>",
    ),
}
"""The marks of chat templates by which both engines know them; those that are not here have none."""


def write(folder: Path, name: str, names: Callable[[dict[str, Any]], Iterable[str]] | None = None) -> Path:
    """A folder of JSON files; `names` says which tensors its index has, no index without it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = (CONFIGS | REFUSED)[name]
    put = {"config.json": config, "tokenizer.json": {"version": "1.0"}, "tokenizer_config.json": {}}
    if names is not None:
        found = sorted(names(config))
        shards = {tensor: f"model-{1 + at % 4:05d}-of-00004.safetensors" for at, tensor in enumerate(found)}
        put["model.safetensors.index.json"] = {"metadata": {}, "weight_map": shards}
    for file, content in put.items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    if name in TEMPLATES:
        (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    return folder
