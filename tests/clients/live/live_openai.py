"""The OpenAI SDK: chat completions and responses."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from asks import ADD, CUT, CUT_AT, FUNCTIONS, PARALLEL, SAID, SAY, SUM, SUMS, THOUGHTS
from pydantic import BaseModel

CHAT_TOOLS: Any = [{"type": "function", "function": function} for function in FUNCTIONS]
RESPONSES_TOOLS: Any = [{"type": "function", **function} for function in FUNCTIONS]
THINKING = {"chat_template_kwargs": {"thinking": True}}


class Step(BaseModel):
    explanation: str
    result: int


class Solution(BaseModel):
    steps: list[Step]
    answer: str


SOLVE = '[[say {"steps": [{"explanation": "so", "result": 3}], "answer": "x"}]]'
SOLUTION = Solution(steps=[Step(explanation="so", result=3)], answer="x")


@pytest.fixture
def client(proxy):
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", timeout=120)


def run(tools, name: str, arguments: str) -> str:
    return getattr(tools, name)(**json.loads(arguments))


def chat_message(client, stream: bool, **body: Any):
    """One answer's choice, whole or through the SDK's stream helper, and its reasoning as it came."""
    body = {"model": "tiny", "max_tokens": 400, "extra_body": THINKING, **body}
    if not stream:
        choice = client.chat.completions.create(**body).choices[0]
        return choice, reasoning_of(choice.message)
    reasoning = ""
    with client.chat.completions.stream(**body) as events:
        for event in events:
            if event.type == "chunk" and event.chunk.choices:
                reasoning += reasoning_of(event.chunk.choices[0].delta)
        return events.get_final_completion().choices[0], reasoning


def reasoning_of(message: Any) -> str:
    return getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""


@pytest.mark.recorded
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("ask", "sums"), [(ADD, SUMS[:1]), (PARALLEL, SUMS)], ids=["one", "parallel"])
def test_chat_loop(client, tools, stream, ask, sums) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ask}]
    choice, reasoning = chat_message(client, stream, messages=messages, tools=CHAT_TOOLS)
    assert choice.finish_reason == "tool_calls"
    assert reasoning == THOUGHTS
    messages.append(choice.message)
    for call in choice.message.tool_calls:
        result = run(tools, call.function.name, call.function.arguments)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert tools.added == sums
    choice, reasoning = chat_message(client, stream, messages=messages, tools=CHAT_TOOLS)
    assert reasoning == THOUGHTS
    assert choice.message.content.startswith("The tool said: The sum is")
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat_cut_call_is_no_call(client, stream) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": CUT}], "tools": CHAT_TOOLS, "max_tokens": CUT_AT}
    if not stream:
        choice = client.chat.completions.create(**body).choices[0]
        assert choice.finish_reason == "length"
        for call in choice.message.tool_calls or []:
            with pytest.raises(json.JSONDecodeError):
                json.loads(call.function.arguments)
        return
    finishes, arguments = [], ""
    for chunk in client.chat.completions.create(stream=True, **body):
        for choice in chunk.choices:
            finishes.append(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                arguments += call.function.arguments or ""
    assert finishes[-1] == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


def test_chat_stream_helper_names_a_cut(client) -> None:
    """Where every tool is strict; else it says nothing of the reason."""
    strict = [{"type": "function", "function": {**function, "strict": True}} for function in FUNCTIONS]
    body = {"model": "tiny", "messages": [{"role": "user", "content": CUT}], "tools": strict, "max_tokens": CUT_AT}
    with pytest.raises(openai.LengthFinishReasonError), client.chat.completions.stream(**body) as events:
        for _ in events:
            pass


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat_parse(client, stream) -> None:
    messages: Any = [{"role": "user", "content": SOLVE}]
    body: Any = {"model": "tiny", "messages": messages, "response_format": Solution, "max_tokens": 400}
    if stream:
        with client.chat.completions.stream(**body) as events:
            parsed = events.get_final_completion().choices[0].message.parsed
    else:
        parsed = client.chat.completions.parse(**body).choices[0].message.parsed
    assert parsed == SOLUTION


def test_chat_parse_with_strict_tools_calls_or_answers(client, tools) -> None:
    strict = [openai.pydantic_function_tool(Step, name="step")]
    ask = '[[call step {"explanation": "so", "result": 3}]] [[then]] [[say {"steps": [], "answer": "x"}]]'
    messages: list[Any] = [{"role": "user", "content": ask}]
    body: Any = {"model": "tiny", "response_format": Solution, "tools": strict, "max_tokens": 400}
    message = client.chat.completions.parse(messages=messages, **body).choices[0].message
    (call,) = message.tool_calls
    assert call.function.parsed_arguments == Step(explanation="so", result=3)
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "ok"}]
    message = client.chat.completions.parse(messages=messages, **body).choices[0].message
    assert message.parsed == Solution(steps=[], answer="x")


def test_chat_refusal_and_on(client, proxy) -> None:
    messages: list[Any] = [{"role": "user", "content": SAY}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=messages, temperature=-1)
    assert proxy.statuses() == [400]
    assert client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content == SAID


def response_of(client, stream: bool, **body: Any):
    body = {"model": "tiny", "max_output_tokens": 400, "reasoning": {"effort": "high"}, **body}
    if not stream:
        return client.responses.create(**body)
    with client.responses.stream(**body) as events:
        for _ in events:
            pass
        return events.get_final_response()


def run_calls(tools, response) -> list[Any]:
    return [
        {"type": "function_call_output", "call_id": item.call_id, "output": run(tools, item.name, item.arguments)}
        for item in response.output
        if item.type == "function_call"
    ]


def reasoning_in(response) -> str:
    return "".join(part.text for item in response.output if item.type == "reasoning" for part in item.content or [])


@pytest.mark.recorded
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("ask", "sums"), [(ADD, SUMS[:1]), (PARALLEL, SUMS)], ids=["one", "parallel"])
def test_responses_loop(client, tools, stream, ask, sums) -> None:
    items: list[Any] = [{"role": "user", "content": ask}]
    response = response_of(client, stream, input=items, tools=RESPONSES_TOOLS)
    assert reasoning_in(response) == THOUGHTS
    items += [item.model_dump(exclude_none=True) for item in response.output] + run_calls(tools, response)
    assert tools.added == sums
    response = response_of(client, stream, input=items, tools=RESPONSES_TOOLS)
    assert response.output_text.startswith("The tool said: The sum is")
    assert response.status == "completed"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_responses_loop_by_previous_response(client, tools, stream) -> None:
    response = response_of(client, stream, input=ADD, tools=RESPONSES_TOOLS, store=True)
    outputs = run_calls(tools, response)
    assert tools.added == [(2, 3)]
    response = response_of(
        client, stream, input=outputs, previous_response_id=response.id, tools=RESPONSES_TOOLS, store=True
    )
    assert response.output_text == SUM


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_responses_cut_call_is_no_call(client, stream) -> None:
    body: Any = {"model": "tiny", "input": CUT, "tools": RESPONSES_TOOLS, "max_output_tokens": CUT_AT}
    if stream:
        for event in client.responses.create(stream=True, **body):
            if event.type in ("response.completed", "response.incomplete"):
                response = event.response
    else:
        response = client.responses.create(**body)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    for item in response.output:
        if item.type == "function_call":
            assert item.status != "completed"
            with pytest.raises(json.JSONDecodeError):
                json.loads(item.arguments)


def test_responses_parse(client) -> None:
    response = client.responses.parse(model="tiny", input=SOLVE, text_format=Solution, max_output_tokens=400)
    assert response.output_parsed == SOLUTION


def test_responses_hosted_tool_beside_a_function(client, tools) -> None:
    hosted: Any = [{"type": "web_search"}, *RESPONSES_TOOLS]
    response = response_of(client, False, input=ADD, tools=hosted)
    run_calls(tools, response)
    assert tools.added == [(2, 3)]


@pytest.mark.recorded
def test_responses_custom_tool(client) -> None:
    custom: Any = [{"type": "custom", "name": "shell", "description": "Run this."}]
    items: list[Any] = [{"role": "user", "content": '[[call shell {"input": "echo 1 > /dev/null"}]]'}]
    response = response_of(client, True, input=items, tools=custom)
    (call,) = (item for item in response.output if item.type == "custom_tool_call")
    assert (call.name, call.input) == ("shell", "echo 1 > /dev/null")
    items += [item.model_dump(exclude_none=True) for item in response.output]
    items.append({"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"})
    response = response_of(client, True, input=items, tools=custom)
    assert response.output_text == "The tool said: done"


def test_responses_refusal_and_on(client, proxy) -> None:
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="tiny", input=SAY, temperature=-1)
    assert proxy.statuses() == [400]
    assert client.responses.create(model="tiny", input=SAY).output_text == SAID
