"""The rooms of the package: imports lead down, and files do not import each other."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("tomllib", reason="part of Python from 3.11")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def structure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "structure", module)
    spec.loader.exec_module(module)
    return module


def test_no_arrow_leads_up_and_there_is_no_circle(structure: ModuleType) -> None:
    """What to do stands in each line; `python tools/structure.py` prints them and the rooms."""
    assert structure.faults(structure.read(ROOT)) == []


FILES = {
    "pyproject.toml": "[tool.setuptools]\n"
    'packages = ["dsv32_plugin", "dsv32_plugin.kernels", "dsv32_plugin.kernels.a"]\n'
    '[tool.setuptools.package-dir]\n"dsv32_plugin" = "dsv32_plugin"\n"dsv32_plugin.kernels" = "kernels/src"\n',
    "dsv32_plugin/__init__.py": "",
    "dsv32_plugin/top.py": "def f():\n    import dsv32_plugin.kernels.a.api\n",
    "dsv32_plugin/bottom.py": "from dsv32_plugin import __version__\n",
    "kernels/src/__init__.py": "import torch\n",
    "kernels/src/checks.py": "from dsv32_plugin import bottom\n",
    "kernels/src/a/__init__.py": "",
    "kernels/src/a/api.py": "from ..checks import tensor\nfrom . import other\n",
    "kernels/src/a/other.py": "",
}
ORDER = (("top",), ("kernels",), ("bottom",), ("dsv32_plugin",))


@pytest.fixture
def house(structure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(structure, "ORDER", ORDER)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_rooms_are_folders_and_loose_files_and_arrows_are_imports(structure: ModuleType, house: Path) -> None:
    found = structure.read(house)
    arrows = {"top": {"kernels"}, "kernels": {"bottom"}, "bottom": set(), "dsv32_plugin": set()}
    assert found.rooms == arrows
    assert structure.floors(arrows) == {"top": 2, "kernels": 1, "bottom": 0, "dsv32_plugin": 0}
    assert structure.faults(found) == []
    assert structure.text(found, house).startswith("4 rooms, 3 floors, 2 arrows, 0 circles of rooms, 0 of files")


def test_an_arrow_up_and_the_circle_that_it_closes_are_named(structure: ModuleType, house: Path) -> None:
    (house / "dsv32_plugin" / "bottom.py").write_text("from dsv32_plugin import top\n")
    found = structure.read(house)
    assert structure.circles(found.rooms) == [("bottom", "kernels", "top")]
    up, circle = structure.faults(found)
    assert up.startswith("bottom imports top, which is not below it")
    assert circle.startswith("bottom, kernels.a.api, kernels.checks, top import each other")


def test_every_room_has_its_line(structure: ModuleType, house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "ORDER", (("top",), ("kernels", "gone"), ("dsv32_plugin",)))
    assert structure.faults(structure.read(house)) == [
        "ORDER: expected every room and no other; add ['bottom'], remove ['gone']"
    ]
