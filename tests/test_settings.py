"""Every DSV32_* variable: a wrong value is named, a misspelt variable is noticed."""

from __future__ import annotations

import pytest

from dsv32_plugin import settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("DSV32_PLUGIN", "off", None, id="off"),
        pytest.param("DSV32_PLUGIN", "", None, id="empty-is-the-default"),
        pytest.param("DSV32_PLUGIN", "maybe", "DSV32_PLUGIN: expected one of 0, 1", id="not-a-flag"),
        pytest.param("DSV32_VARIANT", "Speciale", None, id="variant"),
        pytest.param("DSV32_VARIANT", "v4", "DSV32_VARIANT: expected v3.2 or speciale, got 'v4'", id="no-variant"),
        pytest.param("DSV32_KERNELS", "triton", None, id="read-by-the-kernels"),
        pytest.param("DSV32_PLUGINS", "0", "it has no effect", id="misspelt"),
    ],
)
def test_a_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str | None) -> None:
    monkeypatch.setenv(name, value)
    assert settings.chosen()[name] == value
    problem = settings.problem(name)
    if message is None:
        assert problem is None
    else:
        assert problem is not None
        assert message in problem


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV32_PLUGIN", raising=False)
    assert settings.plugin_enabled()
    monkeypatch.setenv("DSV32_PLUGIN", "0")
    assert not settings.plugin_enabled()
