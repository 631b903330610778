"""LiteLLM's SDK: its providers for OpenAI's, DeepSeek's and Anthropic's APIs and for vLLM, and Responses."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
import pytest
from asks import ADD, CUT, CUT_AT, FUNCTIONS, PARALLEL, SAID, SAY, SUM, SUMS, THOUGHTS

TOOLS: Any = [{"type": "function", "function": function} for function in FUNCTIONS]
PROVIDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("/v1", {"extra_body": {"chat_template_kwargs": {"thinking": True}}}),
    "hosted_vllm": ("/v1", {"extra_body": {"chat_template_kwargs": {"thinking": True}}}),
    "deepseek": ("/v1", {"thinking": {"type": "enabled"}}),
    "anthropic": (
        "",
        {"thinking": {"type": "enabled", "budget_tokens": 1024}, "allowed_openai_params": ["thinking"]},
    ),
}


@pytest.fixture(params=PROVIDERS)
def ask(request, proxy):
    base, thinking = PROVIDERS[request.param]

    def ask(stream: bool, **body: Any):
        """An answer's only choice."""
        body = {"max_tokens": 2000, **(thinking if body.pop("thinking", True) else {}), **body}
        answer = litellm.completion(
            model=f"{request.param}/tiny",
            api_base=f"{proxy.url}{base}",
            api_key="none",
            timeout=120,
            num_retries=0,
            stream=stream,
            **body,
        )
        return (litellm.stream_chunk_builder(list(answer)) if stream else answer).choices[0]

    return ask


@pytest.mark.recorded
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("text", "sums"), [(ADD, SUMS[:1]), (PARALLEL, SUMS)], ids=["one", "parallel"])
def test_loop(ask, tools, stream, text, sums) -> None:
    messages: list[Any] = [{"role": "user", "content": text}]
    choice = ask(stream, messages=messages, tools=TOOLS)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == THOUGHTS
    messages.append(choice.message.model_dump(exclude_none=True))
    for call in choice.message.tool_calls:
        result = getattr(tools, call.function.name)(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert tools.added == sums
    choice = ask(stream, messages=messages, tools=TOOLS)
    assert choice.message.content.startswith("The tool said: The sum is")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_cut_call_is_named(ask, stream) -> None:
    choice = ask(stream, messages=[{"role": "user", "content": CUT}], tools=TOOLS, max_tokens=CUT_AT, thinking=False)
    assert choice.finish_reason == "length"


def test_refusal_and_on(ask, proxy) -> None:
    messages = [{"role": "user", "content": SAY}]
    proxy.change = lambda path, body: body.update(top_p=-1)
    with pytest.raises(litellm.BadRequestError):
        ask(False, messages=messages)
    assert proxy.statuses() == [400]
    proxy.change = lambda path, body: None
    assert ask(True, messages=messages).message.content == SAID


@pytest.mark.recorded
def test_responses_loop(proxy, tools) -> None:
    body: Any = {
        "model": "openai/tiny",
        "api_base": f"{proxy.url}/v1",
        "api_key": "none",
        "tools": [{"type": "function", **function} for function in FUNCTIONS],
    }
    items: list[Any] = [{"role": "user", "content": ADD}]
    answer = litellm.responses(input=items, **body)
    (call,) = (item for item in answer.output if item.type == "function_call")
    items.append({key: getattr(call, key) for key in ("type", "call_id", "name", "arguments")})
    output = getattr(tools, call.name)(**json.loads(call.arguments))
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    answer = litellm.responses(input=items, **body)
    assert answer.output[-1].content[0].text == SUM
