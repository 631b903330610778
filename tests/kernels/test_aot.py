"""Every configuration that can be chosen on a chip compiles for it, fits its shared memory and does not spill.

DSV32_AOT_TARGETS=sm90,gfx942 and DSV32_AOT_OPERATIONS=select_topk narrow a run.
"""

import os

import pytest

pytest.importorskip("triton")

from dsv32_plugin.kernels import aot

TARGETS = [t for t in os.environ.get("DSV32_AOT_TARGETS", ",".join(aot.TARGETS)).split(",") if t]
OPERATIONS = [o for o in os.environ.get("DSV32_AOT_OPERATIONS", ",".join(aot.OPERATIONS)).split(",") if o]
PRESENT = [f"{operation}-{implementation}" for operation, implementation, _ in aot.modules(OPERATIONS)]


@pytest.fixture(scope="session")
def records() -> list[aot.Record]:
    return aot.compile_all([aot.TARGETS[t] for t in TARGETS], OPERATIONS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernels", PRESENT)
@pytest.mark.timeout(1200)
def test_compiles(records, target, kernels):
    mine = [r for r in records if r.target == target and f"{r.operation}-{r.implementation}" == kernels]
    if kernels.endswith("hopper") and target != "sm90":
        assert mine == []
        return
    assert mine, "no configuration is listed for this target"
    assert [f"{r.case}: {r.error}" for r in mine if r.error] == []


@pytest.mark.parametrize("target", TARGETS)
def test_names_are_unique(target):
    names = [(o, i, case.name) for o, i, case in aot.cases(aot.TARGETS[target], OPERATIONS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", TARGETS)
def test_accepted_spills_have_a_reason(target):
    for operation, _, case in aot.cases(aot.TARGETS[target], OPERATIONS):
        assert not case.spill_bytes or case.spill_reason, f"{operation} {case.name}"
