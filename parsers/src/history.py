"""A conversation in tasks and steps, and what is left of it after discards.

A *task* is a message of the user's and what follows up to the next one. A *step* is an assistant's message with calls,
and their results: it goes as a whole or stays. A step is unread while the model has not answered to its results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from .encoding import settle_developers
from .messages import Turn, match_results, read_turns
from .sizes import Message, Sizes

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
class State:
    """What was done with the beginning of a conversation.

    Attributes:
        gone: the places of messages.
        cleared: those of results.
        added: the tokens up to a place, and those of thoughts among them.
    """

    gone: tuple[int, ...]
    cleared: tuple[int, ...]
    added: tuple[int, int, int]


@dataclass(frozen=True)
class Step:
    """A message with calls, and their results."""

    task: int
    messages: tuple[int, ...]
    uses: tuple[Use, ...]


class History:
    """A conversation, and what is left of it so far. It is read forwards, from prompt to prompt.

    Attributes:
        messages: all that was given. What a developer's message is depends on all of them: it says itself from here on.
        shown: the same, with None for what is gone and others for what was cleared.
        cleared: the places of results that were cleared.
    """

    def __init__(self, messages: Sequence[Message], sizes: Sizes | None = None) -> None:
        self._turns, self._tasks = read_tasks(messages)
        self.messages = [
            {**message, "role": "system"} if message["role"] == "developer" and turn.role == "system" else message
            for message, turn in zip(messages, self._turns, strict=True)
        ]
        self.shown: list[Message | None] = list(self.messages)
        self._first_user = next((index for index, task in enumerate(self._tasks) if task), 0)
        self.steps = self._steps()
        self._step_at = {step.messages[0]: step for step in self.steps}
        self._cleared_before = {
            index for index, turn in enumerate(self._turns) if turn.role == "tool" and turn.text == CLEARED
        }
        self.cleared = set(self._cleared_before)
        self._sizes = sizes
        # Up to `_reached` all is added up: the tokens, and of the last task's thoughts as many more.
        self._reached, self._added, self._thoughts = 0, sizes.empty if sizes else 0, 0
        # What is gone is taken out where these are read: a long history is not searched at every prompt.
        self._live = deque(self.steps)
        self._first_left = 0
        self._coming = deque(use for step in self.steps for use in step.uses if use.result is not None)
        self._uncleared: list[Use] = []
        self._savings: dict[Use, int] = {}

    def prompt(self, end: int) -> list[Message]:
        return [message for message in self.shown[:end] if message is not None]

    def prompts(self) -> list[int]:
        """Where the prompts end, in the order in which they were given."""
        turns = self._turns
        ends = [
            index
            for index in range(self._first_user + 1, len(turns))
            if turns[index].role == "assistant" and turns[index - 1].role != "assistant"
        ]
        return [*ends, len(turns)]

    def task_of(self, end: int) -> int:
        """The number of the task that a prompt asks about."""
        return self._tasks[end - 1] if end else 0

    def tokens(self, end: int) -> int:
        """Of a prompt, which is not before one that was asked for."""
        assert self._sizes is not None
        start = end
        if self._turns[end - 1].role in ("system", "assistant"):
            start -= 1
            while start and self._turns[start].role == "system":
                start -= 1
            while start and self._turns[start].role == "tool":
                start -= 1
        while self._reached < start:
            self._add(self._part(self._reached))
        thoughts = self._thoughts if self.task_of(start) == self.task_of(end) else 0
        tail = [message for message in self.shown[start:end] if message is not None]
        return self._added + thoughts + (self._sizes.of_end(tail) if tail else 0)

    def _part(self, index: int) -> tuple[int, ...]:
        """What is counted as a whole: a step, or a message."""
        step = self._step_at.get(index)
        return (index,) if step is None else step.messages

    def _add(self, part: tuple[int, ...]) -> None:
        if self._tasks[part[0]] != self.task_of(part[0]):
            self._thoughts = 0
        tokens = self._size(part)
        self._added += tokens
        self._thoughts += self._size_of_thoughts(part, tokens)
        self._reached = part[-1] + 1

    def _size(self, part: tuple[int, ...]) -> int:
        """The tokens of a part as it is shown."""
        assert self._sizes is not None
        messages = self._shown(part)
        is_question = self._turns[part[0]].role in ("user", "developer")
        return 0 if not messages else self._sizes.of_question(messages[0]) if is_question else self._sizes.of(messages)

    def _size_of_thoughts(self, part: tuple[int, ...], tokens: int) -> int:
        """As many more it has while its task is the last."""
        assert self._sizes is not None
        messages = self._shown(part)
        thinks = self._turns[part[0]].role == "assistant" and messages
        return self._sizes.of_thoughts(messages) - tokens if thinks else 0

    def _shown(self, part: Sequence[int]) -> list[Message]:
        return [message for message in (self.shown[index] for index in part) if message is not None]

    def read_steps(self, end: int) -> list[Step]:
        """Those in a prompt whose results the model has answered to; a beginning that it goes on from is no answer."""
        last = next((index for index in range(end - 2, -1, -1) if self._turns[index].role == "assistant"), -1)
        while self._live and self.shown[self._live[0].messages[0]] is None:
            self._live.popleft()
        steps = takewhile(lambda step: step.messages[0] < last, self._live)
        return [step for step in steps if self.shown[step.messages[0]] is not None]

    def calls(self, end: int, task: int | None) -> int:
        """How many a prompt has, of one task or of all."""
        steps = takewhile(lambda step: step.messages[0] < end, self._live)
        return sum(
            len(step.uses) for step in steps if self.shown[step.messages[0]] is not None and task in (None, step.task)
        )

    def uncleared(self, end: int) -> list[Use]:
        """The uses in a prompt that have their results."""
        while self._coming and self._coming[0].message < end:
            self._uncleared.append(self._coming.popleft())
        self._uncleared = [use for use in self._uncleared if use.result not in self.cleared]
        return self._uncleared

    def units(self, end: int) -> list[tuple[int, ...]]:
        """What a prompt can do without, oldest first."""
        task = self.task_of(end)
        steps: dict[int, list[tuple[int, ...]]] = {}
        for step in self.read_steps(end):
            steps.setdefault(step.task, []).append(step.messages)
        while self._first_left < end and not self._is_left(self._first_left):
            self._first_left += 1
        whole: dict[int, list[int]] = {}
        for index in range(self._first_left, end):
            if self._tasks[index] == task:
                break
            if self._is_left(index):
                whole.setdefault(self._tasks[index], []).append(index)
        earlier = [unit for number, indices in whole.items() for unit in (*steps.get(number, ()), tuple(indices))]
        return earlier + steps.get(task, [])

    def _is_left(self, index: int) -> bool:
        return self.shown[index] is not None and self._turns[index].role != "system"

    def drop(self, indices: Sequence[int]) -> None:
        """Whole parts, each."""
        for index in indices:
            if index < self._reached and self.shown[index] is not None and self._turns[index].role != "tool":
                part = self._part(index)
                tokens = self._size(part)
                self._added -= tokens
                if self._tasks[index] == self.task_of(self._reached):
                    self._thoughts -= self._size_of_thoughts(part, tokens)
        for index in indices:
            self.shown[index] = None

    def clear(self, use: Use, *, inputs: bool) -> None:
        part = self._part(use.message)
        is_added = use.message < self._reached
        before = self._size(part) if is_added else 0
        self._show_cleared(use, inputs=inputs)
        self._added += self._size(part) - before if is_added else 0

    def _show_cleared(self, use: Use, *, inputs: bool) -> None:
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

    def saving(self, use: Use, *, inputs: bool) -> int:
        """The tokens that go by clearing this use alone."""
        if use not in self._savings:
            part = self._part(use.message)
            before, shown = self._size(part), [self.shown[index] for index in part]
            self._show_cleared(use, inputs=inputs)
            self._savings[use] = before - self._size(part)
            self.cleared.discard(use.result)
            self.shown[part[0] : part[-1] + 1] = shown
        return self._savings[use]

    @property
    def cleared_tool_uses(self) -> int:
        """Calls that are gone, or whose results are."""
        gone = sum(len(step.uses) for step in self.steps if self.shown[step.messages[0]] is None)
        return gone + len(self.cleared - self._cleared_before)

    @property
    def state(self) -> State:
        gone = tuple(index for index, message in enumerate(self.shown) if message is None)
        cleared = tuple(sorted(self.cleared - self._cleared_before))
        return State(gone, cleared, (self._reached, self._added, self._thoughts))

    def restore(self, state: State, clears_inputs: Callable[[str], bool]) -> None:
        """Do what was done with the beginning of this conversation; `clears_inputs` is asked of each function."""
        of = {use.result: use for step in self.steps for use in step.uses}
        for index in state.cleared:
            self._show_cleared(of[index], inputs=clears_inputs(of[index].name))
        self.drop(state.gone)
        self._reached, self._added, self._thoughts = state.added

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
