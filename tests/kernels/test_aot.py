"""Every configuration that can be chosen on a chip compiles for it, fits its shared memory and does not spill.

The record of benchmarks/src/compile_matrix.py has all of them and must be complete. A run of this file compiles every
fourth again, other ones for each chip: DSV32_AOT_SHARE=1 compiles all, DSV32_AOT_TARGETS=sm90,gfx942 and
DSV32_AOT_OPERATIONS=select_topk narrow it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from dsv32_plugin.kernels.runtime import aot

TARGETS = [t for t in os.environ.get("DSV32_AOT_TARGETS", ",".join(aot.TARGETS)).split(",") if t]
OPERATIONS = [o for o in os.environ.get("DSV32_AOT_OPERATIONS", ",".join(aot.OPERATIONS)).split(",") if o]
SHARE = int(os.environ.get("DSV32_AOT_SHARE", "4"))
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PRESENT = [f"{operation}-{implementation}" for operation, implementation, _ in aot.modules(OPERATIONS)]


@pytest.fixture(scope="session")
def records() -> list[aot.Record]:
    return aot.compile_all([aot.TARGETS[t] for t in TARGETS], OPERATIONS, share=SHARE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernels", PRESENT)
@pytest.mark.timeout(1200)
def test_compiles(records, target, kernels):
    mine = [r for r in records if r.target == target and f"{r.operation}-{r.implementation}" == kernels]
    assert [f"{r.case}: {r.error}" for r in mine if r.error] == []


@pytest.mark.parametrize("target", aot.TARGETS)
def test_record_is_complete_and_clean(target):
    """Otherwise: python -m dsv32_plugin.benchmarks.compile_matrix && dsv32 bench report."""
    rows = json.loads((BENCHMARKS / "results" / "compile_matrix.json").read_text())["rows"]
    mine = {(r["operation"], r["implementation"], r["case"]): r["error"] for r in rows if r["target"] == target}
    assert set(mine) == {(o, i, case.name) for o, i, case in aot.cases(aot.TARGETS[target])}
    assert {name: error for name, error in mine.items() if error} == {}


def test_registers_leave_room_for_the_programs_of_index_logits():
    from dsv32_plugin.kernels.ops.index_logits import hopper

    rows = json.loads((BENCHMARKS / "results" / "compile_matrix.json").read_text())["rows"]
    mine = [r["registers"] for r in rows if (r["operation"], r["implementation"]) == ("index_logits", "hopper")]
    assert max(mine) <= 65536 // (hopper.PROGRAMS * hopper.WARPS * 32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernels", PRESENT)
def test_something_is_listed(target, kernels):
    operation, implementation = kernels.split("-")
    listed = [case for o, i, case in aot.cases(aot.TARGETS[target], [operation]) if i == implementation]
    assert bool(listed) == (implementation == "triton" or target == "sm90")


@pytest.mark.parametrize("target", TARGETS)
def test_names_are_unique(target):
    names = [(o, i, case.name) for o, i, case in aot.cases(aot.TARGETS[target], OPERATIONS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", TARGETS)
def test_accepted_spills_have_a_reason(target):
    for operation, _, case in aot.cases(aot.TARGETS[target], OPERATIONS):
        assert not case.spill_bytes or case.spill_reason, f"{operation} {case.name}"


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_launched_is_listed(target):
    """A launch that no list foresees would compile in the middle of serving, and nothing would have tested it."""
    command = [sys.executable, str(Path(__file__).parent / "launches.py"), target, *OPERATIONS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == []
