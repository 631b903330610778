"""Tools that a model may call, and the limits within which they run: none of them ends the agent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LONGEST_RESULT = 12_000
"""Characters of a result that the model reads; what is in the middle of a longer one is left out."""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Tool:
    """A function, and what the model is told of it. `run` takes arguments by their names and returns text or JSON."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., Any]

    @property
    def schema(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def parameters(**properties: str) -> dict[str, Any]:
    """A schema of texts, all of them required."""
    described = {name: {"type": "string", "description": text} for name, text in properties.items()}
    return {"type": "object", "properties": described, "required": list(properties)}


@dataclass
class Toolbox:
    """Runs what the model calls. Whatever goes wrong becomes the result, which the model reads."""

    tools: list[Tool]
    timeout_s: float = TIMEOUT_S
    longest_result: int = LONGEST_RESULT
    hanging: int = field(default=0, init=False)
    """Calls that did not come back in time, and still run."""

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools]

    def call(self, name: str, arguments: str) -> str:
        """The result of a call: what the tool says, or why it says nothing."""
        tool = next((tool for tool in self.tools if tool.name == name), None)
        if tool is None:
            return f"error: there is no tool {name!r}; there are {', '.join(tool.name for tool in self.tools)}"
        try:
            given = json.loads(arguments or "{}")
        except ValueError as error:
            return f"error: the arguments are no JSON, so nothing was run: {error}"
        if not isinstance(given, dict):
            return f"error: expected an object of arguments, got {type(given).__name__}"
        return self._cut(self._run_in_time(tool, given))

    def _run_in_time(self, tool: Tool, given: dict[str, Any]) -> str:
        results: list[str] = []

        def run() -> None:
            try:
                result = tool.run(**given)
                results.append(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))
            except BaseException as error:  # also SystemExit of a tool: it ends this thread alone
                results.append(f"error: {type(error).__name__}: {error}")

        # A thread can't be ended from outside: one that hangs is left behind, and does not keep the program alive.
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not results:
            self.hanging += 1
            return f"error: {tool.name} did not answer within {self.timeout_s:g} seconds"
        return results[0]

    def _cut(self, text: str) -> str:
        left_out = len(text) - self.longest_result
        if left_out <= 0:
            return text
        half = self.longest_result // 2
        return f"{text[:half]}\n[{left_out} characters are left out]\n{text[len(text) - half :]}"
