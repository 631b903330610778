"""What must hold before a request is served: supported options, and code that is really ours."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from dsv32_plugin import settings
from dsv32_plugin.core import chat_format, checkpoint
from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.quantisation import BlockFp8
from dsv32_plugin.engines import SGLANG
from dsv32_plugin.kernels.cache_layout import PAGE_SIZE, PAGE_SIZE_MULTIPLE
from dsv32_plugin.sglang_adapter import arguments
from dsv32_plugin.sglang_adapter.arguments import attention_backends, model_config
from dsv32_plugin.sglang_adapter.names import BACKEND_NAME, DRAFT_MODEL_PATH, MODEL_PATH, MODELS
from dsv32_plugin.sglang_adapter.options import REFUSED
from dsv32_plugin.sglang_adapter.upstream import get_pp_indices, installed_version

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)
IN_TREE_HINT = "set DSV32_PLUGIN=0 for SGLang's own code"
KV_CACHE_DTYPES = ("auto", "bfloat16", "bf16", "fp8_e4m3")
A2A_BACKENDS = ("none", "deepep")
MAX_DRAFTS = 7
"""Their kernels take up to 8 tokens of a sequence, of which the first is no draft."""


def read_config(options: Any) -> DsaConfig:
    """The checkpoint's config as it is stored, with `--json-model-override-args` applied.

    Not as Transformers has it, which puts a default of its own where a key is missing.
    """
    stored, _ = PretrainedConfig.get_config_dict(options.model_path, revision=options.revision)
    return DsaConfig.from_hf({**stored, **json.loads(options.json_model_override_args)})


def check_given(options: Any) -> None:
    """Raise NotImplementedError for an option of the user's that the plugin does not have, before SGLang acts on it."""
    from dsv32_plugin.sglang_adapter.upstream import ServerArgs

    _check_chats()
    declared = inspect.signature(ServerArgs).parameters
    for option in sorted(REFUSED & declared.keys()):
        value, default = getattr(options, option), declared[option].default
        if (value or None) != (default or None):
            raise NotImplementedError(
                f"--{option.replace('_', '-')}: expected {_shown(default)}, got {_shown(value)}; "
                f"the plugin does not support it: leave it out, or {IN_TREE_HINT}"
            )
    for option in ("moe_a2a_backend", "speculative_moe_a2a_backend"):
        if (backend := getattr(options, option)) not in (None, *A2A_BACKENDS):
            raise NotImplementedError(
                f"--{option.replace('_', '-')}: expected {' or '.join(A2A_BACKENDS)}, got {backend}; leave it out, or "
                f"{IN_TREE_HINT}"
            )
    if options.cuda_graph_backend_prefill not in (None, "disabled"):
        raise NotImplementedError(
            f"--cuda-graph-backend-prefill: expected nothing or disabled, got {options.cuda_graph_backend_prefill}; "
            "the shape of a prefill changes from step to step"
        )
    if options.reasoning_parser is not None and options.grammar_backend in ("llguidance", "outlines"):
        raise NotImplementedError(
            f"--grammar-backend: expected xgrammar (the default) or none with a --reasoning-parser, got "
            f"{options.grammar_backend}; SGLang's grammars for what follows the reasoning need xgrammar"
        )


def _shown(value: Any) -> str:
    return "nothing" if value in (None, False, "") else str(value)


def check_start(original: Callable[[Any], None], server_args: Any) -> None:
    """Goes around SGLang's own last check of the options, in the process that starts all others.

    What a checkpoint or an option lacks is said here, before anything is loaded, and is the last line of the log.
    """
    options = arguments.in_effect(server_args)
    if arguments.architecture(model_config(options)) in MODELS:
        check_options(options)
        config = read_config(options)
        check_sizes(config, options)
        _check_checkpoint(config, options)
        if options.speculative_algorithm is not None:
            check_draft_layer(config)
    original(server_args)


def check_sizes(config: DsaConfig, options: Any) -> None:
    """Raise ConfigError unless the model can be cut as the options say."""
    experts = options.tp_size // options.ep_size
    config.check(options.tp_size, attention=arguments.attention_ranks(options), experts=experts)
    for stage in range(options.pp_size):
        first, _ = get_pp_indices(config.num_layers, stage, options.pp_size)
        if not config.selects(first):
            # A selection is slots of a pool, which every stage gives out by itself.
            raise ConfigError(
                "indexer_types",
                f"a layer that selects at the start of each pipeline stage, layer {first} for stage {stage}",
                config.indexer_types[first],
                "choose another --pp-size, or set SGLANG_PP_LAYER_PARTITION",
            )


def _check_checkpoint(config: DsaConfig, options: Any) -> None:
    """Raise ConfigError or ValueError for a checkpoint that cannot be served on this device, or is not whole."""
    checkpoint.check_alike(config)
    folder = Path(options.model_path)
    if options.load_format in ("auto", "safetensors"):
        checkpoint.check_shards(folder)
    if options.device != "cpu":
        config.check_kernels()
        others = [] if config.quantisation is None else config.quantisation.schemes
        for scheme in others:
            if not isinstance(scheme, BlockFp8):
                raise ConfigError(
                    "quantization_config", "block-fp8 on a GPU", scheme.name, "serve this checkpoint with vLLM"
                )
    parsers = options.tool_call_parser, options.reasoning_parser
    if complaint := chat_format.complaint(folder, "sglang", *parsers):
        logger.warning("dsv32: %s", complaint)


def check_options(options: Any) -> None:
    """Raise for a start-up option that this adapter would have to ignore."""
    check_given(options)
    model = model_config(options)
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"--dtype: expected float32 or bfloat16, got {str(model.dtype).removeprefix('torch.')}")
    stored = read_config(options).quantisation
    if options.quantization not in (None, stored and stored.method):
        raise NotImplementedError(
            f"--quantization: expected nothing, got {options.quantization}; weights are taken as they are stored"
        )
    backends = attention_backends(options)
    if backends != {BACKEND_NAME}:
        found = ", ".join(sorted(str(backend) for backend in backends))
        raise ValueError(f"--attention-backend: expected {BACKEND_NAME} or nothing, got {found}; {IN_TREE_HINT}")
    if options.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(
            f"--kv-cache-dtype: expected {', '.join(KV_CACHE_DTYPES)}, got {options.kv_cache_dtype}; "
            "fp8_e4m3 is the 656-byte layout"
        )
    if options.device == "cpu" and options.page_size % PAGE_SIZE_MULTIPLE:
        raise ValueError(f"--page-size: expected a multiple of {PAGE_SIZE_MULTIPLE}, got {options.page_size}")
    if options.device != "cpu" and options.page_size != PAGE_SIZE:
        raise ValueError(f"--page-size: expected {PAGE_SIZE} on a GPU, got {options.page_size}")
    is_cut = arguments.attention_ranks(options) != options.tp_size or options.pp_size > 1
    if getattr(options, "enable_return_indexer_topk", False) and is_cut:
        raise NotImplementedError(
            "--enable-return-indexer-topk: expected one pipeline stage and no --enable-dp-attention; leave one out"
        )
    _check_speculation(options)
    if options.enable_deterministic_inference and not settings.batch_invariant():
        raise RuntimeError(
            f"--enable-deterministic-inference did not reach the plugin's kernels; set DSV32_BATCH_INVARIANT=1, or "
            f"{IN_TREE_HINT}"
        )


def _check_chats() -> None:
    """Of the releases that have it, the server in Rust renders prompts and parses answers by itself."""
    from dsv32_plugin.sglang_adapter.upstream import envs

    rust = getattr(envs, "SGLANG_RUST_SERVER", None)
    if rust is not None and rust.get():
        raise NotImplementedError(
            f"SGLANG_RUST_SERVER: it has none of the plugin's encoding and parsers; leave it out, or {IN_TREE_HINT}"
        )


def _check_speculation(options: Any) -> None:
    if options.speculative_algorithm is None:
        return
    if options.speculative_algorithm != "EAGLE":
        raise NotImplementedError(
            f"--speculative-algorithm: expected EAGLE, got {options.speculative_algorithm}; leave it out, or "
            f"{IN_TREE_HINT}"
        )
    from dsv32_plugin.sglang_adapter import hooks

    if missing := hooks.missing(hooks.of_drafts()):
        raise NotImplementedError(
            f"--speculative-algorithm: sglang {installed_version()} has no place for the hook on {', '.join(missing)}; "
            f"install sglang=={SGLANG.install}, or leave the option out"
        )
    if options.speculative_draft_model_path != options.model_path:
        raise NotImplementedError(
            f"--speculative-draft-model-path: expected nothing, got {options.speculative_draft_model_path}; "
            "the draft layer is the checkpoint's own"
        )
    if options.device == "cpu" and getattr(options, "enable_watermark", False):
        raise NotImplementedError("--enable-watermark: not with drafts on a CPU; leave it out")
    thresholds = (options.speculative_accept_threshold_single, options.speculative_accept_threshold_acc)
    if options.device == "cpu" and thresholds != (1, 1):
        raise NotImplementedError(
            f"--speculative-accept-threshold-…: expected 1 without a GPU, got {thresholds}; leave them out"
        )
    drafts = options.speculative_num_steps
    if not 1 <= drafts <= MAX_DRAFTS:
        raise NotImplementedError(f"--speculative-num-steps: expected 1 to {MAX_DRAFTS}, got {drafts}")


def check_draft_layer(config: DsaConfig) -> None:
    """Raise ConfigError unless the checkpoint has the draft layer that EAGLE runs."""
    if config.num_nextn_predict_layers != 1:
        raise ConfigError(
            "num_nextn_predict_layers",
            "1 for --speculative-algorithm EAGLE",
            config.num_nextn_predict_layers,
            "leave the option out",
        )


def is_ours(model: nn.Module) -> bool:
    """Whether a model is the one that serves our checkpoints."""
    return _path(model) == MODEL_PATH


def is_our_draft(model: nn.Module) -> bool:
    """Whether a draft model is the one of our target model."""
    return _path(model) == DRAFT_MODEL_PATH


def _path(model: nn.Module) -> str:
    return f"{type(model).__module__}:{type(model).__qualname__}"


def check_model(model: nn.Module, *, is_draft: bool = False) -> None:
    """Raise RuntimeError unless SGLang has loaded our model."""
    expected = DRAFT_MODEL_PATH if is_draft else MODEL_PATH
    found = _path(model)
    if found != expected:
        raise RuntimeError(
            f"model: the attention backend {BACKEND_NAME} is for {expected}, but SGLang loaded {found}; "
            f"leave --attention-backend out, and SGLANG_EXTERNAL_MODEL_PACKAGE if it is set"
        )


def check_hooks() -> None:
    """Raise RuntimeError where a hook of ours is not in place."""
    from dsv32_plugin.sglang_adapter import hooks

    if missing := hooks.missing(hooks.of_process()):
        raise RuntimeError(f"sglang {installed_version()} did not take the hook on {', '.join(missing)}; see its log")
