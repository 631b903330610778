"""`dsv32 plan` against the memory that recorded runs held, and against how both engines cut a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv32_plugin.benchmarks import engine, serve
from dsv32_plugin.cli import main
from dsv32_plugin.core import checkpoint
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.core.plans import DECODE_WORKSPACE_BYTES
from dsv32_plugin.kernels.ops.index_topk.api import WORKSPACE_BYTES
from dsv32_plugin.tools import memory
from dsv32_plugin.tools.memory import Cut
from dsv32_plugin.tools.plan import CHIPS, MODELS, ways

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"
ALONE = Cut(1, 1, 1, 1, 1)
TOLERANCE = 0.05


def recorded() -> dict[tuple[str, int], float]:
    """(Record, heads) -> the most that the plugin's side held in any of its cases, in GiB."""
    found: dict[tuple[str, int], float] = {}
    for chip in ("h100", "h200"):
        record = json.loads((RECORDS / chip / "engine.json").read_text())
        for row in record["rows"]:
            peak = row.get("figures", {}).get("peak_gib")
            if row["side"] == "plugin" and peak:
                key = chip, row["case"]["heads"]
                found[key] = max(found.get(key, 0.0), peak["median"])
    return found


@pytest.mark.parametrize(("chip", "heads"), recorded())
def test_the_peak_of_a_recorded_run_is_foretold(chip: str, heads: int) -> None:
    options = json.loads((RECORDS / chip / "engine.json").read_text())["runs"][0]["options"]
    sizes = serve.config("plugin", engine.LAYERS, options["experts"], heads, dense_layers=engine.DENSE_LAYERS)
    config = DsaConfig.from_hf(sizes)
    tokens, sequences = options["max_num_batched_tokens"], options["max_num_seqs"]
    foretold = memory.weights(config, ALONE) + options["kv_cache_memory_bytes"]
    foretold += memory.step(config, ALONE, tokens, tokens)
    foretold += memory.step(config, ALONE, sequences, sequences, scores=memory.DECODE_SCORES_BYTES)
    assert foretold / 2**30 == pytest.approx(recorded()[chip, heads], rel=TOLERANCE)


def whole_starts() -> list[Any]:
    """What the plugin's servers of all layers said when they started."""
    found = []
    for path in sorted(RECORDS.glob("*/whole-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row["side"] == "plugin" and "planned_pool_tokens" in row.get("figures", {}):
                name = f"{path.parent.name} {path.stem} {row['case']['model']} {row['case']['launch']}"
                found.append(pytest.param(row["figures"], id=name))
    return found


@pytest.mark.parametrize("figures", whole_starts())
def test_what_a_whole_model_takes_was_foretold(figures: dict[str, dict[str, float]]) -> None:
    for name in ("weights_gib", "pool_tokens"):
        assert figures[f"planned_{name}"]["median"] == pytest.approx(figures[name]["median"], rel=TOLERANCE), name


def test_the_weights_are_all_counted_once() -> None:
    """Whole on one rank they are the checkpoint, but for the draft layer's copies and kv_b_proj in two bytes."""
    for _, sizes in MODELS.values():
        unquantised = {key: value for key, value in sizes.items() if key != "quantization_config"}
        config = DsaConfig.from_hf(unquantised)
        copies = 2 * config.vocab_size * config.hidden_size
        numbers = checkpoint.parameters(config) - copies
        float32 = config.n_routed_experts * (config.num_layers - 2)
        assert memory.weights(config, ALONE, drafts=True) == pytest.approx(2 * numbers + 2 * float32, rel=1e-6)


def test_eight_h200_hold_v32() -> None:
    """671 billion numbers of a byte: some 80 GiB on each of eight, more where attention is whole on each."""
    name, sizes = MODELS["V3.2"]
    found = {
        (way.engine, way.aim): way
        for way in ways(DsaConfig.from_hf(sizes), name, CHIPS["H200"], 1, 8, 131072, fp8=True)
    }
    assert set(found) == {(engine, aim) for engine in ("vllm", "sglang") for aim in ("latency", "throughput")}
    assert 78 < found["vllm", "latency"].gib["weights"] < 82
    for way in found.values():
        assert sum(way.gib.values()) == pytest.approx(0.9 * 139.8, abs=0.1)
    throughput, latency = found["sglang", "throughput"], found["sglang", "latency"]
    assert throughput.gib["weights"] > latency.gib["weights"] + 10, "q_b_proj and o_proj are whole on each"
    assert throughput.tokens > 5 * latency.tokens, "each rank has caches of its own"
    assert "--tp-size 8 --dp-size 8 --enable-dp-attention" in throughput.command


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--gpus", "1xH200"], 1, "does not fit"),
        (["--gpus", "2x8xH100", "--model", "GLM-5", "--context", "64k"], 0, "--nnodes 2"),
        (["--gpus", "8xH200", "--context", "1000000"], 2, "--context: expected at most the model's 163840 tokens"),
        (["--gpus", "3xH200"], 2, "num_attention_heads: expected a multiple"),
        (["--gpus", "8xH200", "--model", "no/folder/here"], 2, "expected a checkpoint's folder"),
    ],
)
def test_the_command(arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


@pytest.mark.parametrize("text", ["8H200", "8xH900", "0xH200", "x8xH200"])
def test_gpus_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--gpus", text])
    assert "expected GPUs as 8xH200" in capsys.readouterr().err


def test_scores_take_what_the_server_gives_them() -> None:
    """`memory` names both again, so that a plan needs no torch."""
    assert (memory.SCORES_BYTES, memory.DECODE_SCORES_BYTES) == (WORKSPACE_BYTES, DECODE_WORKSPACE_BYTES)
