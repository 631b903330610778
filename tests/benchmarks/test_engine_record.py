"""The record of the engine comparison: what is compared is comparable, and parts make a whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv32_plugin.benchmarks import engine, engine_view
from dsv32_plugin.benchmarks.engine_view import Run
from dsv32_plugin.benchmarks.engine_worker import GRAPH_LAUNCH, graph_spans_ms, prompt
from dsv32_plugin.core import warmup


def record(*entries: dict[str, Any], gpu: str = "NVIDIA H100") -> dict[str, Any]:
    return {"gpu": gpu, "driver": "1", "versions": {"vllm": "0.26.0"}, "runs": [copy.deepcopy(e) for e in entries]}


def entry(side: str, rows: dict[str, float], **startup: float) -> dict[str, Any]:
    made = {"commit": "abc", "machine": "m", "date": "today"}
    figures = {
        name: {("tokens_per_s" if name.startswith("prefill") else "ms_per_step"): value, "peak_gib": 30.0}
        for name, value in rows.items()
    }
    starts = {state: {"first_token_s": seconds} for state, seconds in startup.items()}
    return {
        "side": side, "heads": 128, "kv_cache_dtype": "fp8_ds_mla", "rows": figures, "startup": starts,
        "environment": made, "failed": None,
    }  # fmt: skip


def test_the_sides_differ_in_the_indexer_alone(tmp_path: Path) -> None:
    configs = {}
    for side in engine_view.SIDES:
        engine.write_config(Run(side, 16, "fp8_ds_mla"), 32, tmp_path / side)
        configs[side] = json.loads((tmp_path / side / "config.json").read_text())
    assert configs["plugin"] == configs["in-tree"]
    shared = configs["dense"].keys() & configs["plugin"].keys() - {"architectures", "model_type"}
    assert {key: configs["dense"][key] for key in shared} == {key: configs["plugin"][key] for key in shared}
    assert configs["plugin"].keys() - configs["dense"].keys() == {"index_head_dim", "index_n_heads", "index_topk"}


def test_only_takes_whole_words() -> None:
    assert [engine_view.case_name(case) for case in engine_view.cases("decode B=1 L=2048")] == ["decode B=1 L=2048"]


def test_prompts_of_one_stream_share_their_prefix() -> None:
    assert prompt(3, 40000)[:1984] == prompt(3, 1984)
    assert prompt(3, 1984)[1:100] != prompt(4, 1984)[1:100]


def test_parts_make_a_whole() -> None:
    whole = record(entry("plugin", {"decode B=1 L=2048": 2.0, "decode B=16 L=2048": 9.0}, cold=40.0))
    engine_view.merge(whole, record(entry("plugin", {"decode B=16 L=2048": 3.0}, warm=20.0)))
    engine_view.merge(whole, record(entry("in-tree", {"decode B=1 L=2048": 3.0, "prefill L=2048": 100.0})))
    plugin = engine_view.find(whole, Run("plugin", 128, "fp8_ds_mla"))
    assert plugin is not None
    assert {name: row["ms_per_step"] for name, row in plugin["rows"].items()} == {
        "decode B=1 L=2048": 2.0,
        "decode B=16 L=2048": 3.0,
    }
    assert set(plugin["startup"]) == {"cold", "warm"}
    lines = {row[2]: row for row in engine_view.rows(whole)}
    assert lines["decode B=1 L=2048"][-1] == "1.50", "3 ms over 2 ms"
    assert lines["decode B=16 L=2048"][-1] == "", "nothing to compare with"
    assert "| 128 | fp8_ds_mla | decode B=1 L=2048 | ms/step | 2.00 | 3.00 |  | 1.50 |" in engine_view.markdown(whole)


def test_gpus_are_not_mixed() -> None:
    with pytest.raises(SystemExit, match=r"expected a record of NVIDIA H100.*got one of NVIDIA H200"):
        engine_view.merge(record(), record(gpu="NVIDIA H200"))


def test_rounds_become_a_row() -> None:
    case = {"kind": "decode", "B": 1, "L": 2048, "distinct": 1}
    rounds = [{"steps_ms": steps, "peak_gib": 1.0} for steps in ([9.0] * 10, [2.0] * 10, [3.0] * 11)]
    row = engine_view.summarise(case, rounds)
    assert (row["ms_per_step"], row["low"], row["high"]) == (3.0, 2.0, 3.0), "without the round that warms up"
    assert row["rounds_ms"] == [2.0, 3.0]
    case = {"kind": "prefill", "L": 1000, "seed": 0}
    rounds = [{"prompts": 2, "seconds": s, "peak_gib": g} for s, g in ((9.0, 1.0), (1.0, 3.0), (4.0, 2.0), (2.0, 1.0))]
    row = engine_view.summarise(case, rounds)
    assert (row["tokens_per_s"], row["low"], row["high"], row["peak_gib"]) == (1000, 500, 2000, 3.0)


def test_the_plugins_part_of_a_start_is_read_from_the_log() -> None:
    summary = warmup.summary(65, found_s=1.8, beside_s=20.0, alone_s=5.0, loaded_s=0.4, run_s=2.0)
    assert engine.own_start(f"(EngineCore pid=7) INFO 11-22 07:08:06 [warmup.py:69] dsv32: {summary}\n") == {
        "kernels": 65,
        "own_s": 9.2,
    }
    assert engine.own_start("dsv32: torch.compile is off") is None


class Event:
    """What the profiler tells of a launch on the host or of a kernel."""

    def __init__(self, name: str, number: int, start_ms: float, ms: float, *, on_gpu: bool = True) -> None:
        types = torch.autograd.DeviceType
        self.values = name, number, types.CUDA if on_gpu else types.CPU, int(start_ms * 1e6), int(ms * 1e6)

    def __getattr__(self, name: str) -> Callable[[], Any]:
        names = "name", "correlation_id", "device_type", "start_ns", "duration_ns"
        return lambda: self.values[names.index(name)]


def test_a_graph_lasts_from_its_first_kernel_to_the_end_of_its_last() -> None:
    events = [
        Event(GRAPH_LAUNCH, 1, 0, 9, on_gpu=False), Event(GRAPH_LAUNCH, 2, 1, 9, on_gpu=False),
        Event("cudaLaunchKernel", 3, 2, 9, on_gpu=False),
        Event("third", 3, 30, 5), Event("late", 2, 21, 4), Event("early", 2, 20, 2),
        Event("a", 1, 10, 2), Event("beside a", 1, 10.5, 1),
    ]  # fmt: skip
    assert graph_spans_ms(events) == [2.0, 5.0], "what no graph launched does not count"


def test_graphs_follow_what_filled_the_cache_and_dense_skips_the_longest() -> None:
    for length in engine_view.LENGTHS:
        cases = [case for case in engine_view.cases("") if case["L"] == length]
        assert [case["kind"] for case in cases] == ["prefill"] + ["decode"] * 3 + ["graph"] * 3
        assert cases[0]["rounds"] > 1, "the first warms up"
    taken = {case["L"] for case in engine_view.cases("") if engine_view.takes("dense", case)}
    assert taken == {2048, 32768}
    assert all(engine_view.takes("plugin", case) for case in engine_view.cases(""))
