"""Every DSV32_* variable: a wrong value is named, a misspelt variable is noticed."""

from __future__ import annotations

import pytest

from dsv32_plugin import settings
from dsv32_plugin.core.policy import Policy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("DSV32_PLUGIN", "off", None, id="off"),
        pytest.param("DSV32_PLUGIN", "", None, id="empty-is-the-default"),
        pytest.param("DSV32_PLUGIN", "maybe", "DSV32_PLUGIN: expected one of 0, 1", id="not-a-flag"),
        pytest.param("DSV32_VARIANT", "Speciale", None, id="variant"),
        pytest.param("DSV32_VARIANT", "v4", "DSV32_VARIANT: expected v3.2 or speciale, got 'v4'", id="no-variant"),
        pytest.param("DSV32_KERNELS", "triton", None, id="read-by-the-kernels"),
        pytest.param("DSV32_KERNELS", "Tritn", "DSV32_KERNELS: expected one of hopper, triton, ref", id="no-kernels"),
        pytest.param("DSV32_BATCH_INVARIANT", "yes", None, id="invariant"),
        pytest.param("DSV32_BATCH_INVARIANT", "ture", "DSV32_BATCH_INVARIANT: expected one", id="not-invariant"),
        pytest.param("DSV32_MASKED_PREFILL", "0", None, id="no-mask"),
        pytest.param("DSV32_MASKED_PREFILL", "auto", "DSV32_MASKED_PREFILL: expected one of 0, 1", id="not-a-mask"),
        pytest.param("DSV32_CONTEXT", "discard-all", None, id="strategy"),
        pytest.param("DSV32_CONTEXT", '{"strategy": "keep-last-n", "keep": 5}', None, id="strategy-with-options"),
        pytest.param(
            "DSV32_CONTEXT", "forget", "DSV32_CONTEXT: strategy: expected one of discard-all", id="no-strategy"
        ),
        pytest.param("DSV32_CONTEXT", '{"strategy"', "DSV32_CONTEXT: Expecting", id="strategy-is-no-json"),
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


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", " True "])
def test_true_is_said_alike_everywhere(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """DSV32_BATCH_INVARIANT=true was no error, and had no effect."""
    for name, reader in settings._READERS.items():
        if name not in ("DSV32_ADMITTED", "DSV32_CONTEXT", "DSV32_KERNELS", "DSV32_VARIANT"):
            monkeypatch.setenv(name, value)
            assert reader() is True, name


def test_the_policy_reads_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV32_BATCH_INVARIANT", "true")
    assert Policy.from_settings().batch_invariant


def test_a_mask_depends_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV32_MASKED_PREFILL", raising=False)
    assert Policy.from_settings().masked_prefill is None
    monkeypatch.setenv("DSV32_MASKED_PREFILL", "1")
    assert Policy.from_settings().masked_prefill is True
    monkeypatch.setenv("DSV32_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="DSV32_MASKED_PREFILL: expected 0 or nothing with DSV32_BATCH_INVARIANT=1"):
        Policy.from_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [("DSV32_PLUGIN", "maybe"), ("DSV32_KERNELS", "cuda"), ("DSV32_BATCH_INVARIANT", "2"), ("DSV32_VARIANT", "v4")],
)
def test_a_start_ends_at_a_wrong_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        settings.check()


def test_a_start_names_a_variable_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DSV32_KERNEL", "triton")
    monkeypatch.setattr(settings.logger, "handlers", [caplog.handler])  # an engine's logger keeps its lines to itself
    settings.check()
    assert "DSV32_KERNEL: expected one of DSV32_ADMITTED, DSV32_ALLOW_DEVELOPER" in caplog.text
