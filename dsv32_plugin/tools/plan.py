"""`dsv32 plan`: what a rank holds on these GPUs, how many tokens its caches take, and the command that starts it.

MODEL is V3.2, GLM-5, or a checkpoint as `dsv32 check` takes it. Nothing is loaded and no GPU is asked. The figures are
those of torch's tensors; an engine measures for itself what is free when it starts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from dsv32_plugin.console import CommandError, stdout
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.tools import memory
from dsv32_plugin.tools.memory import Cut
from dsv32_plugin.tools.tiny import TinySpec

V32 = TinySpec(
    hidden_size=7168, num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=128, q_lora_rank=1536,
    index_n_heads=64, index_topk=2048, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
    num_experts_per_tok=8, n_group=8, topk_group=4, rope_original=4096, mtp=True, dtype="bfloat16", fp8=True,
)  # fmt: skip
GLM_5 = replace(
    TinySpec.glm_defaults(),
    hidden_size=6144, num_hidden_layers=78, first_k_dense_replace=3, num_attention_heads=64, q_lora_rank=2048,
    index_n_heads=32, index_topk=2048, intermediate_size=12288, moe_intermediate_size=2048, n_routed_experts=256,
    num_experts_per_tok=8, mtp=True, dtype="bfloat16", fp8=True,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "V3.2": ("deepseek-ai/DeepSeek-V3.2", V32.config()),
    "GLM-5": ("zai-org/GLM-5-FP8", {**GLM_5.config(), "vocab_size": 154880, "max_position_embeddings": 202752}),
}
"""Name -> on the hub, and what its config.json says of sizes."""


class Chip(NamedTuple):
    gib: float
    tb_per_s: float


CHIPS = {"H100": Chip(79.1, 3.35), "H200": Chip(139.8, 4.8), "B200": Chip(178.3, 8.0)}
"""Memory as torch reports it, and its bandwidth."""
SHARE = 0.9
"""Of the memory for torch's tensors; the rest is for NCCL, CUDA and the graphs' own."""
CHUNK, SEQUENCES = 8192, 256
"""Tokens of a prefill over all ranks, and decodes of one rank in a graph."""


@dataclass(frozen=True)
class Way:
    """One way to deploy a model."""

    engine: str
    aim: str
    gib: dict[str, float]
    """Of one rank."""
    tokens: int
    """That the caches of all ranks hold."""
    sequences: int
    """Of the whole context, at once."""
    limit: str
    command: str
    """Empty where the model does not fit."""


def ways(config: DsaConfig, name: str, chip: Chip, nodes: int, gpus: int, context: int, *, fp8: bool) -> Iterator[Way]:
    """Of both engines, for the least time a token and for the most tokens a second."""
    ranks = nodes * gpus
    alone, whole = Cut(1, 1, ranks, 1, 1), Cut(ranks, ranks, ranks, ranks, ranks)
    cuts = [("vllm", whole), ("sglang", whole)]
    if ranks > 1:
        cuts += [("vllm", alone), ("sglang", replace(alone, dense=ranks, head=ranks))]
    for engine, cut in cuts:
        yield _way(engine, config, cut, name, chip, (nodes, gpus), context, fp8)


def _way(
    engine: str, config: DsaConfig, cut: Cut, name: str, chip: Chip, place: tuple[int, int], context: int, fp8: bool
) -> Way:
    ranks = place[0] * place[1]
    shares = ranks // cut.attention
    rows = max(CHUNK // shares, 256)
    gib = {
        "weights": memory.weights(config, cut) / 2**30,
        "prefill": memory.step(config, cut, rows, rows * shares) / 2**30,
        "graphs": memory.step(config, cut, SEQUENCES, SEQUENCES * shares, scores=memory.DECODE_SCORES_BYTES) / 2**30,
    }
    gib["caches"] = max(0.0, chip.gib * SHARE - sum(gib.values()))
    tokens = int(gib["caches"] * 2**30 / memory.token_bytes(config, fp8=fp8)) // 64 * 64
    at_once = tokens // context * shares
    least_ms = memory.active(config, cut) / chip.tb_per_s / 1e9
    limit = f"caches: {at_once} sequences of {context} tokens at once"
    command = _command(engine, name, place, shares, rows, context, fp8, sum(gib.values()) - gib["prefill"], chip)
    if not at_once:
        limit = f"does not fit: the caches of a rank hold {tokens} tokens, the context is {context}"
        command = ""
    elif shares == 1:
        limit += f"; bandwidth: {least_ms:.1f} ms a token by the weights that are read"
    rounded = {part: round(size, 2) for part, size in gib.items()}
    aim = "latency" if shares == 1 else "throughput"
    return Way(engine, aim, rounded, tokens * shares, at_once, limit, command)


def _command(
    engine: str,
    name: str,
    place: tuple[int, int],
    shares: int,
    rows: int,
    context: int,
    fp8: bool,
    static_gib: float,
    chip: Chip,
) -> str:
    cut = cut_options(engine, place, shares)
    if engine == "vllm":
        cache = " --kv-cache-dtype fp8" if fp8 else ""
        return (
            f"vllm serve {name} {cut}{cache} --max-model-len {context} --max-num-batched-tokens {rows} "
            f"--gpu-memory-utilization {SHARE}"
        )
    cache = " --kv-cache-dtype fp8_e4m3" if fp8 else ""
    return (
        f"python -m sglang.launch_server --model-path {name} {cut}{cache} --context-length {context} "
        # SGLang divides it by the shares.
        f"--chunked-prefill-size {rows * shares} --mem-fraction-static {int(100 * static_gib / chip.gib) / 100:.2f}"
    )


def cut_options(engine: str, place: tuple[int, int], shares: int) -> str:
    """How an engine is told to cut a model over (nodes, GPUs of each); attention is whole on each of some shares."""
    nodes, gpus = place
    ranks = nodes * gpus
    if engine == "vllm":
        cut = f"--tensor-parallel-size {ranks}"
        if shares > 1:
            cut = f"--data-parallel-size {ranks} --enable-expert-parallel"
        if nodes > 1:
            cut += f" --data-parallel-size-local {gpus} --data-parallel-address HOST" if shares > 1 else ""
            cut += "" if shares > 1 else f" --nnodes {nodes} --node-rank RANK --master-addr HOST"
        return cut
    cut = f"--tp-size {ranks}"
    if shares > 1:
        cut += f" --dp-size {shares} --enable-dp-attention"
    if nodes > 1:
        cut += f" --nnodes {nodes} --node-rank RANK --dist-init-addr HOST:5000"
    return cut


def _model(model: str) -> tuple[str, DsaConfig]:
    if model in MODELS:
        name, sizes = MODELS[model]
        return name, DsaConfig.from_hf(sizes)
    from dsv32_plugin.tools import check

    return model, check.config_of(model)


def _gpus(text: str) -> tuple[int, int, str]:
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\w+)", text)
    if found is None or found[3] not in CHIPS or int(found[1] or 1) * int(found[2]) < 1:
        known = ", ".join(CHIPS)
        raise argparse.ArgumentTypeError(f"expected GPUs as 8xH200, or nodes too as 2x8xH100, of {known}; got {text}")
    return int(found[1] or 1), int(found[2]), found[3]


def _tokens(text: str) -> int:
    found = re.fullmatch(r"(\d+)([kK]?)", text)
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected a number of tokens as 131072 or 128k, got {text}")
    return int(found[1]) * (1024 if found[2] else 1)


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan", help="say what a model takes on some GPUs, and how to start it", description=__doc__
    )
    parser.add_argument("--gpus", type=_gpus, required=True, metavar="NxCHIP", help="8xH200, or 2x8xH100 of two hosts")
    parser.add_argument("--model", default="V3.2", help="V3.2, GLM-5, a folder, or OWNER/NAME on the hub")
    parser.add_argument("--context", type=_tokens, default=131072, metavar="TOKENS", help="131072 or 128k")
    parser.add_argument("--cache", choices=("fp8", "bfloat16"), default="fp8", help="type of the latents")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    nodes, gpus, chip = arguments.gpus
    name, config = _model(arguments.model)
    if arguments.context > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise CommandError(f"--context: expected at most the model's {most} tokens, got {arguments.context}")
    config.check(1, attention=nodes * gpus, experts=1)
    found = list(ways(config, name, CHIPS[chip], nodes, gpus, arguments.context, fp8=arguments.cache == "fp8"))
    if arguments.json:
        print(json.dumps([asdict(way) for way in found], indent=1))
    else:
        for way in found:
            parts = ", ".join(f"{part} {size:.1f}" for part, size in way.gib.items())
            stdout.print(f"[bold]{way.engine}, {way.aim}[/bold]\n  GiB a GPU: {parts}")
            stdout.print(f"  tokens in the caches: {way.tokens}\n  limit: {way.limit}\n  {way.command}", soft_wrap=True)
    return 0 if any(way.sequences for way in found) else 1
