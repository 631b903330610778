"""Conversations that outgrow the context: what goes, so that the rest fits, and what is said about it.

A client resends its whole conversation with every turn. So a strategy is replayed from the first turn: it is asked at
every prompt that the model was given, in order, and what it took away once stays away. Between two discards each prompt
extends the one before, and keeps its place in a prefix cache. The same conversation always gives the same prompt.

    kept = manage(messages, DiscardAll(trigger_tokens=100_000), count)
    kept.messages, kept.tokens, kept.original_tokens, kept.cleared_tool_uses
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from threading import Lock
from typing import Any

from .history import History, State, Step, read_tasks
from .sizes import Count, Message, Sizes

SHARE_OF_CONTEXT = 0.8
"""Of the context is the trigger where none is given, as in DeepSeek-V3.2's search agent."""
ROOM_AFTER_TRUNCATION = 0.75
"""Of what may be used is used after a truncation, so that not every turn needs another."""
SUMMARISE = (
    "The context is nearly full, and all calls and results above will be removed. Write a summary from which the task "
    "can be finished without them: what was asked, what was tried, what was found and where, and what is left to do. "
    "Call no function."
)
SUMMARY_HEAD = "\n\n# Summary of the work so far, whose calls and results were removed\n\n"


class ContextError(ValueError):
    """A strategy that can't be: says what was expected."""


@dataclass(frozen=True)
class Managed:
    """A conversation as it goes to the model.

    Attributes:
        messages: what is left of it.
        indices: the place of each among those that were given.
        tokens: of its prompt.
        original_tokens: of the prompt of all that was given.
        cleared_tool_uses: calls that are gone, or whose results are.
        cleared_messages: messages that are gone.
    """

    messages: list[Message]
    indices: list[int]
    tokens: int
    original_tokens: int
    cleared_tool_uses: int = 0
    cleared_messages: int = 0


@dataclass(frozen=True)
class Strategy:
    """What goes when a prompt has more than `trigger_tokens`; None takes what `within` says."""

    trigger_tokens: int | None = None

    def __post_init__(self) -> None:
        _check("trigger_tokens", self.trigger_tokens, least=1, optional=True)

    def within(self, context: int, answer: int | None = None) -> Strategy:
        """The same with a trigger, for a context of so many tokens, of which `answer` are asked for.

        Raises:
            ContextError: the trigger is above the context, so that it would never act.
        """
        if self.trigger_tokens is not None and self.trigger_tokens > context:
            raise ContextError(
                f"trigger: expected at most the context of {context} tokens, got {self.trigger_tokens} tokens"
            )
        trigger = self._default(context) if self.trigger_tokens is None else self.trigger_tokens
        room = context - (answer or 1)
        return replace(self, trigger_tokens=max(1, min(trigger, room) if room > 0 else trigger))

    def _default(self, context: int) -> int:
        return int(context * SHARE_OF_CONTEXT)

    def is_over(self, history: History, end: int) -> bool:
        """Whether to act at the prompt that ends before message `end`."""
        return history.tokens(end) > self._trigger

    @property
    def _trigger(self) -> int:
        assert self.trigger_tokens is not None, "asked for before `within`"
        return self.trigger_tokens

    def act(self, history: History, end: int) -> None:
        raise NotImplementedError

    def clears_inputs(self, name: str) -> bool:
        """Whether the arguments of a call go with its result."""
        return False


@dataclass(frozen=True)
class Discard(Strategy):
    """The first calls of this task go, with their results and what was thought and said around them.

    Earlier tasks' go where that isn't enough. Questions and answers stay, and so does a step that is unread.
    """

    share = 1.0
    """Of the calls in the prompt goes at a time."""

    def act(self, history: History, end: int) -> None:
        task = history.task_of(end)
        for scope in (True, False):
            while steps := [step for step in history.read_steps(end) if (step.task == task) is scope]:
                self._discard(history, steps, history.calls(end, task if scope else None))
                if not self.is_over(history, end):
                    return

    def _discard(self, history: History, steps: list[Step], calls: int) -> None:
        quota = int(calls * self.share)
        for number, step in enumerate(steps):
            quota -= len(step.uses)
            if number and quota < 0:
                break
            history.drop(step.messages)


@dataclass(frozen=True)
class DiscardAll(Discard):
    """DeepSeek's Discard-all: begin anew, with what the model has not read yet."""


@dataclass(frozen=True)
class Discard75(Discard):
    """DeepSeek's Discard-75%: the first three quarters of the calls, again until the rest fits."""

    share = 0.75


@dataclass(frozen=True)
class ClearToolUses(Strategy):
    """Results become `CLEARED`, but for the last ones; calls stay. Anthropic's `clear_tool_uses_20250919`.

    Attributes:
        trigger_tool_uses: act at more uncleared results than this, in the place of a number of tokens.
        keep: so many of the last calls keep their results.
        clear_at_least: act only where that takes away as many tokens.
        exclude_tools: functions whose results stay.
        clear_tool_inputs: whether the arguments of these calls go too, or of which functions.
    """

    trigger_tool_uses: int | None = None
    keep: int = 3
    clear_at_least: int = 0
    exclude_tools: tuple[str, ...] = ()
    clear_tool_inputs: bool | tuple[str, ...] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("trigger_tool_uses", self.trigger_tool_uses, least=1, optional=True)
        _check("keep", self.keep)
        _check("clear_at_least", self.clear_at_least)

    def _default(self, context: int) -> int:
        return min(100_000, super()._default(context))

    def is_over(self, history: History, end: int) -> bool:
        if self.trigger_tool_uses is not None:
            return len(history.uncleared(end)) > self.trigger_tool_uses
        return super().is_over(history, end)

    def clears_inputs(self, name: str) -> bool:
        of = self.clear_tool_inputs
        return of if isinstance(of, bool) else name in of

    def act(self, history: History, end: int) -> None:
        uses = history.uncleared(end)
        old = [use for use in uses[: max(0, len(uses) - self.keep)] if use.name not in self.exclude_tools]
        inputs = {use: self.clears_inputs(use.name) for use in old}
        if self.clear_at_least > sum(history.saving(use, inputs=inputs[use]) for use in old if self.clear_at_least):
            return
        for use in old:
            history.clear(use, inputs=inputs[use])


@dataclass(frozen=True)
class Truncate(Strategy):
    """The oldest go first: of each task its steps, then all of it; of the last one only steps that were read.

    OpenAI's `truncation: "auto"`. System messages stay. As much goes as leaves room for further turns.
    """

    def within(self, context: int, answer: int | None = None) -> Strategy:
        """All but the answer that is asked for may be used, in the place of a share."""
        if self.trigger_tokens is None and answer and answer < context:
            return replace(self, trigger_tokens=context - answer)
        return super().within(context, answer)

    def act(self, history: History, end: int) -> None:
        target = int(self._trigger * ROOM_AFTER_TRUNCATION)
        for unit in history.units(end):
            if history.tokens(end) <= target:
                break
            history.drop(unit)


class Memory:
    """What became of conversations, so that a longer one is replayed from there on; the oldest are forgotten.

    It changes no result: what it keeps is a function of the messages, the strategy and what the count depends on.
    """

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._states: OrderedDict[tuple[Hashable, bytes], State] = OrderedDict()
        self._lock = Lock()

    def latest(self, about: Hashable, keys: Sequence[bytes], ends: Sequence[int]) -> tuple[int, State] | None:
        """The last of these prompts that is known, and its state."""
        with self._lock:
            for end in reversed(ends):
                if (state := self._states.get((about, keys[end]))) is not None:
                    return end, state
        return None

    def put(self, about: Hashable, key: bytes, state: State) -> None:
        with self._lock:
            self._states[about, key] = state
            self._states.move_to_end((about, key))
            while len(self._states) > self._size:
                self._states.popitem(last=False)


def manage(
    messages: Sequence[Message],
    strategy: Strategy,
    count: Count,
    memory: Memory | None = None,
    about: Hashable = None,
    count_parts: Count | None = None,
) -> Managed:
    """Replay a strategy over a conversation, from its first turn.

    Args:
        messages: OpenAI-shaped, as `encode_messages` reads them.
        strategy: with a trigger: see `Strategy.within`.
        count: the tokens of a conversation's prompt, to which a message adds as many wherever it stands.
        memory: of earlier turns.
        about: what the count depends on besides the messages, such as the tools.
        count_parts: `count` without what is in every prompt, such as the tools; it is asked often.

    Raises:
        EncodingError: the conversation has no rendering; raised by `count`, too.
    """
    original_tokens = count(messages)
    history = History(messages, Sizes(count, count_parts or count))
    ends = history.prompts() if history.steps or isinstance(strategy, Truncate) else []
    if ends and memory is not None:
        keys, about = _keys(history.messages), (strategy, about)
        known = memory.latest(about, keys, ends)
        if known is not None:
            history.restore(known[1], strategy.clears_inputs)
            ends = ends[ends.index(known[0]) + 1 :]
    for end in ends:
        if strategy.is_over(history, end):
            strategy.act(history, end)
    if memory is not None and (history.steps or isinstance(strategy, Truncate)):
        memory.put(about, keys[-1], history.state)
    is_same = all(shown is given for shown, given in zip(history.shown, history.messages, strict=True))
    kept = history.prompt(len(messages))
    return Managed(
        messages=kept,
        indices=[index for index, message in enumerate(history.shown) if message is not None],
        tokens=original_tokens if is_same else count(kept),
        original_tokens=original_tokens,
        cleared_tool_uses=history.cleared_tool_uses,
        cleared_messages=len(messages) - len(kept),
    )


def clear_thinking(messages: Sequence[Message], keep: int | None) -> tuple[list[Message], int]:
    """Anthropic's `clear_thinking_20251015`: the reasoning goes, but for that of the last `keep` turns that have any.

    A turn is all that the assistant says to a message of the user's, calls and results included. None keeps all.

    Returns:
        The messages, and how many turns lost their reasoning.
    """
    turns, tasks = read_tasks(messages)
    thought = sorted({task for task, turn in zip(tasks, turns, strict=True) if turn.reasoning})
    cleared = set(thought) if keep == 0 else set(thought[:-keep]) if keep else set()
    kept = [
        _without_reasoning(message) if task in cleared and turn.reasoning else message
        for message, task, turn in zip(messages, tasks, turns, strict=True)
    ]
    return kept, len(cleared)


@dataclass(frozen=True)
class SummaryPlan:
    """DeepSeek's Summary, for a client to carry out: ask the model with `request`, then go on with `continued`.

    Attributes:
        summarised: the messages of this task that the summary stands for.
        request: the conversation that asks for it. Its tools stay in the prompt, and none may be called.
    """

    summarised: list[Message]
    request: list[Message]
    _head: list[Message]

    def continued(self, summary: str) -> list[Message]:
        """The conversation up to the task, which the summary becomes a part of."""
        if not summary.strip():
            raise ContextError("summary: expected text, got none; ask the model again")
        *head, task = self._head
        content, text = task["content"], SUMMARY_HEAD + summary.strip()
        # An earlier summary is in what was summarised.
        if isinstance(content, str):
            said: Any = content.partition(SUMMARY_HEAD)[0] + text
        else:
            parts = [part for part in content if not str(part.get("text", "")).startswith(SUMMARY_HEAD)]
            said = [*parts, {"type": "text", "text": text}]
        return [*head, {**task, "content": said}]


def plan_summary(messages: Sequence[Message], trigger_tokens: int, count: Count) -> SummaryPlan | None:
    """What to do where a conversation has more tokens and calls to summarise; None where there is nothing to do."""
    turns, tasks = read_tasks(messages)
    if not tasks or not tasks[-1]:
        return None
    task = tasks.index(tasks[-1])
    if not any(turn.calls for turn in turns[task:]) or count(messages) <= trigger_tokens:
        return None
    request = [*messages, {"role": "user", "content": SUMMARISE}]
    return SummaryPlan(list(messages[task + 1 :]), request, list(messages[: task + 1]))


_KEEP_LAST = re.compile(r"keep-last-(n|[0-9]{1,9})")
STRATEGIES = ("discard-all", "discard-75", "keep-last-n")
_OPTIONS = ("strategy", "trigger_tokens", "keep")


def read_strategy(options: Any) -> Strategy | None:
    """The strategy of `{"strategy": NAME, "trigger_tokens": N, "keep": N}`, or of a name alone; None for "none".

    Raises:
        ContextError: there is no such strategy.
    """
    if isinstance(options, str):
        options = {"strategy": options}
    if not isinstance(options, Mapping) or not isinstance(options.get("strategy"), str):
        raise ContextError(f'expected {{"strategy": …, "trigger_tokens": …}}, got {options!r}')
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise ContextError(f"expected {', '.join(_OPTIONS)}, got {', '.join(map(str, unknown))}")
    name, trigger, keep = options["strategy"], options.get("trigger_tokens"), options.get("keep")
    kept = _KEEP_LAST.fullmatch(name)
    if name == "summary":
        raise ContextError(
            f"strategy: expected one of {', '.join(STRATEGIES)}, got 'summary', which a client carries out: "
            "see dsv32_plugin.parsers.context.plan_summary"
        )
    if keep is not None and name != "keep-last-n":
        raise ContextError(f"keep: expected none with strategy {name!r}, got {keep!r}; it is of keep-last-n")
    if kept:
        last = int(kept[1]) if kept[1] != "n" else 3 if keep is None else keep
        return ClearToolUses(trigger, keep=last)
    known = {"discard-all": DiscardAll, "discard-75": Discard75}
    if name in known:
        return known[name](trigger)
    if name == "none" and trigger is None:
        return None
    raise ContextError(f"strategy: expected one of {', '.join(STRATEGIES)} or none, got {name!r}")


def _keys(messages: Sequence[Message]) -> list[bytes]:
    """Of every beginning of a conversation, from the empty one on."""
    keys = [b""]
    for message in messages:
        said = json.dumps(message, sort_keys=True, default=str).encode()
        keys.append(blake2b(keys[-1] + said, digest_size=16).digest())
    return keys


def _without_reasoning(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key not in ("reasoning_content", "reasoning")}
    if isinstance(kept.get("content"), list):
        kept["content"] = [
            part
            for part in kept["content"]
            if not isinstance(part, Mapping) or part.get("type") not in ("thinking", "reasoning")
        ]
    return kept


def _check(name: str, value: Any, *, least: int = 0, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ContextError(f"{name}: expected a whole number from {least} on, got {value!r}")
