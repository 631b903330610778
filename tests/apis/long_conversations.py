"""A long task in the forms of the three APIs: the same calls and results, one after the other."""

from __future__ import annotations

from typing import Any

SYSTEM = "You find things."
TASK = "Where is the boat?"
PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def result(n: int) -> str:
    return f"page {n}: " + f"lake {n} hill {n} rain " * 12


def chat(steps: int, tool: str = "look") -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK}]
    for n in range(steps):
        function = {"name": tool, "arguments": f'{{"n": {n}}}'}
        call = {"id": f"c{n}", "type": "function", "function": function}
        messages.append({"role": "assistant", "reasoning_content": f"I look at {n}.", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"c{n}", "content": result(n)})
    tools = [{"type": "function", "function": {"name": tool, "description": "d", "parameters": PARAMETERS}}]
    return {"model": "tiny", "messages": messages, "tools": tools}


def responses(steps: int) -> dict[str, Any]:
    items: list[dict[str, Any]] = [{"role": "user", "content": TASK}]
    for n in range(steps):
        thought = {"type": "reasoning_text", "text": f"I look at {n}."}
        items.append({"type": "reasoning", "id": f"r{n}", "summary": [], "content": [thought]})
        items.append({"type": "function_call", "call_id": f"c{n}", "name": "look", "arguments": f'{{"n": {n}}}'})
        items.append({"type": "function_call_output", "call_id": f"c{n}", "output": result(n)})
    tools = [{"type": "function", "name": "look", "description": "d", "parameters": PARAMETERS, "strict": False}]
    return {"model": "tiny", "instructions": SYSTEM, "input": items, "tools": tools}


def messages(steps: int) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"role": "user", "content": TASK}]
    for n in range(steps):
        thought = {"type": "thinking", "thinking": f"I look at {n}.", "signature": "s"}
        use = {"type": "tool_use", "id": f"c{n}", "name": "look", "input": {"n": n}}
        turns.append({"role": "assistant", "content": [thought, use]})
        said = {"type": "tool_result", "tool_use_id": f"c{n}", "content": result(n)}
        turns.append({"role": "user", "content": [said]})
    tools = [{"name": "look", "description": "d", "input_schema": PARAMETERS}]
    return {"model": "tiny", "system": SYSTEM, "messages": turns, "tools": tools}
