"""Every variant that is launched on a chip compiles for it, fits its shared memory and does not spill.

The record of benchmarks/src/compile_matrix.py has all of them and must be complete. A run of this file compiles every
twelfth again, other ones for each chip: DSV32_AOT_SHARE=1 compiles all, DSV32_AOT_TARGETS=sm90,gfx942 and
DSV32_AOT_OPERATIONS=select_topk narrow it.
"""

import ast
import functools
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dsv32_plugin.kernels.runtime import aot, dispatch
from dsv32_plugin.kernels.runtime.target import chip_of

TARGETS = [t for t in os.environ.get("DSV32_AOT_TARGETS", ",".join(aot.TARGETS)).split(",") if t]
OPERATIONS = [o for o in os.environ.get("DSV32_AOT_OPERATIONS", ",".join(aot.OPERATIONS)).split(",") if o]
SHARE = int(os.environ.get("DSV32_AOT_SHARE", "12"))
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PRESENT = [f"{o}-{i}" for o in OPERATIONS for i in reversed(dispatch.existing(o)) if i != "reference"]


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
    assert set(mine) == {(v.operation, v.implementation, v.name) for v in aot.variants(aot.TARGETS[target])}
    assert {name: error for name, error in mine.items() if error} == {}


def test_registers_leave_room_for_the_programs_of_index_logits():
    from dsv32_plugin.kernels.ops.index_logits import hopper

    rows = json.loads((BENCHMARKS / "results" / "compile_matrix.json").read_text())["rows"]
    mine = [r["registers"] for r in rows if (r["operation"], r["implementation"]) == ("index_logits", "hopper")]
    assert max(mine) <= 65536 // (hopper.PROGRAMS * hopper.WARPS * 32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernels", PRESENT)
def test_something_is_launched(target, kernels):
    operation, implementation = kernels.split("-")
    launched = [v for v in aot.variants(aot.TARGETS[target], [operation]) if v.implementation == implementation]
    assert bool(launched) == (implementation == "triton" or target == "sm90")


@pytest.mark.parametrize("target", TARGETS)
def test_names_are_unique(target):
    names = [(v.operation, v.implementation, v.name) for v in aot.variants(aot.TARGETS[target], OPERATIONS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", TARGETS)
def test_accepted_spills_have_a_reason(target):
    for variant in aot.variants(aot.TARGETS[target], OPERATIONS):
        assert variant.spill is None or (variant.spill.spill_bytes and variant.spill.reason), variant.name


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_launched(target):
    """A kernel that the recorded calls do not reach would be compiled for no chip."""
    launched = {v.launch.function.__name__ for v in aot.variants(aot.TARGETS[target])}
    written = set()
    for operation in aot.OPERATIONS:
        for path in (Path(aot.__file__).parents[1] / "ops" / operation).rglob("*.py"):
            if target == "sm90" or not any(part.startswith("hopper") for part in path.parts):
                written |= kernels_in(path)
    assert written
    assert launched == written


def kernels_in(path: Path) -> set[str]:
    """Functions that are launched: the names of device functions end in another way."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if f.name.endswith("_kernel") and f.decorator_list}


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("operation", ["sparse_mla", "dense_mla"])
def test_batch_invariant_calls_split_the_keys_alike_for_every_number_of_tokens(target, operation):
    described = importlib.import_module(f"dsv32_plugin.kernels.ops.{operation}.calls")
    splits = {True: set(), False: set()}
    with aot.driver_of(aot.TARGETS[target]):
        for implementation in dispatch.implementations(operation, aot.TARGETS[target]):
            attend = getattr(dispatch.implementation_module(operation, implementation), operation)
            for call in described.calls():
                for invariant, found in splits.items():
                    attend_so = functools.partial(attend, batch_invariant=invariant)
                    launches = aot._launches(attend_so, call._replace(covers=lambda launch: True))
                    found |= {launch.named_constants["SPLITS"] for _, launch in launches}
    assert len(splits[True]) == 1
    assert len(splits[False]) > 1


def test_recording_leaves_nothing_behind():
    from triton import knobs
    from triton.runtime import driver

    before = driver._active, knobs.runtime.jit_cache_hook
    aot._variants.__wrapped__(aot.TARGETS["sm90"])
    assert (driver._active, knobs.runtime.jit_cache_hook) == before
    with pytest.raises(AssertionError, match="pretend"):
        chip_of(torch.device("meta"))


def test_threads_record_what_one_alone_does():
    """Two chips recorded at once took each other's launches: lists were short, and names were others' calls'."""
    alone = {name: len(aot._variants.__wrapped__(target)) for name, target in aot.TARGETS.items()}
    aot._variants.cache_clear()
    with ThreadPoolExecutor(len(aot.TARGETS)) as pool:
        together = dict(zip(aot.TARGETS, pool.map(aot.variants, aot.TARGETS.values()), strict=True))
    assert {name: len(found) for name, found in together.items()} == alone


def test_a_second_chip_does_not_change_the_first():
    """Triton keeps a kernel's variants by device, and here every chip is one."""
    first = [v.name for v in aot._variants.__wrapped__(aot.TARGETS["sm90"])]
    aot._variants.__wrapped__(aot.TARGETS["gfx942"])
    assert [v.name for v in aot._variants.__wrapped__(aot.TARGETS["sm90"])] == first
