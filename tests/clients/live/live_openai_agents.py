"""openai-agents over both of its APIs, with tools of its own and those of an MCP server."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

import agents
import openai
import pytest
from agents import Agent, ModelSettings, Runner, function_tool
from agents.mcp import MCPServerStdio
from asks import ADD, CUT, CUT_AT, SAID, SAY, SUM
from openai.types.shared import Reasoning
from pydantic import BaseModel

agents.set_tracing_disabled(True)


class Verdict(BaseModel):
    verdict: str
    score: int


@pytest.fixture(params=["chat", "responses"])
def model(request, proxy):
    client = openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", timeout=120, max_retries=0)
    kind = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}[request.param]
    return kind("tiny", client)


THINKING = ModelSettings(max_tokens=400, reasoning=Reasoning(effort="high"))


async def stream(agent: Agent, ask) -> tuple[str, object]:
    result = Runner.run_streamed(agent, ask)
    async for _ in result.stream_events():
        pass
    return result.final_output, result


def function_tools(tools):
    return [function_tool(tools.add), function_tool(tools.note)]


@pytest.mark.recorded
def test_streamed_loop(model, tools) -> None:
    agent = Agent("helper", instructions="Be brief.", model=model, tools=function_tools(tools), model_settings=THINKING)
    answer, result = asyncio.run(stream(agent, ADD))
    assert tools.added == [(2, 3)]
    assert answer == SUM
    assert any(item.type == "reasoning_item" for item in result.new_items)


@pytest.mark.recorded
def test_mcp_loop(model, tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    async def run() -> str:
        params = {"command": sys.executable, "args": [str(Path(__file__).parent / "mcp_server.py"), str(calls)]}
        async with MCPServerStdio(params=params, client_session_timeout_seconds=30) as server:
            return (await stream(Agent("helper", model=model, mcp_servers=[server], model_settings=THINKING), ADD))[0]

    assert asyncio.run(run()) == SUM
    assert calls.read_text() == "add 2 3\n"


@pytest.mark.recorded
def test_output_type_with_tools(model, tools) -> None:
    ask = ADD + '[[say {"verdict": "good", "score": 5}]]'
    agent = Agent("judge", model=model, tools=function_tools(tools), output_type=Verdict, model_settings=THINKING)
    answer, _ = asyncio.run(stream(agent, ask))
    assert tools.added == [(2, 3)]
    assert answer == Verdict(verdict="good", score=5)


@pytest.mark.recorded
def test_handoff(model, tools) -> None:
    adder = Agent("adder", model=model, tools=function_tools(tools), model_settings=THINKING)
    agent = Agent("router", model=model, handoffs=[adder], model_settings=THINKING)
    ask = '[[call transfer_to_adder {}]] [[then]] [[call add {"a": 2, "b": 3}]]'
    answer, _ = asyncio.run(stream(agent, ask))
    assert tools.added == [(2, 3)]
    assert answer == SUM


def test_cut_call_is_not_run(model, tools) -> None:
    agent = Agent("helper", model=model, tools=function_tools(tools), model_settings=ModelSettings(max_tokens=CUT_AT))
    with suppress(agents.AgentsException):
        asyncio.run(asyncio.wait_for(stream(agent, CUT), 100))
    assert tools.noted == []


def test_refusal_and_on(model, proxy, tools) -> None:
    agent = Agent("helper", model=model, tools=function_tools(tools))
    history = Runner.run_sync(agent, SAY).to_input_list()
    wrong = agent.clone(model_settings=ModelSettings(temperature=-1.0))
    with pytest.raises(openai.BadRequestError):
        Runner.run_sync(wrong, [*history, {"role": "user", "content": ADD}])
    assert proxy.statuses()[-1] == 400
    assert Runner.run_sync(agent, [*history, {"role": "user", "content": SAY}]).final_output == SAID
