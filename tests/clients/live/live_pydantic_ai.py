"""pydantic-ai over four of its routes."""

from __future__ import annotations

import asyncio

import openai
import pytest
from asks import ADD, CUT, CUT_AT, SAID, SAY, SUM, SUMS, THOUGHTS
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput, UnexpectedModelBehavior
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelResponse, ThinkingPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.deepseek import DeepSeekProvider
from pydantic_ai.providers.openai import OpenAIProvider

CHAT_THINKING = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}


class Verdict(BaseModel):
    verdict: str
    score: int


def _openai(url: str) -> OpenAIProvider:
    return OpenAIProvider(base_url=f"{url}/v1", api_key="none")


ROUTES = {
    "chat": lambda url: (OpenAIChatModel("tiny", provider=_openai(url)), CHAT_THINKING),
    "responses": lambda url: (OpenAIResponsesModel("tiny", provider=_openai(url)), {"openai_reasoning_effort": "high"}),
    "deepseek": lambda url: (
        OpenAIChatModel(
            "tiny",
            provider=DeepSeekProvider(openai_client=openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")),
        ),
        {"extra_body": {"thinking": {"type": "enabled"}}},
    ),
    "anthropic": lambda url: (
        AnthropicModel("tiny", provider=AnthropicProvider(base_url=url, api_key="none")),
        {"anthropic_thinking": {"type": "enabled", "budget_tokens": 1024}},
    ),
}


@pytest.fixture(params=ROUTES)
def route(request):
    return request.param


def agent_of(route, proxy, tools, **options):
    model, thinking = ROUTES[route](proxy.url)
    settings = {"max_tokens": 2000, "timeout": 120, **thinking, **options.pop("settings", {})}
    return Agent(model, tools=[tools.add, tools.note], model_settings=settings, retries=0, **options)


async def _streamed(agent: Agent, ask: str):
    """A run whose every answer is streamed."""
    async with agent.iter(ask) as run:
        async for node in run:
            if Agent.is_model_request_node(node):
                async with node.stream(run.ctx) as events:
                    async for _ in events:
                        pass
        return run.result


def streamed(agent: Agent, ask: str):
    return asyncio.run(_streamed(agent, ask))


def thoughts_of(part: ThinkingPart) -> str:
    """Those of Responses are no summary, and lie apart."""
    return part.content or "".join((part.provider_details or {}).get("raw_content", []))


@pytest.mark.recorded
def test_streamed_loop(route, proxy, tools) -> None:
    result = streamed(agent_of(route, proxy, tools, instructions="Be brief."), ADD)
    assert tools.added == [(2, 3)]
    assert result.output == SUM
    first = next(message for message in result.all_messages() if isinstance(message, ModelResponse))
    assert [thoughts_of(part) for part in first.parts if isinstance(part, ThinkingPart)] == [THOUGHTS]


def test_parallel_calls(route, proxy, tools) -> None:
    ask = 'Twice. [[call add {"a": 2, "b": 3}]] [[call add {"a": 4, "b": 5}]]'
    streamed(agent_of(route, proxy, tools), ask)
    assert sorted(tools.added) == SUMS


@pytest.mark.recorded
@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput, PromptedOutput], ids=["tool", "native", "prompted"])
def test_output_type_with_tools(route, proxy, tools, kind) -> None:
    if route in ("anthropic", "deepseek") and kind is NativeOutput:
        pytest.skip("pydantic-ai asks no schema of this provider's models")
    end = '[[say {"verdict": "good", "score": 5}]]'
    if kind is ToolOutput:
        end = '[[then]] [[call final_result {"verdict": "good", "score": 5}]]'
    settings = {"extra_body": {}} if route != "anthropic" else {"anthropic_thinking": {"type": "disabled"}}
    result = streamed(agent_of(route, proxy, tools, output_type=kind(Verdict), settings=settings), ADD + end)
    assert tools.added == [(2, 3)]
    assert result.output == Verdict(verdict="good", score=5)


def test_cut_call_is_not_run(route, proxy, tools) -> None:
    limit = {"anthropic": "max_tokens", "responses": "max_output_tokens"}.get(route, "max_completion_tokens")
    proxy.change = lambda path, body: body.update({limit: CUT_AT})
    with pytest.raises(UnexpectedModelBehavior):
        streamed(agent_of(route, proxy, tools), CUT)
    assert tools.noted == []


def test_refusal_and_on(route, proxy, tools) -> None:
    agent = agent_of(route, proxy, tools)
    proxy.change = lambda path, body: body.update(top_p=-1)
    with pytest.raises(ModelHTTPError) as refusal:
        agent.run_sync(SAY)
    assert refusal.value.status_code == 400
    assert proxy.statuses() == [400]
    proxy.change = lambda path, body: None
    assert agent.run_sync(SAY).output == SAID
