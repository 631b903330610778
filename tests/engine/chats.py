"""What the chat tests of both engines say, ask for and read out of an answer."""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx
import pytest

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
BAD_MESSAGES = [
    pytest.param([*USER, {"role": "tool", "tool_call_id": "x", "content": "1"}], "messages[1]", id="result"),
    pytest.param(
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        "messages[0]",
        id="image",
    ),
]
"""Messages, and the one that a refusal names."""
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


def content_of(answer: Any, stream: bool) -> str:
    """The content of an answer that calls nothing."""
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    assert not answer.choices[0].message.tool_calls
    return answer.choices[0].message.content


def first_call(stream: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the first call of a stream."""
    deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    name = next(delta.function.name for delta in deltas if delta.function.name)
    return name, json.loads("".join(delta.function.arguments or "" for delta in deltas if delta.index == 0))


def assert_bounded_call(name: str, made: dict[str, Any]) -> None:
    """A call of BOUNDED_WEATHER that keeps to its schema."""
    assert name == "get_weather"
    assert made["city"] in ("Hangzhou", "Paris")
    assert isinstance(made["days"], int)


def tokens_of(url: str, **body: Any) -> list[int]:
    """The prompt that the server makes."""
    response = httpx.post(f"{url}/tokenize", json={"model": "tiny", **body}, timeout=60)
    assert response.status_code == httpx.codes.OK, response.text
    return response.json()["tokens"]


def refused(url: str, messages: list[Any]) -> dict[str, Any]:
    """The body of the refusal of a chat."""
    response = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": messages}, timeout=60)
    assert response.status_code == httpx.codes.BAD_REQUEST
    return response.json()
