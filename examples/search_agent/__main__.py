"""A search agent whose task may be longer than the context: see README.md beside this file.

python examples/search_agent --folder docs "Which setting lets content spell control tokens?" --strategy discard-all
python examples/search_agent --itinerary 1 --strategy keep-last-8 --parallel 4
python examples/search_agent --itinerary 1 --scripted 8192 --strategy discard-75
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import openai
from agent import Agent, Settings, Trajectory
from documents import Documents
from itinerary import Itinerary
from mcp_tools import tools_of
from notes import Notes
from python_tool import python_tool
from toolbox import Tool, Toolbox


@dataclass
class Progress:
    """A line for every step; `of` names the trajectories where there are several."""

    context: int
    of: int
    lock: Lock

    def __call__(self, done: Trajectory, what: str) -> None:
        who = f"[{done.number + 1}/{self.of}] " if self.of > 1 else ""
        size = f"{done.last_prompt:6} of {self.context} tokens"
        line = f"{who}step {done.steps:3}  {size}  {done.resets} resets  {what}"
        with self.lock:
            print(line[:160], file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help="what to find out")
    parser.add_argument("--itinerary", type=int, metavar="SEED", help="the synthetic task in place of one of yours")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--scripted", type=int, metavar="CONTEXT", help="no model: a policy, with so small a context")
    parser.add_argument("--strategy", default="discard-all", help="none, discard-all, discard-75, keep-last-N, summary")
    parser.add_argument("--by", choices=("server", "client"), default="server", help="client: for any other server")
    parser.add_argument("--context", type=int, default=131_072, help="of the server (default: %(default)s)")
    parser.add_argument("--trigger", type=int, help="tokens from where on the strategy acts (default: 80 %% of them)")
    parser.add_argument("--steps", type=int, default=200, help="budget (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=8192, help="of each step (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="keep the shortest of N trajectories")
    parser.add_argument("--folder", type=Path, help="search and read the text files below it")
    parser.add_argument("--python", action="store_true", help="let the model run Python, within limits")
    parser.add_argument("--mcp", action="append", default=[], metavar="COMMAND", help="an MCP server; several times")
    parser.add_argument("--out", type=Path, help="write the transcripts there, as JSON and Markdown")
    given = parser.parse_args()
    if (given.task is None) is (given.itinerary is None):
        parser.error("expected a task or --itinerary SEED")
    with ExitStack() as stack:
        shared: list[Tool] = Documents(given.folder).tools() if given.folder else []
        shared += [tool for command in given.mcp for tool in stack.enter_context(tools_of(command))]
        shared += [python_tool()] if given.python else []
        if given.scripted:
            from policy import serving

            given.url, given.context = stack.enter_context(serving(given.scripted)), given.scripted
            given.answer_tokens = min(given.answer_tokens, given.scripted // 8)
        client = openai.OpenAI(base_url=given.url, api_key="none", timeout=3600)
        settings = Settings(
            model=client.models.list().data[0].id,
            strategy=given.strategy,
            by=given.by,
            context=given.context,
            trigger=given.trigger,
            steps=given.steps,
            answer_tokens=given.answer_tokens,
        )
        worlds = [Itinerary(given.itinerary) for _ in range(given.parallel)] if given.itinerary is not None else []
        boxes = [
            Toolbox([*(worlds[i].tools() if worlds else []), *Notes().tools(), *shared]) for i in range(given.parallel)
        ]
        task = worlds[0].prompt if worlds else given.task
        done = Agent(client, settings, Progress(given.context, given.parallel, Lock())).run_parallel(task, boxes)
    for trajectory in done if given.out else ():
        given.out.mkdir(parents=True, exist_ok=True)
        name = f"{trajectory.strategy}-{trajectory.number}"
        (given.out / f"{name}.json").write_text(trajectory.as_json(), encoding="utf-8")
        (given.out / f"{name}.md").write_text(trajectory.as_markdown(), encoding="utf-8")
    best = done[0]
    print(best.answer or f"no answer: {best.end}: {best.why}")
    if worlds:
        wrong = worlds[best.number].verify()
        print(f"the plan is {'right' if not wrong else '; '.join(wrong)}")
        return int(bool(wrong))
    return int(best.end != "answer")


if __name__ == "__main__":
    sys.exit(main())
