"""A notebook outside of the context: what is noted is there after a discard."""

from __future__ import annotations

from dataclasses import dataclass, field

from toolbox import Tool, parameters

MOST_CHARS = 20_000


@dataclass
class Notes:
    lines: list[str] = field(default_factory=list)

    def tools(self) -> list[Tool]:
        return [
            Tool(
                "note",
                "Write down what you will need later. Calls and their results are removed when the context is full; "
                "notes stay.",
                parameters(text="What to write down."),
                self.note,
            ),
            Tool("read_notes", "Read all notes.", parameters(), self.read),
        ]

    def note(self, text: str) -> str:
        if sum(map(len, self.lines)) + len(text) > MOST_CHARS:
            return f"error: the notes are full, at {MOST_CHARS} characters"
        self.lines.append(text)
        return "noted"

    def read(self) -> str:
        return "\n".join(self.lines) or "no notes yet"
