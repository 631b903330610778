"""The search agent of examples/: it outlives its context, and no tool ends it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("resource", reason="the limits are POSIX's")
pytest.importorskip("openai")

import agent as agents
import documents
import itinerary
import openai
import policy
import python_tool
from notes import Notes
from python_tool import Limits
from toolbox import Tool, Toolbox, parameters

EXAMPLE = Path(__file__).parents[1] / "examples" / "search_agent"
CONTEXT = 8192
SEED = 6
TASK_TOKENS = 30_000
MCP_SERVER = """
from mcp.server.mcpserver import MCPServer
server = MCPServer("sums")
@server.tool()
def add(a: int, b: int) -> str:
    return f"The sum is {a + b}."
@server.tool()
def flood(mebibytes: int) -> str:
    return "x" * (mebibytes << 20)
server.run()
"""
QUICK = Limits(wall_s=5)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with policy.serving(CONTEXT) as url:
        yield url


def run(url: str, strategy: str, **more: Any) -> tuple[agents.Trajectory, list[str]]:
    """What the agent did, and what is wrong with its plan."""
    world = itinerary.Itinerary(SEED)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    settings = agents.Settings("scripted", strategy, context=CONTEXT, steps=90, answer_tokens=1024, **more)
    done = agents.Agent(client, settings).run(world.prompt, Toolbox([*world.tools(), *Notes().tools()]))
    return done, world.verify()


@pytest.mark.parametrize(
    ("strategy", "by"),
    [
        ("discard-all", "server"),
        ("discard-75", "server"),
        ("summary", "server"),
        ("discard-all", "client"),
    ],
)
def test_a_task_of_30k_in_a_context_of_8k(url: str, strategy: str, by: Any) -> None:
    done, wrong = run(url, strategy, by=by)
    assert (done.end, wrong) == ("answer", [])
    assert done.resets >= 4
    assert done.longest_prompt <= CONTEXT - 1024
    said = sum(len(json.dumps(message)) for message in done.messages) / policy.CHARS_PER_TOKEN
    assert said > 0.9 * TASK_TOKENS
    if (strategy, by) == ("discard-all", "server"):
        assert done.whole_tokens > TASK_TOKENS
    assert done.cached_tokens > 0.6 * done.prompt_tokens


def test_without_a_strategy_the_context_is_the_end(url: str) -> None:
    done, wrong = run(url, "none")
    assert (done.end, done.resets, wrong) == ("context", 0, ["no plan was submitted"])
    assert "the context has 8192" in done.why


def test_where_calls_stay_they_fill_the_context_in_the_end(url: str) -> None:
    done, wrong = run(url, "keep-last-3")
    assert (done.end, wrong) == ("context", ["no plan was submitted"])
    assert done.steps > 3 * run(url, "none")[0].steps


def test_a_budget_of_steps_is_the_end(url: str) -> None:
    world = itinerary.Itinerary(SEED)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    settings = agents.Settings("scripted", "discard-all", context=CONTEXT, steps=3, answer_tokens=1024)
    done = agents.Agent(client, settings).run(world.prompt, Toolbox([*world.tools(), *Notes().tools()]))
    assert (done.end, done.steps) == ("steps", 3)


def test_the_command_keeps_the_shortest_of_several(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--itinerary", str(SEED), "--scripted", str(CONTEXT), "--parallel", "3"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["The plan is submitted.", "the plan is right"]
    assert "[3/3] step" in done.stderr
    kept = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")}
    assert len({trajectory["steps"] for trajectory in kept.values()}) > 1
    assert "## tool" in (tmp_path / "discard-all-1.md").read_text(encoding="utf-8")


def test_the_fewest_steps_come_first_and_no_answer_last(url: str) -> None:
    class Lengths(agents.Agent):
        def run(self, task: str, toolbox: Toolbox, number: int = 0, system: str = "") -> agents.Trajectory:
            return [
                agents.Trajectory(task, "none", 0, end="context", steps=1),
                agents.Trajectory(task, "none", 1, steps=9),
                agents.Trajectory(task, "none", 2, steps=4),
            ][number]

    done = Lengths(None, agents.Settings("m")).run_parallel("t", [Toolbox([])] * 3)
    assert [trajectory.number for trajectory in done] == [2, 1, 0]


class Says:
    """A client whose model says these messages."""

    def __init__(self, *said: tuple[dict[str, Any], str]) -> None:
        self._said = list(said)
        self.asked: list[Any] = []
        self.chat = SimpleNamespace(completions=self)

    def create(self, **body: Any) -> Any:
        self.asked.append(json.loads(json.dumps(body["messages"])))
        message, finish = self._said.pop(0)
        shown = SimpleNamespace(model_dump=lambda exclude_none: {"role": "assistant", **message}, **message)
        return SimpleNamespace(choices=[SimpleNamespace(message=shown, finish_reason=finish)], usage=None)


def calls(*called: tuple[str, str]) -> dict[str, Any]:
    made = [
        {"id": str(i), "type": "function", "function": {"name": n, "arguments": a}} for i, (n, a) in enumerate(called)
    ]
    return {"content": None, "reasoning_content": "I think.", "tool_calls": made}


def test_a_call_that_was_cut_is_not_run_and_thoughts_are_kept() -> None:
    ran: list[str] = []
    box = Toolbox([Tool("f", "", parameters(x=""), lambda x: ran.append(x) or "done")])
    client = Says((calls(("f", '{"x": "a"}'), ("f", '{"x": "rm -rf')), "length"), ({"content": "So."}, "stop"))
    done = agents.Agent(client, agents.Settings("m", "none")).run("t", box)
    assert ran == ["a"]
    results = [message["content"] for message in client.asked[1] if message["role"] == "tool"]
    assert results == ["done", agents.CUT]
    assert client.asked[1][2]["reasoning_content"] == "I think."
    assert done.answer == "So."


def test_no_tool_ends_the_agent() -> None:
    def leaves() -> None:
        raise SystemExit(3)

    def hangs() -> None:
        time.sleep(60)

    box = Toolbox(
        [
            Tool("hangs", "", parameters(), hangs),
            Tool("fails", "", parameters(), lambda: 1 / 0),
            Tool("leaves", "", parameters(), leaves),
            Tool("floods", "", parameters(), lambda: "x" * 10**7),
            Tool("odd", "", parameters(), lambda: object()),
            Tool("takes", "", parameters(x=""), lambda x: x),
        ],
        timeout_s=0.3,
    )
    start = time.monotonic()
    assert "did not answer within 0.3 seconds" in box.call("hangs", "{}")
    assert time.monotonic() - start < 5
    assert box.hanging == 1
    assert "ZeroDivisionError" in box.call("fails", "{}")
    assert "SystemExit" in box.call("leaves", "{}")
    assert len(box.call("floods", "{}")) < box.longest_result + 100
    assert "not JSON serializable" in box.call("odd", "{}")
    assert "unexpected keyword" in box.call("takes", '{"y": 1}')
    assert "no JSON, so nothing was run" in box.call("takes", '{"x": "a')
    assert "expected an object" in box.call("takes", "[1]")
    assert "there is no tool 'gone'; there are hangs" in box.call("gone", "{}")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print(6 * 7)", "42"),
        ("import sys; sys.exit(3)", "[exit status 3]"),
        ("1 / 0", "ZeroDivisionError"),
        ("input()", "EOFError"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("open('f', 'wb').write(b'x' * 10**8)", "File too large"),
        ("import os; os.kill(os.getpid(), 9)", "[ended by SIGKILL]"),
        ("while True: pass", "[stopped after 5 seconds]"),
        ("import time; time.sleep(60)", "[stopped after 5 seconds]"),
        ("import os\nos.close(1); os.close(2)\nimport time; time.sleep(60)", "[stopped after 5 seconds]"),
        ("import sys\nwhile True: sys.stdout.write('x' * 10**6)", "printed more than 20000 characters"),
        ("import os; print(sorted(os.environ))", "SEARCH_AGENT_PROCESS"),
    ],
)  # fmt: skip
def test_python_within_limits(code: str, says: str) -> None:
    start = time.monotonic()
    result = python_tool.run(code, QUICK)
    assert time.monotonic() - start < 20
    assert says in result
    assert len(result) < 25_000


@pytest.mark.parametrize(
    ("code", "limits", "says"),
    [
        (
            "import os, time\nfor _ in range(80):\n    if os.fork() == 0:\n        time.sleep(60)\ntime.sleep(60)",
            Limits(wall_s=30, processes=40),
            ("started more than 40 processes", "BlockingIOError"),
        ),
        (
            "for i in range(1000):\n    open(str(i), 'wb').write(b'x' * (1 << 20))\nimport time; time.sleep(60)",
            Limits(wall_s=30, files_mib=30),
            ("wrote more than 30 MiB",),
        ),
        (
            "import os, time\nos.close(1); os.close(2)\n"
            "for i in range(1000):\n    open(str(i), 'wb').write(b'x' * (1 << 20))\ntime.sleep(60)",
            Limits(wall_s=30, files_mib=30),
            ("wrote more than 30 MiB",),
        ),
    ],
    ids=["forks", "fills-the-disk", "fills-it-unheard"],
)
def test_what_the_system_does_not_limit_is_looked_at(code: str, limits: Limits, says: tuple[str, ...]) -> None:
    start = time.monotonic()
    result = python_tool.run(code, limits)
    assert any(said in result for said in says), result
    assert time.monotonic() - start < 25


def test_secrets_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert "secret" not in python_tool.run("import os; print(os.environ)", QUICK)


def test_no_process_is_left(tmp_path: Path) -> None:
    """Also one in a session of its own, that holds the pipe and outlives its parent."""
    pid = tmp_path / "pid"
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "time.sleep(0.5)\n"
        "print('begun', flush=True)\n"
    )
    start = time.monotonic()
    assert "begun" in python_tool.run(code, Limits(wall_s=3, cpu_s=5))
    assert time.monotonic() - start < 10
    stat = Path(f"/proc/{pid.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX", "at most its entry is left"


def test_documents_are_searched_and_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "lake.md").write_text("The boat lies at the northern shore. " * 400, encoding="utf-8")
    (tmp_path / "hill.txt").write_text("Sheep and wind.", encoding="utf-8")
    (tmp_path / "key.pem").write_text("secret", encoding="utf-8")
    found = documents.Documents(tmp_path)
    assert found.files == 2
    assert found.search("northern boat").count("sub/lake.md from ") == 10
    assert found.search('wind" OR (').startswith("hill.txt")
    assert found.search("nowhere") == "nothing found"
    assert found.search("...").startswith("error")
    page = found.read("sub/lake.md")
    assert page.endswith("characters follow, from 6000]")
    assert found.read("sub/lake.md", 14_780).endswith("shore. ")
    for path in ("../secret.txt", "key.pem", "/etc/passwd", "gone.md"):
        assert found.read(path).startswith("error: there is no document")
    with pytest.raises(SystemExit, match="expected text files"):
        documents.Documents(tmp_path / "sub" / "none")


def test_an_itinerary_has_an_answer_and_a_cheaper_one_has_not() -> None:
    task = itinerary.Itinerary(SEED)
    world = task.world()
    plan = itinerary.solve(world, task.budget)
    assert plan is not None
    assert itinerary.faults(world, plan, task.budget) == []
    assert itinerary.cost(world, plan) == task.budget
    assert itinerary.solve(world, task.budget - 1) is None
    assert str(task.budget) in task.prompt
    assert itinerary.Itinerary(SEED).world() == world, "of one seed, one world"


def test_what_is_wrong_with_a_plan_is_said() -> None:
    task = itinerary.Itinerary(SEED)
    world = task.world()
    plan = itinerary.solve(world, None)
    assert plan is not None
    wrong: list[tuple[Any, str]] = [
        (plan[:2], "expected 3 days"),
        ("a plan", "expected 3 days"),
        ([*plan[:2], 5], "expected in every day city, hotel"),
        ([*plan[:2], {**plan[2], "city": "Rome"}], "there is no city Rome"),
        ([*plan[:2], {**plan[2], "hotel": "Ritz"}], "lacks what is planned there"),
        ([plan[0], plan[0], plan[2]], "a city is visited twice"),
        ([plan[0], plan[0], plan[2]], "a cuisine comes twice"),
        ([plan[0], plan[0], plan[2]], "a kind of sight comes twice"),
    ]
    for given, says in wrong:
        assert any(says in fault for fault in itinerary.faults(world, given, task.budget)), says
    assert itinerary.faults(world, plan, task.budget - 1) == [f"it costs {task.budget}, more than {task.budget - 1}"]
    bad = {
        name: {**city, "hotels": [{**hotel, "rating": 1.0} for hotel in city["hotels"]]} for name, city in world.items()
    }
    assert any("is rated 1.0" in fault for fault in itinerary.faults(bad, plan, None))
    dear = {
        name: {
            **city,
            "hotels": [{**hotel, "price": 200} for hotel in city["hotels"]],
            "restaurants": [{**meal, "price": 50} for meal in city["restaurants"]],
        }
        for name, city in world.items()
    }
    assert any("is too dear next to" in fault for fault in itinerary.faults(dear, plan, None))
    far = {name: {**city, "trains": []} for name, city in world.items()}
    assert any("no train from" in fault for fault in itinerary.faults(far, plan, None))


def test_notes_have_an_end() -> None:
    notes = Notes()
    assert notes.read() == "no notes yet"
    assert notes.note("a") == "noted"
    assert notes.note("x" * 30_000).startswith("error: the notes are full")
    assert notes.read() == "a"


def test_the_tools_of_an_mcp_server(tmp_path: Path) -> None:
    pytest.importorskip("mcp.server.mcpserver")
    from mcp_tools import tools_of

    server = tmp_path / "server.py"
    server.write_text(MCP_SERVER, encoding="utf-8")
    with tools_of(f"{sys.executable} {server}") as tools:
        box = Toolbox(tools)
        assert [tool["function"]["name"] for tool in box.schemas] == ["add", "flood"]
        assert "a" in box.schemas[0]["function"]["parameters"]["properties"]
        assert box.call("add", '{"a": 2, "b": 3}') == "The sum is 5."
        assert "error" in box.call("add", '{"a": "two"}').lower()
        assert "more than 1048576; ask for less" in box.call("flood", '{"mebibytes": 100}')
        assert box.call("add", '{"a": 2, "b": 4}') == "The sum is 6.", "the next call is answered"
    with pytest.raises(SystemExit, match="does not answer as an MCP server"), tools_of(f"{sys.executable} -c pass"):
        pass
