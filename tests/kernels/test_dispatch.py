import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cases
import dsv32_plugin.kernels as kernels
from dsv32_plugin.kernels.runtime import dispatch
from dsv32_plugin.kernels.runtime.target import TARGETS, target_of_device

OPERATIONS = sorted(kernels.FOLDERS)
GPU = torch.device("cuda", 0)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture
def gpu(monkeypatch):
    """A made-up GPU: returns a function that sets its capability (and HIP)."""

    def forget():
        for cached in (dispatch._choose, dispatch._function, target_of_device):
            cached.cache_clear()

    def become(capability, hip=None, arch=""):
        properties = SimpleNamespace(
            major=capability[0], minor=capability[1], gcnArchName=arch, warp_size=64, shared_memory_per_block_optin=0,
            shared_memory_per_block=0,
        )  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        forget()

    yield become
    forget()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_cpu_runs_the_reference(operation):
    choice = dispatch.implementation_for(operation, "cpu")
    assert choice.name == "reference"
    assert choice.reason


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_exported_and_every_implementation_exists(operation):
    assert operation in kernels.__all__
    assert callable(getattr(kernels, operation))
    for implementation in dispatch.existing(kernels.FOLDERS[operation]):
        module = dispatch.implementation_module(kernels.FOLDERS[operation], implementation)
        assert callable(getattr(module, operation))
        assert implementation == "reference" or any(map(module.supports, TARGETS.values()))


def test_choices_lists_every_operation():
    assert sorted(dispatch.choices("cpu")) == OPERATIONS


def test_the_best_implementation_for_the_capability(gpu):
    gpu((9, 0))
    assert dispatch.implementation_for("sparse_mla", GPU) == ("hopper", "best implementation for sm90")
    assert dispatch.implementation_for("dense_mla", GPU).name == "hopper"
    assert dispatch.implementation_for("select_topk", GPU) == ("triton", "best implementation for sm90")
    gpu((8, 6))
    assert dispatch.implementation_for("sparse_mla", GPU) == ("triton", "best implementation for sm86")
    with dispatch.force("hopper"), pytest.raises(NotImplementedError, match="hopper was forced but sm86 is not sm90"):
        dispatch.implementation_for("sparse_mla", GPU)
    with dispatch.force("triton"):
        assert dispatch.implementation_for("sparse_mla", GPU) == ("triton", "forced")


def test_hip_is_never_hopper(gpu):
    """A Radeon or Instinct may report capability 9.0 too."""
    gpu((9, 0), hip="6.4", arch="gfx90a")
    assert dispatch.implementation_for("sparse_mla", GPU) == ("triton", "best implementation for gfx90a")


def test_a_forced_implementation_that_does_not_exist_is_an_error(gpu):
    gpu((9, 0))
    refused = "select_topk: has no hopper implementation, only reference, triton; force one of these or none"
    with dispatch.force("hopper"), pytest.raises(ValueError, match=refused):
        dispatch.implementation_for("select_topk", GPU)
    with dispatch.force("reference"):
        assert dispatch.implementation_for("dense_mla", GPU).name == "reference"


def test_a_chip_of_its_own_is_one_file(gpu, monkeypatch, tmp_path):
    """A file in the operation's folder is found, asked for its chip, and preferred to the portable one."""
    (tmp_path / "sm80.py").write_text(
        "def supports(target):\n    return target.name == 'sm80'\n\n\ndef dense_mla(x):\n    return NotImplemented\n"
    )
    from dsv32_plugin.kernels.ops import dense_mla

    monkeypatch.setattr(dense_mla, "__path__", [*dense_mla.__path__, str(tmp_path)])
    dispatch.existing.cache_clear()
    try:
        assert dispatch.existing("dense_mla") == ("sm80", "hopper", "triton", "reference")
        gpu((8, 0))
        assert dispatch.implementation_for("dense_mla", GPU) == ("sm80", "best implementation for sm80")
        gpu((8, 6))
        assert dispatch.implementation_for("dense_mla", GPU).name == "triton"
    finally:
        dispatch.existing.cache_clear()
        dispatch.implementation_module.cache_clear()


def test_what_an_implementation_was_not_written_for_runs_on_the_next():
    function = dispatch.first_that_suits(lambda x: NotImplemented if x else "first", lambda x: "second")
    assert [function(0), function(1)] == ["first", "second"]
    last = dispatch.first_that_suits(lambda x: NotImplemented, lambda x: NotImplemented)
    with pytest.raises(AssertionError):
        last(0)


@pytest.mark.parametrize("folder", sorted(set(kernels.FOLDERS.values())))
def test_no_implementation_imports_another(folder):
    root = Path(kernels.__path__[0], "ops", folder)
    found = dispatch.existing(folder)
    for path in root.rglob("*.py"):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())) if part in (*found, "common") else ():
            if isinstance(node, ast.ImportFrom) and node.level == len(path.relative_to(root).parts):
                names = {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
                assert names & set(found) <= {part}, f"{path} imports {names}"


def test_triton_on_the_cpu_only_under_the_interpreter(gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        dispatch.force("triton"),
        pytest.raises(NotImplementedError, match="triton was forced but the tensors are on"),
    ):
        dispatch.implementation_for("sparse_mla", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dispatch.force("triton"):
        assert dispatch.implementation_for("sparse_mla", "cpu").name == "triton"
    assert dispatch.implementation_for("sparse_mla", "cpu").name == "reference"


def test_force_ends_with_its_block_and_nests():
    with dispatch.force("triton"), dispatch.force("reference"):
        assert dispatch.implementation_for("select_topk", "cpu") == ("reference", "forced")
    assert dispatch.implementation_for("select_topk", "cpu").reason != "forced"


def test_a_call_runs_the_forced_implementation():
    inputs = cases.select_topk_inputs("random", 2, 10, 4)
    with dispatch.force("reference"):
        cases.assert_topk_exact(kernels.select_topk(**inputs), **inputs)


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_unknown_names(name):
    with (
        pytest.raises(ValueError, match="implementation: expected one of hopper, triton, reference"),
        dispatch.force(name),
    ):
        pass
    with pytest.raises(ValueError, match="operation: expected one of norm_rope_cache"):
        dispatch.implementation_for(name, "cpu")


def test_the_environment_forces_too():
    code = "from dsv32_plugin.kernels.runtime import dispatch; dispatch.implementation_for('select_topk', 'cpu')"
    expected = "ValueError: DSV32_KERNELS: expected one of hopper, triton, reference, got 'fast'"
    assert expected in run(code, DSV32_KERNELS="fast").stderr


def test_imports_are_light():
    """References never import Triton; the packages alone import neither torch nor an engine."""
    code = """
import sys
heavy = lambda: {"torch", "triton", "vllm", "sglang", "transformers"} & set(sys.modules)
import dsv32_plugin, dsv32_plugin.kernels, dsv32_plugin.kernels.cache_layout
assert not heavy(), heavy()
from dsv32_plugin.kernels import *
import torch
from dsv32_plugin.kernels.ops.select_topk import reference
select_topk(torch.zeros(1, 3), None, torch.tensor([3]).int(), 2)
assert heavy() == {"torch"}, heavy()
print("light")
"""
    result = run(code)
    assert result.stdout == "light\n", result.stderr


def test_a_folder_never_hides_its_operation():
    """`dsv32_plugin.kernels.ops.select_topk` is the function, whichever of folder and function is imported first."""
    code = """
import dsv32_plugin.kernels.ops.select_topk.reference
import dsv32_plugin.kernels as kernels
from dsv32_plugin.kernels import select_topk
from dsv32_plugin.kernels.ops.sparse_mla import reference
assert select_topk is kernels.select_topk and select_topk.__module__.endswith("select_topk.api")
assert kernels.sparse_mla.__module__.endswith("sparse_mla.api")
assert set(kernels.__all__) <= set(dir(kernels))
print("function")
"""
    result = run(code)
    assert result.stdout == "function\n", result.stderr


def test_an_unknown_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'flash_mla'"):
        _ = kernels.flash_mla
