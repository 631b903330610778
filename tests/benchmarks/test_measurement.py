"""The measuring itself, on the references at tiny sizes: right results pass, wrong ones never get a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv32_plugin import cli, kernels
from dsv32_plugin.benchmarks import clock, harness, layer, layer_inputs, our_layer, records, views
from dsv32_plugin.benchmarks.harness import Case, Work
from dsv32_plugin.benchmarks.layer_record import layer_us
from dsv32_plugin.core import planner, plans
from dsv32_plugin.kernels.runtime import dispatch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the tiny sizes of a machine without a GPU")
TINY = layer.Plan(contexts=(2112,), batches=(1,), heads=(2,), chunk=2, hidden=64)


def visited(*cases: Case) -> dict[str, Any]:
    """Side -> its row of a case after a visit to each of these, which are the same."""
    found = harness.Visits()
    for case in cases:
        found.add(case, clock.CpuClock(), {"bytes_per_us": 1.0, "bf16_flops_per_us": 1.0})
    return {row["side"]: row for row in found.rows(cases[0])}


def layer_rows(step: layer_inputs.Step, visits: int = 1) -> list[dict[str, Any]]:
    found = layer.LayerVisits(step)
    for _ in range(visits):
        found.add(clock.CpuClock())
    return found.rows()


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_the_grid_runs_without_a_gpu_and_says_what_that_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["rows"]
    assert all(row["figures"]["cold_us"]["median"] > 0 for row in record["rows"] if row["side"] == "ours")
    assert "figures mean nothing" in record["meaningless"]
    assert {"gpu", "versions", "commit", "command", "date", "ceilings"} <= set(record)
    printed = capsys.readouterr().out
    assert "figures mean nothing" in " ".join(printed.split())
    # A missing peer is named with its reason, in the record and in the output.
    assert {"FlashMLA dense": "no GPU"}.items() <= records.missing(record).items()
    assert "Missing: FlashMLA dense (no GPU)." in printed


@pytest.mark.parametrize(
    ("operation", "cases"),
    [
        ("masked_mha", "masked"),
        ("dense_mla", "dense decode"),
        ("select_topk", "select_topk"),
        ("index_query", "index_q"),
    ],
)
def test_a_wrong_kernel_has_no_speed(
    operation: str, cases: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(kernels, operation)

    def wrong(*arguments: Any, out: torch.Tensor | None = None, **options: Any) -> Any:
        result = right(*arguments, out=out, **options)
        if out is not None:
            out[-1] = out[-1].clone().roll(1, 0)  # heads, or selected keys, of one token change places
        return result

    monkeypatch.setattr(kernels, operation, wrong)
    output = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--only", cases, "--output", str(output)]) == 1
    rows = rows_of(output)
    assert rows
    for row in rows:
        assert row["error"].startswith("AssertionError")
        assert "figures" not in row


def test_a_kernel_that_turns_wrong_while_it_is_timed_has_no_speed() -> None:
    launches = []

    def check() -> None:
        if len(launches) > 1:
            raise AssertionError("wrong after some launches")

    case = Case("x", {}, lambda: Work(lambda: launches.append(1), check, bytes=1))
    row = visited(case)["ours"]
    assert row["error"] == "AssertionError: wrong after some launches"
    assert "figures" not in row


def test_every_visit_counts() -> None:
    class Rising:
        """Each visit to a case takes longer than the last."""

        us = 0.0

        def time(self, variants: dict[str, Any], *, cold: bool = True) -> dict[str, clock.Timing]:
            self.us += 1.0
            return {name: clock.Timing((self.us,) * 5) for name in variants}

    case = Case("x", {}, lambda: Work(lambda: None, lambda: None, bytes=1, peers={"other": lambda: None}))
    found, rising = harness.Visits(), Rising()
    for _ in range(3):
        found.add(case, rising, {"bytes_per_us": 1.0, "bf16_flops_per_us": 1.0})
    ours, other = found.rows(case)
    assert ours["figures"]["cold_us"] == other["figures"]["cold_us"] == {"median": 3.0, "low": 1.0, "high": 5.0}
    assert ours["figures"]["warm_us"] == {"median": 4.0, "low": 2.0, "high": 6.0}
    assert ours["rounds"] == 15


def test_a_case_that_is_wrong_in_one_visit_has_no_speed() -> None:
    answers = iter([None, None, "wrong"])

    def check() -> None:
        assert next(answers) is None, "wrong in the second visit"

    case = Case("x", {}, lambda: Work(lambda: None, check, bytes=1))
    row = visited(case, case, case)["ours"]
    assert "wrong in the second visit" in row["error"]
    assert "figures" not in row


def test_a_peer_that_computes_something_else_is_not_compared() -> None:
    def differs() -> None:
        raise AssertionError("another selection")

    def broken() -> None:
        raise RuntimeError("no such symbol")

    work = Work(
        lambda: None,
        lambda: None,
        bytes=1,
        peers={"fine": lambda: None, "other": lambda: None, "broken": broken},
        peer_checks={"other": differs},
    )
    rows = visited(Case("x", {}, lambda: work))
    assert {side for side, row in rows.items() if "figures" in row} == {"ours", "fine"}
    missing = {side: row["missing"] for side, row in rows.items() if "missing" in row}
    assert missing == {"other": "AssertionError: another selection", "broken": "RuntimeError: no such symbol"}
    (case,) = views.kernel_cases({"rows": list(rows.values())})
    assert case.best == rows["fine"]


def test_the_floor_is_the_larger_of_bytes_and_arithmetic() -> None:
    ceiling = {"bytes_per_us": 100.0, "bf16_flops_per_us": 1000.0, "fp8_flops_per_us": 2000.0}

    def work(**options: Any) -> Work:
        return Work(lambda: None, lambda: None, **options)

    assert harness.floor_us(work(bytes=1000, flops=1000), ceiling) == (10.0, "bytes")
    assert harness.floor_us(work(bytes=100, flops=4000), ceiling) == (4.0, "arithmetic")
    assert harness.floor_us(work(bytes=100, flops=4000, dtype="fp8"), ceiling) == (2.0, "arithmetic")


def test_a_device_without_an_fp8_product_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("needs compute capability 8.9\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    ceiling = clock.ceilings(clock.CpuClock())
    assert "fp8_flops_per_us" not in ceiling
    assert "no fp8 product (needs compute capability 8.9)" in views.ceilings_text(ceiling)
    fp8 = Work(lambda: None, lambda: None, bytes=0, flops=1 << 40, dtype="fp8")
    assert harness.floor_us(fp8, ceiling) == harness.floor_us(dataclasses.replace(fp8, dtype="bf16"), ceiling)


def test_a_run_out_of_time_names_what_it_left_out(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--seconds", "0", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["rows"] == []
    assert len(record["not_run"]) > 3


def test_a_layer_sums_to_its_operations(tmp_path: Path) -> None:
    record = layer.run(TINY, tmp_path / "layer.json")
    rows = {(row["case"]["mode"], row["side"]): row for row in record["rows"]}
    assert set(rows) == {(mode, side) for mode in ("prefill", "decode") for side in ("dense", "in-tree", "ours")}
    assert "no GPU" in rows["decode", "in-tree"]["missing"]
    for mode in ("prefill", "decode"):
        for side in ("dense", "ours"):
            row = rows[mode, side]
            assert sum(row["operations"].values()) == pytest.approx(layer_us(row), abs=0.1)
        assert "index scores and selection" in rows[mode, "ours"]["operations"]
    assert rows["prefill", "dense"]["us_per_token"] == pytest.approx(layer_us(rows["prefill", "dense"]) / 2, rel=1e-3)


def test_a_layer_that_selects_other_keys_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plans.Sparse.select

    def wrong(self: plans.Sparse, q: Any, weights: Any, cache: Any, slots: torch.Tensor, *rest: Any) -> None:
        right(self, q, weights, cache, slots, *rest)
        last = self.step.slots_t[-1]
        present = (slots[-1] == last).any()
        slots[-1, 0] = slots[-1, 1] if present else last  # one key of one token is another one

    monkeypatch.setattr(plans.Sparse, "select", wrong)
    rows = layer_rows(layer_inputs.Step(1, 2112, 1, 2, 64))
    ours = next(row for row in rows if row["side"] == "ours")
    assert "AssertionError: token 0: not" in ours["error"]
    assert "figures" not in ours
    dense = next(row for row in rows if row["side"] == "dense")
    assert "figures" in dense


@pytest.mark.parametrize("operation", ["norm_rope_cache", "index_query", "rope_query", "sparse_mla"])
@pytest.mark.parametrize("products", [True, False], ids=["whole", "between-the-products"])
def test_what_the_layer_computes_is_checked(monkeypatch: pytest.MonkeyPatch, operation: str, products: bool) -> None:
    """Of the real layer; its references are right, and the operation is wrong outside them."""
    side = our_layer.OurLayer(layer_inputs.Inputs(layer_inputs.Step(2, 2112, 1, 2, 64)), products=products)
    side.check()
    right = getattr(kernels, operation)

    def wrong(*inputs: Any, **options: Any) -> Any:
        result = right(*inputs, **options)
        if dispatch._forced.get() is None:
            first = result[0] if isinstance(result, tuple) else result
            first.view(torch.uint8)[-1] = first.view(torch.uint8)[0]  # one token has another's
        return result

    monkeypatch.setattr(kernels, operation, wrong)
    with pytest.raises(AssertionError, match="relative error"):
        side.check()


@pytest.mark.parametrize(
    ("new", "operations"),
    [
        (1, ["projections", "norms, rope and caches", "attention"]),
        (64, ["projections", "norms, rope and caches", "up-projection of the context", "attention"]),
    ],
    ids=["decode", "prefill"],
)
def test_the_indexer_is_skipped_while_everything_is_selected(
    new: int, operations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "EXPANDED_PAIRS", 1)  # the shortest prefill expands
    rows = layer_rows(layer_inputs.Step(1, 64, new, 2, 64), visits=2)
    ours = next(row for row in rows if row["side"] == "ours")
    assert list(ours["operations"]) == operations
    assert ours["rounds"] == 4
    assert sum(ours["operations"].values()) == pytest.approx(layer_us(ours), abs=0.1)


def test_a_prefill_under_a_mask_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "masked_pays", lambda *sizes: True)
    rows = layer_rows(layer_inputs.Step(1, 2176, 4, 2, 64), visits=1)
    ours = next(row for row in rows if row["side"] == "ours")
    indexer, expansion = "index scores and selection", "up-projection of the context"
    assert list(ours["operations"]) == ["projections", "norms, rope and caches", indexer, expansion, "attention"]
