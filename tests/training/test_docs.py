"""docs/notes/training.md says what the record says."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from dsv32_plugin.training.evaluate import markdown

ROOT = Path(__file__).parent.parent.parent


def test_the_tables_are_the_records() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))
    assert markdown(record) in (ROOT / "docs" / "notes" / "training.md").read_text(encoding="utf-8")


def test_the_time_of_the_training_is_that_of_its_curves() -> None:
    curves = json.loads((ROOT / "benchmarks" / "results" / "training_curves.json").read_text(encoding="utf-8"))
    steps = [after["run_step"] - before["run_step"] for before, after in pairwise([{"run_step": 0}, *curves])]
    seconds = sum(65536 * n / line["tokens_per_second"] for n, line in zip(steps, curves, strict=True))
    text = " ".join((ROOT / "docs" / "notes" / "training.md").read_text(encoding="utf-8").split())
    assert f"{sum(steps)} steps of its training took {seconds:.0f} s on one" in text


def test_the_record_meets_the_aim() -> None:
    """Sparse at least 95 % up to the trained length, within 2 points of dense; a random selection fails."""
    record = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))
    needles = record["needles"]
    assert record["questions"] == 500
    for length in ("512", "1024", "2048", "4096"):
        assert needles["sparse"][length] >= max(0.95, needles["dense"][length] - 0.02)
        assert needles["random"][length] < 0.05
