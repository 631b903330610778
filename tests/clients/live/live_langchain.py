"""LangChain's agents over four of its chat models, and structured output."""

from __future__ import annotations

import pytest
from asks import ADD, CUT, CUT_AT, SAID, SAY, SUM, SUMS, THOUGHTS
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_anthropic import ChatAnthropic
from langchain_deepseek import ChatDeepSeek
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

THINKING = {"chat_template_kwargs": {"thinking": True}}


class Verdict(BaseModel):
    """What is found."""

    verdict: str
    score: int


MODELS = {
    "openai-chat": lambda url, **options: ChatOpenAI(
        model="tiny", base_url=f"{url}/v1", api_key="none", extra_body=THINKING, **options
    ),
    "openai-responses": lambda url, **options: ChatOpenAI(
        model="tiny", base_url=f"{url}/v1", api_key="none", use_responses_api=True, reasoning_effort="high", **options
    ),
    "deepseek": lambda url, **options: ChatDeepSeek(
        model="tiny", api_base=f"{url}/v1", api_key="none", extra_body={"thinking": {"type": "enabled"}}, **options
    ),
    "anthropic": lambda url, **options: ChatAnthropic(
        model="tiny", base_url=url, api_key="none", **options, thinking={"type": "enabled", "budget_tokens": 1024}
    ),
}


@pytest.fixture(params=MODELS)
def route(request):
    return request.param


@pytest.fixture
def model(route, proxy):
    return MODELS[route](proxy.url, timeout=120, max_tokens=2000)


def streamed(agent, ask: str) -> list:
    """The messages of a run whose tokens are streamed."""
    state = None
    for mode, piece in agent.stream({"messages": [("user", ask)]}, stream_mode=["messages", "values"]):
        if mode == "values":
            state = piece
    return state["messages"]


def thoughts_of(message) -> str:
    """Where each route keeps them; LangChain's model of OpenAI's APIs drops all but summaries."""
    told = "".join(block.get("reasoning", "") for block in message.content_blocks if block["type"] == "reasoning")
    return told or message.additional_kwargs.get("reasoning_content", "")


@pytest.mark.recorded
def test_streamed_loop(route, model, tools) -> None:
    messages = streamed(create_agent(model, [tools.add, tools.note], system_prompt="Be brief."), ADD)
    assert tools.added == [(2, 3)]
    assert messages[-1].text == SUM
    if route in ("deepseek", "anthropic"):
        assert thoughts_of(messages[1]) == THOUGHTS


def test_parallel_calls(model, tools) -> None:
    ask = 'Twice. [[call add {"a": 2, "b": 3}]] [[call add {"a": 4, "b": 5}]]'
    streamed(create_agent(model, [tools.add]), ask)
    assert sorted(tools.added) == SUMS


@pytest.mark.recorded
@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy], ids=["provider", "tool"])
def test_structured_answer_with_tools(route, model, tools, strategy) -> None:
    if route == "anthropic" and strategy is ProviderStrategy:
        pytest.skip("LangChain asks Anthropic's models alone for a schema")
    end = '[[say {"verdict": "good", "score": 5}]]'
    if strategy is ToolStrategy:
        end = '[[then]] [[call Verdict {"verdict": "good", "score": 5}]]'
    agent = create_agent(model, [tools.add], response_format=strategy(Verdict))
    state = agent.invoke({"messages": [("user", ADD + end)]})
    assert tools.added == [(2, 3)]
    assert state["structured_response"] == Verdict(verdict="good", score=5)


def test_cut_call_is_not_run(route, proxy, tools) -> None:
    limit = 1100 if route == "anthropic" else CUT_AT
    if route == "anthropic":
        proxy.change = lambda path, body: body.update(max_tokens=CUT_AT)
    agent = create_agent(MODELS[route](proxy.url, timeout=120, max_tokens=limit), [tools.note])
    agent.invoke({"messages": [("user", CUT)]})
    assert tools.noted == []


def test_refusal_and_on(model, proxy) -> None:
    agent = create_agent(model, [])
    proxy.change = lambda path, body: body.update(top_p=-1)
    with pytest.raises(Exception, match="400"):
        agent.invoke({"messages": [("user", SAY)]})
    assert proxy.statuses() == [400]
    proxy.change = lambda path, body: None
    assert streamed(agent, SAY)[-1].text == SAID
