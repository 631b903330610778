"""A name is compared with an expression of the client's in bounded time, whatever the expression."""

from __future__ import annotations

import time

import pytest

from dsv32_plugin.parsers.regex import matches


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^(a|a)*$", "a" * 40 + "b"),
        ("^(a?){26}a{26}$", "a" * 26),
        ("^" + "a?" * 26 + "a" * 26 + "$", "a" * 26),
        ("(a+)+$", "a" * 60 + "b"),
        ("^(a|ab|b)*$", "ab" * 40 + "c"),
        ("^((a{1,2}){1,2}){1,30}$", "a" * 60 + "b"),
        ("(.*a){12}", "a" * 40 + "b"),
        ("^(?:(a*)*)*$", "a" * 40 + "b"),
    ],
)
def test_no_expression_takes_for_ever(pattern: str, text: str) -> None:
    started = time.perf_counter()
    assert not matches(pattern, text)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^[a-z_]+$", "snake_case_name"),
        ("^x-", "x-header"),
        (r"^\d{4}-\d{2}-\d{2}$", "2026-12-01"),
        ("^(get|set)_[a-z]+$", "get_weather"),
        ("^[a-zA-Z_][a-zA-Z0-9_]*$", "a_name_of_thirty_two_characters_"),
        (r"^S_[0-9]{1,3}(_[a-z]{2})?$", "S_12_de"),
    ],
)
def test_ordinary_expressions_are_matched(pattern: str, text: str) -> None:
    assert matches(pattern, text)
