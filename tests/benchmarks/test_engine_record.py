"""The record of the engine comparison: what is compared is comparable, and parts make a whole."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv32_plugin.benchmarks import cli, engine, views
from dsv32_plugin.benchmarks.engine import Run
from dsv32_plugin.benchmarks.engine_worker import GRAPH_LAUNCH, graph_spans_ms, prompt
from dsv32_plugin.benchmarks.records import BACKENDS, Record, Row, median
from dsv32_plugin.console import CommandError
from dsv32_plugin.core import warmup


def record(*rows: Row, gpu: str = "NVIDIA H100") -> Record:
    made = {"heads": 128, "cache": "fp8_ds_mla", "commit": "abc", "machine": "m", "date": "today", "failed": None}
    runs = [{"side": side, **made} for side in dict.fromkeys(row["side"] for row in rows)]
    about = {"kind": "engine", "gpu": gpu, "driver": "1", "versions": {"vllm": "0.26.0"}}
    return {**about, "runs": runs, "rows": copy.deepcopy(list(rows))}


def row(side: str, workload: str, value: float, **case: Any) -> Row:
    figure = {"prefill": "tokens_per_s", "start": "first_token_s"}.get(workload, "ms_per_step")
    figures = {figure: {"median": value}, "peak_gib": {"median": 30.0}}
    return {**Run(side, 128, "fp8_ds_mla").row(workload, **case), "figures": figures}


def test_the_sides_differ_in_the_indexer_alone(tmp_path: Path) -> None:
    configs = {}
    for side in BACKENDS:
        engine.write_config(Run(side, 16, "fp8_ds_mla"), 32, tmp_path / side)
        configs[side] = json.loads((tmp_path / side / "config.json").read_text())
    assert configs["plugin"] == configs["in-tree"]
    shared = configs["dense"].keys() & configs["plugin"].keys() - {"architectures", "model_type"}
    assert {key: configs["dense"][key] for key in shared} == {key: configs["plugin"][key] for key in shared}
    assert configs["plugin"].keys() - configs["dense"].keys() == {"index_head_dim", "index_n_heads", "index_topk"}


def test_only_takes_whole_words() -> None:
    assert [engine.case_name(case) for case in engine.cases("decode B=1 L=2048")] == ["decode B=1 L=2048"]


def test_prompts_of_one_stream_share_their_prefix() -> None:
    assert prompt(3, 40000)[:1984] == prompt(3, 1984)
    assert prompt(3, 1984)[1:100] != prompt(4, 1984)[1:100]


def test_parts_make_a_whole() -> None:
    one, many = {"B": 1, "L": 2048}, {"B": 16, "L": 2048}
    whole = record(row("plugin", "decode", 2.0, **one), row("plugin", "decode", 9.0, **many))
    engine.merge(whole, record(row("plugin", "decode", 3.0, **many), row("plugin", "start", 20.0, state="warm")))
    engine.merge(whole, record(row("in-tree", "decode", 3.0, **one), row("in-tree", "prefill", 100.0, L=2048)))
    steps = [median(each, "ms_per_step") for each in whole["rows"] if each["side"] == "plugin"]
    assert steps == [2.0, 3.0, None], "what is measured again replaces what was there"
    assert [run["side"] for run in whole["runs"]] == ["plugin", "in-tree"]
    lines = views.markdown(views.engines([whole])).splitlines()
    assert "| vLLM | 128 | fp8_ds_mla | decode | 1 | 2048 | 2.00 | 3.00, 1.50 × |" in lines
    assert "| vLLM | 128 | fp8_ds_mla | decode | 16 | 2048 | 3.00 |  |" in lines, "nothing to compare with"
    assert "| vLLM | 128 | fp8_ds_mla | start | warm | 20.0 |" in lines
    assert "| 128 | fp8_ds_mla | 30.00 | 30.00, 1.00 × |" in lines


def test_gpus_are_not_mixed() -> None:
    with pytest.raises(CommandError, match=r"expected a record of NVIDIA H100.*got one of NVIDIA H200"):
        engine.merge(record(), record(gpu="NVIDIA H200"))


FAKE = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    print(json.dumps({{"vllm": "{release}", "dsv32-plugin": "0", "torch": "0", "triton": "0"}}))
    sys.exit()
print('@@dsv32 {{"ready_s": 1.0, "first_token_s": 2.0}}', flush=True)
for line in sys.stdin:
    print('@@dsv32 {{"steps_ms": [{ms}], "peak_gib": 3.0}}', flush=True)
"""


def test_two_releases_take_turns_in_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for release, ms in (("0.26.0", 2.0), ("0.33.0", 4.0)):
        path = tmp_path / release
        path.write_text(FAKE.format(python=sys.executable, release=release, ms=ms))
        path.chmod(0o755)
    monkeypatch.setattr(engine.sys, "executable", str(tmp_path / "0.26.0"))
    monkeypatch.setattr(engine, "gpu_and_driver", lambda: ("NVIDIA H200", "1"))
    parser = argparse.ArgumentParser()
    cli.add_command(parser.add_subparsers())
    command = ["bench", "engine", "--sides", "plugin", "--heads", "16", "--only", "decode B=1 L=2048"]
    args = parser.parse_args([*command, "--next-to", str(tmp_path / "0.33.0"), "--output", str(tmp_path / "out.json")])
    assert args.handler(args) == 0
    made = json.loads((tmp_path / "out.json").read_text())
    steps = {each["case"]["release"]: median(each, "ms_per_step") for each in made["rows"] if "B" in each["case"]}
    assert steps == {"0.26.0": 2.0, "0.33.0": 4.0}
    assert [run["versions"]["vllm"] for run in made["runs"]] == ["0.26.0", "0.33.0"]
    shown = views.markdown(views.engines([made]))
    assert "vLLM 0.26.0, 0.33.0." in shown
    assert "| 16 | fp8_ds_mla | 0.33.0 | 3.00 |" in shown


def test_another_environment_must_have_another_release(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="expected a Python that has vllm and dsv32-plugin"):
        engine.Environment.of(str(tmp_path / "none"))


def test_rounds_become_a_row() -> None:
    run = Run("plugin", 128, "fp8_ds_mla")
    case = {"kind": "decode", "B": 1, "L": 2048, "distinct": 1, "rounds": 3}
    rounds = [{"steps_ms": steps, "peak_gib": 1.0} for steps in ([9.0] * 10, [2.0] * 10, [3.0] * 11)]
    found = engine.summarise(run, case, rounds)
    step = {"median": 3.0, "low": 2.0, "high": 3.0}
    assert found["figures"]["ms_per_step"] == step, "without the round that warms up"
    assert (found["side"], found["case"]["B"], found["rounds_ms"]) == ("plugin", 1, [2.0, 3.0])
    case = {"kind": "prefill", "L": 1000, "seed": 0, "rounds": 4}
    rounds = [{"prompts": 2, "seconds": s, "peak_gib": g} for s, g in ((9.0, 1.0), (1.0, 3.0), (4.0, 2.0), (2.0, 1.0))]
    figures = engine.summarise(run, case, rounds)["figures"]
    assert figures == {"tokens_per_s": {"median": 1000, "low": 500, "high": 2000}, "peak_gib": {"median": 3.0}}
    failed = engine.summarise(run, case, [*rounds, {"error": "no memory"}])
    assert "figures" not in failed
    assert failed["error"] == "no memory"


def test_the_plugins_part_of_a_start_is_read_from_the_log() -> None:
    summary = warmup.summary(65, found_s=1.8, beside_s=20.0, alone_s=5.0, loaded_s=0.4, run_s=2.0)
    assert engine.own_start(f"(EngineCore pid=7) INFO 11-22 07:08:06 [warmup.py:69] dsv32: {summary}\n") == (65, 9.2)
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
    for length in engine.LENGTHS:
        cases = [case for case in engine.cases("") if case["L"] == length]
        assert [case["kind"] for case in cases] == ["prefill"] + ["decode"] * 3 + ["graph"] * 3
        assert cases[0]["rounds"] > 1, "the first warms up"
    taken = {case["L"] for case in engine.cases("") if engine.takes("dense", case)}
    assert taken == {2048, 32768}
    assert all(engine.takes("plugin", case) for case in engine.cases(""))
