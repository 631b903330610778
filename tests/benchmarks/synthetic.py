"""Records with figures that were made up, for the parts that read records."""

from __future__ import annotations

from typing import Any

from dsv32_plugin.benchmarks import records

ABOUT: dict[str, Any] = {
    "gpu": "NVIDIA H100 made up",
    "cuda": "13.0",
    "versions": {"torch": "2.11"},
    "commit": "abc1234",
    "command": "dsv32 bench",
    "date": "2026-01-01",
}


def timing(median: float, spread: float = 0.01) -> dict[str, float]:
    return {"median": median, "low": median * (1 - spread), "high": median * (1 + spread)}


def layer_row(mode: str, batch: int, context: int, side: str, us: float, tokens: int = 1) -> records.Row:
    return {
        "case": {"mode": mode, "B": batch, "T": tokens, "L": context, "H": 128}, "side": side, "kernels": side,
        "figures": {"layer_us": timing(us)}, "operations": {"projections": us / 4, "attention": us * 3 / 4},
        "us_per_token": us / (batch * tokens),
    }  # fmt: skip


def layer(us: float = 1000.0, gpu: str = ABOUT["gpu"], commit: str = ABOUT["commit"]) -> records.Record:
    """Dense takes as many microseconds as the context has tokens, ours the same at each, so that they cross there."""
    rows = []
    for context in (512, 2048, 8192):
        for mode, batch, tokens in (("prefill", 1, 512), ("decode", 16, 1)):
            rows.append(layer_row(mode, batch, context, "dense", float(context), tokens))
            rows.append(layer_row(mode, batch, context, "ours", us, tokens))
    return {
        "kind": "layer", **ABOUT, "gpu": gpu, "commit": commit, "method": "made up.", "ceilings": {}, "chunk": 512,
        "rows": rows, "not_run": [], "seconds": 7,
    }  # fmt: skip


def kernels(us: float = 10.0, spread: float = 0.01) -> records.Record:
    case = {"operation": "select_topk", "B": 1, "L": 8192}
    floor = {"bytes": 1, "flops": 0, "notes": "", "floor_us": 1.0, "floor_by": "bytes", "rounds": 15}
    rows = [
        {
            "case": case, "side": "ours", **floor,
            "figures": {"cold_us": timing(us, spread), "warm_us": timing(us / 2, spread)},
        },
        {"case": case, "side": "peer", "figures": {"cold_us": timing(12.0), "warm_us": timing(11.0)}},
        {"case": case, "side": "torch", "missing": "not here"},
    ]  # fmt: skip
    ceilings = {"bytes_per_us": 3e6, "bf16_flops_per_us": 7e8, "fp8_flops_per_us": 1.2e9}
    return {"kind": "kernels", **ABOUT, "ceilings": ceilings, "rows": rows, "not_run": [], "seconds": 7}


def serve() -> records.Record:
    points = {"median": 20.0, "low": 10.0, "high": 30.0, "p99": 40.0, "mean": 21.0}
    rates = {"input_tokens_per_s": 100.0, "output_tokens_per_s": 50.0, "tokens_per_s": 150.0}
    figures = {"ttft_ms": points, "tpot_ms": points, **{name: {"median": rate} for name, rate in rates.items()}}
    rows = [
        {
            "case": {"engine": "vllm", "workload": "chat", "load": "2/s", "layers": 2}, "side": backend, "requests": 4,
            "completed": 4, "seconds": 2.0, "errors": [], "ready_s": 10.0, "client_busy": 0.1, "figures": figures,
        }
        for backend in ("plugin", "in-tree")
    ]  # fmt: skip
    return {"kind": "serve", **ABOUT, "method": "made up.", "seed": 0, "rows": rows}


def whole() -> records.Record:
    about = {"model": "V3.2", "layers": 61, "experts": 16, "engine": "vllm", "launch": "TP1"}
    start = {"ready_s": 200.0, "weights_gib": 58.0, "planned_weights_gib": 57.4, "used_gib": 100.0}
    made = [
        ({"workload": "start"}, start),
        ({"L": 2048, "B": 1}, {"ttft_ms": 20.0, "tpot_ms": 20.0, "used_gib": 125.0}),
    ]
    rows = [
        {"case": about | case, "side": side, "figures": {name: {"median": value} for name, value in figures.items()}}
        for side in ("plugin", "in-tree")
        for case, figures in made
    ]
    return {"kind": "whole", **ABOUT, "method": "made up", "rows": rows}
