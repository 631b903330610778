"""How many of the true top 2048 keys the fp8 indexer selects, with and without the Hadamard rotation. Needs no GPU.

Truth is the float64 score of the same inputs. The keys go through `norm_rope_cache` and `gather_index_keys`, the
queries through `index_query`, the scores through `index_logits_ragged` and `select_topk`: what a server runs.

    python tests/kernels/recall.py            # writes benchmarks/results/recall.json, which `dsv32 bench report` shows
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dsv32_plugin import kernels
from dsv32_plugin.benchmarks import records
from dsv32_plugin.benchmarks.records import Record, Row
from dsv32_plugin.kernels.cache_layout import INDEX_BYTES, INDEX_DIM, LATENT_RANK, LATENT_WIDTH, PAGE_SIZE, ROPE_DIM

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "recall.json"
KEYS, QUERIES, HEADS, TOPK, SEEDS = 16384, 8, 64, 2048, 3

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""index_k [S, D] before its LayerNorm, the LayerNorm's weight [D], queries [T, I, D], head weights [T, I]."""


def random(g: torch.Generator) -> Data:
    """Independent normal keys and queries: scores differ little, the hardest ranking."""
    key = torch.randn(KEYS, INDEX_DIM, generator=g)
    query = torch.randn(QUERIES, HEADS, INDEX_DIM, generator=g)
    return key, torch.ones(INDEX_DIM), query, torch.randn(QUERIES, HEADS, generator=g)


def peaked(g: torch.Generator) -> Data:
    """One key in eight resembles what the heads look for, by degrees: a ranking with a clear head and a long tail."""
    key, weight, query, head_weights = random(g)
    wanted = torch.randn(INDEX_DIM, generator=g)
    key[::8] += wanted * torch.rand(len(key[::8]), 1, generator=g) * 2
    return key, weight, query + wanted, head_weights.abs()


def outliers(g: torch.Generator) -> Data:
    """Peaked, and 4 channels of the keys and queries are 16 times larger than the rest, as in trained models."""
    key, weight, query, head_weights = peaked(g)
    loud = torch.randperm(INDEX_DIM, generator=g)[:4]
    weight[loud] = 16
    query[:, :, loud] *= 16
    return key, weight, query, head_weights


DATA: dict[str, Callable[[torch.Generator], Data]] = {"random": random, "peaked": peaked, "outliers": outliers}


def rope_table() -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, ROPE_DIM, 2, dtype=torch.float64) / ROPE_DIM)
    angle = torch.arange(KEYS, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1).float()


def true_scores(data: Data, table: torch.Tensor) -> torch.Tensor:
    """[T, S] in float64, half-split rope."""
    key, weight, query, head_weights = (x.double() for x in data)
    normed = (key - key.mean(1, keepdim=True)) * torch.rsqrt(key.var(1, unbiased=False, keepdim=True) + 1e-6) * weight
    keys, queries = rope64(normed, table), rope64(query, table[-QUERIES:].unsqueeze(1))
    return torch.stack([head_weights[t] @ (queries[t] @ keys.T).relu() for t in range(QUERIES)])


def rope64(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    half = ROPE_DIM // 2
    cos, sin = table[..., :half].double(), table[..., half:].double()
    a, b = x[..., :half], x[..., half:ROPE_DIM]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., ROPE_DIM:]), -1)


def selected(data: Data, table: torch.Tensor, *, rotate: bool, fp8: bool) -> torch.Tensor:
    """[T, K] as the operations select."""
    key, weight, query, head_weights = data
    dtype = torch.bfloat16
    pages = KEYS // PAGE_SIZE
    width, kind = (INDEX_BYTES, torch.uint8) if fp8 else (INDEX_DIM, dtype)
    index_cache = torch.zeros(pages, PAGE_SIZE, width, dtype=kind)
    positions = torch.arange(KEYS)
    kernels.norm_rope_cache(
        torch.ones(KEYS, 16), torch.ones(KEYS, LATENT_RANK), torch.ones(KEYS, ROPE_DIM), key.to(dtype), positions,
        positions, table, q_a_weight_l=torch.ones(16), kv_a_weight_c=torch.ones(LATENT_RANK), eps=1e-6,
        latent_cache=torch.zeros(pages, PAGE_SIZE, LATENT_WIDTH), index_k_weight_d=weight,
        index_k_bias_d=torch.zeros(INDEX_DIM), index_cache=index_cache, rotate=rotate,
    )  # fmt: skip
    block_table = torch.arange(pages, dtype=torch.int32).unsqueeze(0)
    lengths = torch.tensor([0, KEYS], dtype=torch.int32)
    keys, scales = kernels.gather_index_keys(index_cache, block_table, lengths, KEYS)
    queries, weights = kernels.index_query(
        query.to(dtype), head_weights, positions[-QUERIES:], table, rotate=rotate, quantize=fp8
    )
    start = torch.zeros(QUERIES, dtype=torch.int32)
    logits = kernels.index_logits_ragged(queries, weights, keys, scales, start, start + KEYS)
    return kernels.select_topk(logits, start, start + KEYS, TOPK)


def measure() -> Record:
    table = rope_table()
    rows: list[Row] = []
    for name, make in DATA.items():
        found: dict[str, list[float]] = {"fp8": [], "fp8 rotated": [], "bf16": []}
        for seed in range(SEEDS):
            data = make(torch.Generator().manual_seed(seed))
            key, weight, query, head_weights = (x.bfloat16().float() for x in data)
            rounded = (key, weight, query, head_weights)
            truth = true_scores(rounded, table).topk(TOPK).indices
            member = torch.zeros(QUERIES, KEYS, dtype=torch.bool).scatter_(1, truth, True)
            for variant, rotate, fp8 in (("fp8", False, True), ("fp8 rotated", True, True), ("bf16", False, False)):
                chosen = selected(rounded, table, rotate=rotate, fp8=fp8).long()
                found[variant] += member.gather(1, chosen).float().mean(1).tolist()
        for variant, shares in found.items():
            recall = {"mean": sum(shares) / len(shares), "low": min(shares)}
            row: Row = {"case": {"data": name}, "side": variant, "figures": {"recall": recall}}
            rows.append(row | {"queries": len(shares)})
    return {"kind": "recall", "keys": KEYS, "heads": HEADS, "topk": TOPK, "torch": torch.__version__, "rows": rows}


if __name__ == "__main__":
    records.write(measure(), RECORD)
