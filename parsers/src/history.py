"""A conversation in tasks and steps, and what is left of it after discards.

A *task* is a message of the user's and what follows up to the next one. A *step* is an assistant's message with calls,
and their results: it goes as a whole or stays. A step is unread while the model has not answered to its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .encoding import settle_developers
from .messages import Turn, match_results, read_turns

Message = Mapping[str, Any]
State = tuple[tuple[int, ...], tuple[int, ...]]
"""The places of messages that are gone, and of results that were cleared."""
CLEARED = "[cleared to save context]"
"""In the place of a result that was cleared."""


@dataclass(frozen=True)
class Use:
    """A call and its result, by their places."""

    message: int
    call: int
    name: str
    result: int | None


@dataclass(frozen=True)
class Step:
    """A message with calls, and their results."""

    task: int
    messages: tuple[int, ...]
    uses: tuple[Use, ...]


@dataclass
class History:
    """A conversation, and what is left of it so far.

    Attributes:
        messages: all that was given. What a developer's message is depends on all of them: it says itself from here on.
        shown: the same, with None for what is gone and others for what was cleared.
        cleared: the places of results that were cleared.
    """

    messages: Sequence[Message]
    shown: list[Message | None] = field(init=False)
    cleared: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._turns, self._tasks = read_tasks(self.messages)
        self.messages = [
            {**message, "role": "system"} if message["role"] == "developer" and turn.role == "system" else message
            for message, turn in zip(self.messages, self._turns, strict=True)
        ]
        self.shown = list(self.messages)
        self._first_user = next((index for index, task in enumerate(self._tasks) if task), 0)
        self._thoughts = [0, *accumulate(len(turn.reasoning.encode()) for turn in self._turns)]
        self.steps = self._steps()
        self._cleared_before = {
            index for index, turn in enumerate(self._turns) if turn.role == "tool" and turn.text == CLEARED
        }
        self.cleared = set(self._cleared_before)

    def prompt(self, end: int) -> list[Message]:
        return [message for message in self.shown[:end] if message is not None]

    def prompts(self) -> list[list[int]]:
        """Where the prompts of each task end, in the order in which they were given."""
        turns = self._turns
        ends = [
            index
            for index in range(self._first_user + 1, len(turns))
            if turns[index].role == "assistant" and turns[index - 1].role != "assistant"
        ]
        found: dict[int, list[int]] = {}
        for end in [*ends, len(turns)]:
            found.setdefault(self.task_of(end), []).append(end)
        return list(found.values())

    def task_of(self, end: int) -> int:
        """The number of the task that a prompt asks about."""
        return self._tasks[end - 1] if end else 0

    def thoughts(self, end: int) -> int:
        """At least as many tokens as all reasoning up to a place has: its bytes."""
        return self._thoughts[end]

    def read_steps(self, end: int) -> list[Step]:
        """Those in a prompt whose results the model has answered to; a beginning that it goes on from is no answer."""
        answers = [index for index in range(end - 1) if self._turns[index].role == "assistant"]
        last = answers[-1] if answers else -1
        return [step for step in self.steps if step.messages[0] < last and self.shown[step.messages[0]] is not None]

    def calls(self, end: int, task: int | None) -> int:
        """How many a prompt has, of one task or of all."""
        return sum(
            len(step.uses)
            for step in self.steps
            if step.messages[0] < end and self.shown[step.messages[0]] is not None and task in (None, step.task)
        )

    def uncleared(self, end: int) -> list[Use]:
        """The uses in a prompt that have their results."""
        return [
            use
            for step in self.steps
            for use in step.uses
            if use.result is not None and use.result < end and use.result not in self.cleared
        ]

    def units(self, end: int) -> list[tuple[int, ...]]:
        """What a prompt can do without, oldest first."""
        task = self.task_of(end)
        steps: dict[int, list[tuple[int, ...]]] = {}
        for step in self.read_steps(end):
            steps.setdefault(step.task, []).append(step.messages)
        whole: dict[int, list[int]] = {}
        for index, number in enumerate(self._tasks[:end]):
            if self._turns[index].role != "system" and self.shown[index] is not None:
                whole.setdefault(number, []).append(index)
        units: list[tuple[int, ...]] = []
        for number, indices in whole.items():
            units += steps.get(number, [])
            units += [tuple(indices)] if number < task else []
        return units

    def drop(self, indices: Sequence[int]) -> None:
        for index in indices:
            self.shown[index] = None

    def clear(self, use: Use, *, inputs: bool) -> None:
        assert use.result is not None
        self.cleared.add(use.result)
        self.shown[use.result] = {**self.messages[use.result], "content": CLEARED}
        if inputs:
            shown = self.shown[use.message]
            assert shown is not None
            calls = list(shown["tool_calls"])
            calls[use.call] = {
                "id": self._turns[use.message].calls[use.call].id,
                "type": "function",
                "function": {"name": use.name, "arguments": {}},
            }
            self.shown[use.message] = {**shown, "tool_calls": calls}

    @property
    def cleared_tool_uses(self) -> int:
        """Calls that are gone, or whose results are."""
        gone = sum(len(step.uses) for step in self.steps if self.shown[step.messages[0]] is None)
        return gone + len(self.cleared - self._cleared_before)

    @property
    def state(self) -> State:
        gone = tuple(index for index, message in enumerate(self.shown) if message is None)
        return gone, tuple(sorted(self.cleared - self._cleared_before))

    def restore(self, state: State, clears_inputs: Callable[[str], bool]) -> None:
        """Do what was done with the beginning of this conversation; `clears_inputs` is asked of each function."""
        gone, cleared = state
        of = {use.result: use for step in self.steps for use in step.uses}
        for index in cleared:
            self.clear(of[index], inputs=clears_inputs(of[index].name))
        self.drop(gone)

    def _steps(self) -> list[Step]:
        steps = []
        for index, turn in enumerate(self._turns):
            if turn.calls:
                end = index + 1
                while end < len(self._turns) and self._turns[end].role == "tool":
                    end += 1
                steps.append(Step(self._tasks[index], tuple(range(index, end)), self._uses(index, end)))
        return steps

    def _uses(self, index: int, end: int) -> tuple[Use, ...]:
        calls = self._turns[index].calls
        slots = match_results([call.id for call in calls], [turn.call_id for turn in self._turns[index + 1 : end]])
        results = {slot: index + 1 + place for place, slot in enumerate(slots)}
        return tuple(Use(index, slot, call.name, results.get(slot)) for slot, call in enumerate(calls))


def read_tasks(messages: Sequence[Message]) -> tuple[list[Turn], list[int]]:
    """The turns of a conversation, and the number of each one's task: 0 is before the first message of the user's."""
    turns = settle_developers(read_turns(messages))
    return turns, list(accumulate(turn.role in ("user", "developer") for turn in turns))
