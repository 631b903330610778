"""What the chat tests of both engines say and ask for."""

from __future__ import annotations

import copy
import json
from typing import Any

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
# Of a random model's city nothing bounds the length.
BOUNDED_WEATHER = copy.deepcopy(WEATHER)
BOUNDED_WEATHER["function"]["parameters"]["properties"]["city"]["enum"] = ["Hangzhou", "Paris"]
USER = [{"role": "user", "content": "Weather in Hangzhou?"}]
CITY = "Hangzhou, by the lake with the three pools that mirror the moon"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Hangzhou and Paris?"},
    {
        "role": "assistant",
        "reasoning": "Both.",
        "reasoning_content": "Both.",
        "content": None,
        "tool_calls": [
            {
                "id": f"call-{city}",
                "type": "function",
                "function": {"name": "get_weather", "arguments": json.dumps({"city": city, "days": 1})},
            }
            for city in ("Hangzhou", "Paris")
        ],
    },
    # In the other order: results belong to calls by their ids.
    {"role": "tool", "tool_call_id": "call-Paris", "content": "rain"},
    {"role": "tool", "tool_call_id": "call-Hangzhou", "content": [{"type": "text", "text": "sun"}]},
]


def exactly(text: str) -> str:
    """The grammar that makes the model write this text."""
    return f"root ::= {json.dumps(text, ensure_ascii=False)}"


def dsml(*calls: tuple[str, int]) -> str:
    """An answer's calls of `get_weather`, as the model writes them."""
    invokes = "".join(
        f'<｜DSML｜invoke name="get_weather">\n'
        f'<｜DSML｜parameter name="city" string="true">{city}</｜DSML｜parameter>\n'
        f'<｜DSML｜parameter name="days" string="false">{days}</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n"
        for city, days in calls
    )
    return f"\n\n<｜DSML｜function_calls>\n{invokes}</｜DSML｜function_calls>"


def arguments(call: Any) -> dict[str, Any]:
    return json.loads(call.function.arguments)
