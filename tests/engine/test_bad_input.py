"""What is wrong with a checkpoint, an option or a plugin beside ours is said at start-up, by its name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BAD_CONFIGS, BAD_WEIGHTS, Build, edit_config, edit_weight
from engines import installed

NAME = installed().name
building = import_module(f"building_{NAME}")
pytestmark = pytest.mark.engine


def test_a_good_checkpoint_is_built_from_our_classes(build: Build, damageable: Path) -> None:
    built = build(damageable)
    assert type(built).__module__ == f"dsv32_plugin.{NAME}_adapter.model"
    modules = {type(module).__module__ for module in built.modules()}
    assert not any("deepseek" in name for name in modules), "no class of the engine's own model is used"


@pytest.mark.parametrize(("changes", "says"), BAD_CONFIGS)
def test_a_bad_config_names_its_key(build: Build, damageable: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(damageable, **changes)
    with pytest.raises((ValueError, RuntimeError), match="config key") as error:
        build(damageable)
    assert says in str(error.value)


@pytest.mark.parametrize(("name", "change", "says"), BAD_WEIGHTS)
def test_a_bad_weight_is_named(
    build: Build, damageable: Path, name: str, change: Callable[[torch.Tensor], dict[str, torch.Tensor]], says: str
) -> None:
    edit_weight(damageable, name, change)
    with pytest.raises(ValueError, match="checkpoint: ") as error:
        build(damageable)
    assert says in str(error.value)


@pytest.mark.parametrize(("options", "says"), building.BAD_OPTIONS)
def test_a_bad_option_is_named(build: Build, damageable: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match="--") as error:
        build(damageable, **options)
    assert says in str(error.value)


@pytest.mark.parametrize("place", building.TAKEN)
def test_a_place_that_another_plugin_has_taken_is_named(
    build: Build, damageable: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """It would serve in ours, or break it, and nobody would know."""
    build(damageable)
    building.TAKEN[place](monkeypatch)
    with pytest.raises(RuntimeError, match=f"{place}: expected dsv32_plugin.* to be registered") as error:
        build(damageable)
    assert "_PLUGINS=dsv32" in str(error.value)
