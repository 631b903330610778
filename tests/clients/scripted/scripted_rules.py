"""What the scripted model answers: the rules, the same for both engines, from the text of the prompt alone.

A user's message says what the model is to do, in marks that no client changes:

    [[call NAME {"argument": "value"}]]   call this tool; several before a [[then]] are parallel
    [[then]]                              once these results are there
    [[say TEXT]]                          the answer, instead of one that repeats the last result

Agents send requests of their own beside the user's, for titles or summaries: without marks the answer is one word.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dsv32_plugin.parsers import protocol, render_calls
from dsv32_plugin.parsers.messages import Call

THOUGHTS = "The user wants this done."
ANSWER_HEAD = "The tool said: "
NO_SCRIPT = "Noted."
_MARK = re.compile(r"\[\[(?:call (?P<name>[\w.-]+) |(?P<then>then)\]\]|say (?P<say>.*?)\]\])", re.DOTALL)
_RESULT = re.compile(r"<result>(.*?)</result>", re.DOTALL)
_LONGEST_REPEAT = 500


def answer(prompt: str) -> str:
    """The model's whole answer, thoughts first where the prompt asks for them, without EOS.

    A mark that cannot be read is named in the answer: an exception would end the engine.
    """
    thoughts = f"{THOUGHTS}{protocol.THINK_END}" if prompt.endswith(protocol.THINK_START) else ""
    try:
        return thoughts + _spoken(prompt)
    except (ValueError, KeyError) as error:
        return f"{thoughts}The script cannot be read: {error}"


def _spoken(prompt: str) -> str:
    turn, results = _last_script(prompt)
    if not turn:
        return NO_SCRIPT
    rounds, says = _read(turn)
    done = results.count(protocol.RESULTS_START.strip())
    if done < len(rounds):
        tools = _tools(prompt)
        calls = [(_known(name, tools), arguments) for name, arguments in rounds[done]]
        missing = [name for (known, _), (name, _) in zip(calls, rounds[done], strict=True) if known is None]
        if missing:
            return f"There is no tool {', '.join(missing)} among {', '.join(tools) or 'none'}."
        return "\n\n" + render_calls([Call(str(name), arguments) for name, arguments in calls])
    if says is not None:
        return says
    last = _RESULT.findall(results)
    return ANSWER_HEAD + (last[-1].strip()[:_LONGEST_REPEAT] if last else "nothing")


def _last_script(prompt: str) -> tuple[str, str]:
    """The user's last turn if it has marks, and what came after it; else that of an earlier user's turn still open."""
    turns = prompt.split(protocol.USER)
    for number in range(len(turns) - 1, 0, -1):
        turn, _, after = turns[number].partition(protocol.ASSISTANT)
        if _MARK.search(turn):
            return turn, after + "".join(turns[number + 1 :])
    return "", ""


def _read(turn: str) -> tuple[list[list[tuple[str, dict[str, Any]]]], str | None]:
    """The calls of each round, and what is said at the end."""
    rounds: list[list[tuple[str, dict[str, Any]]]] = [[]]
    says = None
    for mark in _MARK.finditer(turn):
        if mark["name"]:
            arguments, _ = json.JSONDecoder().raw_decode(turn, mark.end())
            rounds[-1].append((mark["name"], arguments))
        elif mark["then"]:
            rounds.append([])
        else:
            says = mark["say"]
    return [calls for calls in rounds if calls], says


def _tools(prompt: str) -> list[str]:
    """The names in the prompt's block of functions; results may hold such blocks, too."""
    _, _, after = prompt.partition(protocol.TOOLS_HEAD)
    return [json.loads(line)["name"] for line in after.partition(protocol.TOOLS_TAIL)[0].split("\n") if line]


def _known(name: str, tools: list[str]) -> str | None:
    """The tool of this name, or the only one that ends in it: clients put their server's name before it."""
    if name in tools:
        return name
    ending = [tool for tool in tools if re.search(rf"[_.-]{re.escape(name)}$", tool)]
    return ending[0] if len(ending) == 1 else None
