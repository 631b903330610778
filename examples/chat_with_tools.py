"""Let a served model call a tool: ask, run what it calls, return the results, print its answer.

    vllm serve deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8 \
        --enable-auto-tool-choice --tool-call-parser dsv32 --reasoning-parser dsv32
    python examples/chat_with_tools.py "What is the weather in Hangzhou in 3 days?"

Without a GPU, serve the small trained model, assets/tiny-dsv32, with `--dtype float32`. Needs `pip install openai`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI

GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}


def get_weather(city: str, days: int) -> dict[str, Any]:
    """A real one would ask a weather service."""
    return {"sky": "rain", "celsius": 17}


def answer(client: OpenAI, question: str, temperature: float) -> str:
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": question}]
    while True:
        completion = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[GET_WEATHER],
            temperature=temperature,
            top_p=0.95,
            extra_body={"chat_template_kwargs": {"thinking": True}},
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        # Whole, with its reasoning: until the next question the model reads what it thought before the call.
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) -> {json.dumps(result)}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is the weather in Hangzhou in 3 days?")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1, as DeepSeek recommends")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none")
    print(answer(client, arguments.question, arguments.temperature))


if __name__ == "__main__":
    main()
