"""What the clients are asked, in the scripted model's marks, and what must come of it."""

from __future__ import annotations

import json
from typing import Any

THOUGHTS = "The user wants this done."
ADD = 'Add two and three. [[call add {"a": 2, "b": 3}]]'
SUM = "The tool said: The sum is 5."
"""The answer to `ADD`: it repeats the tool's result."""
PARALLEL = 'Add twice. [[call add {"a": 2, "b": 3}]] [[call add {"a": 4, "b": 5}]]'
SUMS = [(2, 3), (4, 5)]
SAY = "[[say All is well.]]"
SAID = "All is well."
LONG = "word " * 200
CUT = f"Keep this. [[call note {json.dumps({'text': LONG})}]]"
"""With `CUT_AT` tokens the answer ends inside the argument."""
CUT_AT = 60

ADD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NOTE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
FUNCTIONS = [
    {"name": "add", "description": "The sum of two integers.", "parameters": ADD_SCHEMA},
    {"name": "note", "description": "Keep a text.", "parameters": NOTE_SCHEMA},
]
