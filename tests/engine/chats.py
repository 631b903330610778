"""What the chat tests say, ask for and read out of an answer, with either engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest


@dataclass(frozen=True)
class ChatEngine:
    """What differs between the engines for a client that chats."""

    options: tuple[str, ...]
    """Beside those of `engines`, for contexts of 4096 tokens."""
    grammar: Callable[[str], dict[str, Any]]
    """The part of a request that makes the model keep to a grammar."""
    grammar_takes_reasoning: bool
    """Otherwise it begins after the reasoning."""
    reasoning: str
    """The reasoning's name in a message, and in a piece of one."""
    bad_prompts: dict[str, dict[str, Any]]
    """Requests without a chat that are refused."""
    own_refusals: dict[str, str]
    """What the engine says where it looks itself, and first, instead of a reason of ours."""
    raw: str
    """The path that these go to."""


TOO_LONG = [5] * 4097
NO_SCHEMA = "tool f: properties: expected an object, got int"
CHAT_ENGINES = {
    "vllm": ChatEngine(
        options=(
            *("--max-model-len", "4096"),
            "--enable-auto-tool-choice",
            *("--structured-outputs-config.enable_in_reasoning", "true"),
        ),
        grammar=lambda grammar: {"structured_outputs": {"grammar": grammar}},
        grammar_takes_reasoning=True,
        reasoning="reasoning",
        bad_prompts={
            "no-prompt": {"prompt": []},
            "empty-prompt": {"prompt": ""},
            "unknown-token": {"prompt": [999_999_999]},
            "negative-token": {"prompt": [5, -1]},
            "longer-than-the-context": {"prompt": TOO_LONG},
        },
        own_refusals={},
        raw="/v1/completions",
    ),
    "sglang": ChatEngine(
        options=("--context-length", "4096", "--served-model-name", "tiny"),
        grammar=lambda grammar: {"ebnf": grammar},
        grammar_takes_reasoning=False,
        reasoning="reasoning_content",
        bad_prompts={
            "no-prompt": {"input_ids": []},
            "unknown-token": {"input_ids": [5, 999_999_999]},
            "negative-token": {"input_ids": [5, -1]},
            "one-of-two": {"input_ids": [[5, 6], [5, 129280]]},
            "one-of-two-empty": {"input_ids": [[5, 6], []]},
            "unknown-stop": {"input_ids": [5], "sampling_params": {"stop_token_ids": [129280], "min_new_tokens": 2}},
            "more-logprobs-than-tokens": {"input_ids": [5], "return_logprob": True, "top_logprobs_num": 129281},
            "no-list-of-stops": {"input_ids": [5], "sampling_params": {"stop_token_ids": 5}},
            "half-a-stop": {"input_ids": [5], "sampling_params": {"stop_token_ids": [5.5], "min_new_tokens": 2}},
            "embeds-in-json": {"input_ids": [5], "positional_embed_overrides": []},
            "longer-than-the-context": {"input_ids": TOO_LONG},
        },
        own_refusals={
            NO_SCHEMA: "Tool 0 function has invalid 'parameters' schema",
            # Since 0.5.23.
            "messages[0]": "unsupported content type 'image_url'",
        },
        raw="/generate",
    ),
}

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
# Of what a random model writes nothing else bounds the length.
BOUNDED_WEATHER = copy.deepcopy(WEATHER)
BOUNDED_WEATHER["function"]["parameters"]["properties"] = {
    "city": {"type": "string", "enum": ["Hangzhou", "Paris"]},
    "days": {"type": "integer", "minimum": 0, "maximum": 14},
}
USER = [{"role": "user", "content": "Weather in Hangzhou?"}]
BAD_CHATS = [
    pytest.param(
        {"messages": [*USER, {"role": "tool", "tool_call_id": "x", "content": "1"}]}, "messages[1]", id="result"
    ),
    pytest.param(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "messages[0]",
        id="image",
    ),
    pytest.param(
        {
            "messages": USER,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 5}}}],
            "tool_choice": "required",
        },
        NO_SCHEMA,
        id="schema",
    ),
]
"""What is asked, and what our refusal says."""
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


@dataclass
class Heard:
    """What an answer says, however it came."""

    reasoning: str = ""
    content: str = ""
    names: list[str] = field(default_factory=list)
    pieces: list[list[str]] = field(default_factory=list)
    """Of each call, its arguments as they came."""
    finish: str | None = None

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The arguments of each call."""
        return [json.loads("".join(pieces)) for pieces in self.pieces]

    def add(self, message: Any, reasoning: str) -> None:
        """A message, or a piece of one whose calls have an index."""
        self.reasoning += getattr(message, reasoning, None) or ""
        self.content += message.content or ""
        for number, call in enumerate(message.tool_calls or []):
            index = getattr(call, "index", number)
            if index == len(self.pieces):
                self.names.append(call.function.name)
                self.pieces.append([])
            if call.function.arguments:
                self.pieces[index].append(call.function.arguments)


def hear(answer: Any, engine: ChatEngine, stream: bool) -> Heard:
    """Of an answer's only choice."""
    heard = Heard()
    chunks: Iterable[Any] = answer if stream else [answer]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        heard.add(choice.delta if stream else choice.message, engine.reasoning)
        heard.finish = choice.finish_reason or heard.finish
    return heard


def tokens_of(url: str, **body: Any) -> list[int]:
    """The prompt that the server makes."""
    response = httpx.post(f"{url}/tokenize", json={"model": "tiny", **body}, timeout=60)
    assert response.status_code == httpx.codes.OK, response.text
    return response.json()["tokens"]


def refused(url: str, chat: dict[str, Any]) -> str:
    """Why it is refused."""
    response = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", **chat}, timeout=60)
    assert response.status_code == httpx.codes.BAD_REQUEST
    body = response.json()
    return body.get("error", body)["message"]
