"""No option of vLLM that touches what the plugin does is ignored in silence: each is judged, in one table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv32_plugin import surface
from dsv32_plugin.vllm_adapter import options

STORED = surface.stored(Path(options.__file__).parent)
"""Release -> what the adapter uses of it, all options included."""
classes = pytest.mark.parametrize("name", options.OPTIONS)


@classes
@pytest.mark.parametrize("release", STORED)
def test_every_option_of_a_release_is_judged(release: str, name: str) -> None:
    """One that is missing: read what it does, and name it in `vllm_adapter/options.py` with what becomes of it."""
    assert set(STORED[release][f"vllm.config:{name}.*"]) <= options.OPTIONS[name].names()


@classes
def test_every_option_is_judged_once_and_is_one_of_a_release_that_is_served(name: str) -> None:
    judged = options.OPTIONS[name]
    names = [option for part in judged[2:] for option in part.split()]
    assert len(names) == len(set(names))
    assert set(names) <= {option for found in STORED.values() for option in found[f"vllm.config:{name}.*"]}


def configured(changed: tuple[str, str] | None = None) -> Any:
    """A configuration of the installed vLLM with the defaults of all that is refused, but for one (class, option)."""
    config = pytest.importorskip("vllm.config")
    parts: dict[str, Any] = {}
    for name, judged in options.OPTIONS.items():
        part = parts[judged.config] = object.__new__(getattr(config, name))
        for option in judged.refused.split():
            if option in part.__dataclass_fields__:
                default = options._default(part.__dataclass_fields__[option])
                object.__setattr__(part, option, "changed" if (name, option) == changed else default)
    return SimpleNamespace(**parts)


def test_defaults_are_taken() -> None:
    assert list(options.refused(configured())) == []


@classes
def test_every_other_value_is_refused_by_the_name_of_its_option(name: str) -> None:
    config = pytest.importorskip("vllm.config")
    judged = options.OPTIONS[name]
    for option in judged.refused.split():
        if option in getattr(config, name).__dataclass_fields__:
            ((expected, default, value),) = options.refused(configured((name, option)))
            assert value == "changed" != default
            assert expected in (f"{judged.flag}: expected {option}", f"--{option.replace('_', '-')}: expected")
