"""A client's request without its prompt text: what it says becomes a length, which a replay fills with other words.

Kept are keys, types, roles, names, ids, the shape of schemas, and the scripted model's marks. "⟨17⟩[[then]]" stands
for a text that begins with 17 characters which were left out.
"""

from __future__ import annotations

import json
import re
from typing import Any

WORDS = "so the lake lies under the hills and boats go over it while rain comes down from the north. "
_KEPT_KEYS = {"type", "role", "name", "id", "call_id", "tool_call_id", "tool_use_id", "model", "$ref", "$schema"}
_KEPT_LISTS = {"enum", "required", "include", "type"}
_SCHEMA_WORDS = {"pattern", "format", "default", "const"}
_PROSE = {"content", "text", "description", "title", "output", "input", "instructions", "thinking", "system"}
_MARKS = re.compile(r"\[\[(?:then|say .*?|call .*?\})\]\]", re.DOTALL)
_WORD = re.compile(r"\S{1,24}")
_LENGTH = re.compile(r"⟨(\d+)⟩")


def blank(value: Any, key: str = "") -> Any:
    """The request, or a part of it under `key`, with lengths for texts."""
    if isinstance(value, dict):
        return {name: blank(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return value if key in _KEPT_LISTS else [blank(part, key) for part in value]
    if not isinstance(value, str) or not value or key in _KEPT_KEYS | _SCHEMA_WORDS:
        return value
    if key == "arguments":
        return json.dumps(blank(json.loads(value), "text"), ensure_ascii=False)
    if key not in _PROSE and _WORD.fullmatch(value):
        return value
    blanked, end = "", 0
    for mark in _MARKS.finditer(value):
        blanked += _length(value[end : mark.start()]) + mark[0]
        end = mark.end()
    return blanked + _length(value[end:])


def fill(value: Any, longest: int | None = None) -> Any:
    """The opposite of `blank`, with words for lengths.

    Args:
        longest: of more characters a text has no more than so many.
    """
    if isinstance(value, dict):
        return {name: fill(part, longest) for name, part in value.items()}
    if isinstance(value, list):
        return [fill(part, longest) for part in value]
    if not isinstance(value, str):
        return value
    return _LENGTH.sub(lambda length: words(min(int(length[1]), longest or int(length[1]))), value)


def words(length: int) -> str:
    """A text of so many characters."""
    return (WORDS * (length // len(WORDS) + 1))[:length]


def _length(text: str) -> str:
    return f"⟨{len(text)}⟩" if text else ""
