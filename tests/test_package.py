"""The distribution holds every package of the checkout, and nothing that would shadow another."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11")
ROOT = Path(__file__).parent.parent


def test_every_folder_of_python_is_a_listed_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for package, folder in setuptools["package-dir"].items():
        if package in setuptools["package-data"] and not (ROOT / folder / "__init__.py").exists():
            found.add(package)  # a folder of files, beside the code where it is installed
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert found == set(setuptools["packages"])


def test_only_our_own_name_is_a_package_at_the_top() -> None:
    assert [init.parent.name for init in ROOT.glob("*/__init__.py")] == ["dsv32_plugin"]


def test_importing_the_package_imports_no_engine_and_no_torch() -> None:
    program = "import dsv32_plugin, sys; print([m for m in ('torch', 'vllm', 'triton', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WITH_ENGINES = {
    *("fastapi", "huggingface_hub", "numpy", "openai", "pydantic", "safetensors"),
    *("starlette", "tokenizers", "torch", "transformers", "triton", "xgrammar"),
}
"""What vLLM and SGLang both bring."""
EXTRAS = {
    "dsv32_plugin": "tiny",
    "dsv32_plugin/apis": "vllm",
    "dsv32_plugin/core": "vllm",
    "dsv32_plugin/tools": "tiny",
    "dsv32_plugin/training": "train",
    "dsv32_plugin/vllm_adapter": "vllm",
    "dsv32_plugin/sglang_adapter": "sglang",
    "kernels/src": "vllm",
    "parsers/src": "vllm",
    "benchmarks/src": "bench",
}
"""Folder of the product -> the extra that it is for."""


@pytest.mark.parametrize("folder", EXTRAS)
def test_what_is_imported_is_declared(folder: str) -> None:
    """httpx and psutil were there only because some engine happened to need them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][EXTRAS[folder]]]
    declared = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in wanted}
    files = ast_files(folder)
    found = {module.split(".")[0] for names in files.values() for module in names} - set(sys.stdlib_module_names)
    own = {"dsv32_plugin", "vllm", "sglang"}
    assert found - own <= declared | WITH_ENGINES
    assert any(files.values()), "nothing was looked at"


def ast_files(folder: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in [ROOT / folder, *((ROOT / folder).rglob("*") if folder == "kernels/src" else ())]:
        if path.is_dir():
            found |= {f"{path.relative_to(ROOT)}/{name}": modules for name, modules in imported(path).items()}
    return found


def imported(folder: Path) -> dict[str, set[str]]:
    """What each file of a folder imports, also inside functions."""
    found: dict[str, set[str]] = {}
    for path in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {
            f"{node.module}.{alias.name}"
            for node in nodes
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            for alias in node.names
        }
        found[path.name] = names
    return found


@pytest.mark.parametrize(("ours", "other"), [("vllm", "sglang"), ("sglang", "vllm")])
def test_an_adapter_knows_its_engine_only(ours: str, other: str) -> None:
    for folder in (f"{ours}_adapter", f"{ours}_adapter/cpu"):
        for name, modules in imported(ROOT / "dsv32_plugin" / folder).items():
            assert not {m for m in modules if m.split(".")[0] == other or f"{other}_adapter" in m}, name


@pytest.mark.parametrize("folder", [".", "apis", "core", "tools", "training"])
def test_what_both_adapters_share_knows_no_engine(folder: str) -> None:
    for name, modules in imported(ROOT / "dsv32_plugin" / folder).items():
        assert not {m for m in modules if m.split(".")[0] in ("vllm", "sglang")}, name


def test_the_core_knows_none_of_those_who_use_it() -> None:
    rooms = {"apis", "benchmarks", "sglang_adapter", "tools", "training", "vllm_adapter"}
    for name, modules in imported(ROOT / "dsv32_plugin" / "core").items():
        assert not {m for m in modules if m.split(".")[0] == "dsv32_plugin" and m.split(".")[1] in rooms}, name


@pytest.mark.parametrize("folder", [".", "cpu"])
def test_both_adapters_use_the_same_names(folder: str) -> None:
    """What is in one and not in the other is what the other engine has no need of."""
    files = {
        engine: {path.name for path in (ROOT / "dsv32_plugin" / f"{engine}_adapter" / folder).glob("*.py")}
        for engine in ("vllm", "sglang")
    }
    for engine, alone in ONLY[folder].items():
        (other,) = set(files) - {engine}
        assert files[engine] - files[other] == alone


ONLY = {
    ".": {
        "vllm": {"endpoints.py"},
        "sglang": {
            "arguments.py",
            "exchange.py",
            "float32.py",
            "requests.py",
            "responses.py",
            "rollout.py",
            "speculation.py",
        },
    },
    "cpu": {"vllm": {"operators.py"}, "sglang": {"devices.py", "pages.py", "speculation.py"}},
}
"""Folder of an adapter -> what only that engine needs."""
