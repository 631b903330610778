"""The command-line agents, as their users run them."""

from __future__ import annotations

from pathlib import Path

import pytest
from agents_cli import AGENTS, Agent
from asks import CUT_AT, LONG, SAID, SAY
from proxy import Proxy

SECRET = "swordfish"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=AGENTS)
def agent(request, proxy: Proxy, tmp_path: Path) -> Agent:
    return AGENTS[request.param](proxy.url, tmp_path)


def refused(proxy: Proxy) -> int:
    return sum(status >= 400 for status in proxy.statuses())


@pytest.mark.recorded
def test_loop_and_on(agent: Agent, proxy: Proxy) -> None:
    (agent.work / "secret.txt").write_text(SECRET)
    printed = agent.run(f"What is the secret? {agent.shell('cat secret.txt')}")
    assert SECRET in printed.rpartition("The tool said")[2], printed
    assert refused(proxy) == 0, proxy.statuses()
    printed = agent.run(f"And now? {SAY}", goes_on=True)
    assert SAID in printed
    assert refused(proxy) == 0, proxy.statuses()


def test_parallel_calls(agent: Agent, proxy: Proxy) -> None:
    agent.run(agent.shell("echo one > one.txt") + agent.shell("echo two > two.txt"))
    assert (agent.work / "one.txt").read_text() == "one\n"
    assert (agent.work / "two.txt").read_text() == "two\n"


@pytest.mark.recorded
def test_mcp_tool(agent: Agent, proxy: Proxy) -> None:
    printed = agent.run(f"Add two and three. {agent.add()}")
    assert "The sum is 5." in printed.rpartition("The tool said")[2], printed
    assert agent.mcp_calls.read_text() == "add 2 3\n"


def test_cut_call_is_not_run(agent: Agent, proxy: Proxy) -> None:
    def cut(path: str, body: dict) -> None:
        if body.get("tools"):
            body[agent.limit] = CUT_AT
            body.pop("max_completion_tokens", None)

    proxy.change = cut
    kept = agent.work / "kept.txt"
    printed = agent.run(agent.write(kept, LONG))
    assert not kept.exists(), printed


def test_refusal_and_on(agent: Agent, proxy: Proxy) -> None:
    assert SAID in agent.run(SAY)

    def refuse(path: str, body: dict) -> None:
        if "input" in body or "messages" in body:
            body["top_p"] = -1

    proxy.change = refuse
    before = len(proxy.exchanges)
    agent.run(f"Again. {SAY}", goes_on=True)
    asked = [exchange for exchange in proxy.exchanges[before:] if exchange.body.get("tools")]
    assert [exchange.status for exchange in asked] == [400], "refused once, not tried again"
    proxy.change = lambda path, body: None
    assert SAID in agent.run(f"Once more. {SAY}", goes_on=True)
