"""What a request wants of its context: which name of which API is which strategy, and what the answer says of it.

`dsv32_plugin.parsers.context` has the strategies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dsv32_plugin.parsers.context import (
    ClearToolUses,
    ContextError,
    Count,
    Managed,
    Memory,
    Strategy,
    Truncate,
    clear_thinking,
    manage,
    read_strategy,
)

from .refusal import Refusal

logger = logging.getLogger("dsv32_plugin.apis")

JsonObject = dict[str, Any]
HEADER = b"x-dsv32-context"
"""Of an answer: what was applied, in JSON."""
CLEAR_TOOL_USES = "clear_tool_uses_20250919"
CLEAR_THINKING = "clear_thinking_20251015"
TRUNCATION = "truncation"
_EDIT_FIELDS = {
    CLEAR_TOOL_USES: ("trigger", "keep", "clear_at_least", "exclude_tools", "clear_tool_inputs"),
    CLEAR_THINKING: ("keep",),
}


@dataclass(frozen=True)
class Plan:
    """What is to be done with a conversation that grows.

    Attributes:
        name: what the client calls the strategy.
        strategy: None where there is none; the server's may take its place, except in `OFF`.
        clears_thinking: whether Anthropic's edit of that name is asked for.
        thinking_turns: whose reasoning it keeps, None for all.
    """

    name: str
    strategy: Strategy | None = None
    clears_thinking: bool = False
    thinking_turns: int | None = None

    def within(self, context: int, answer: Any = None) -> Plan:
        """The same for a context of so many tokens and an answer of so many; raises ContextError: see `Strategy`."""
        is_number = isinstance(answer, int) and not isinstance(answer, bool) and answer > 0
        strategy = self.strategy and self.strategy.within(context, answer if is_number else None)
        return replace(self, strategy=strategy)

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        count: Count,
        memory: Memory | None = None,
        about: Hashable = None,
        count_parts: Count | None = None,
    ) -> Outcome:
        """For the arguments see `manage`.

        Raises:
            EncodingError: the conversation has no rendering.
        """
        turns = 0
        if self.clears_thinking:
            # Before the last message of the user's the encoding keeps no reasoning: no token is saved.
            count(messages)
            messages, turns = clear_thinking(messages, self.thinking_turns)
        if self.strategy is None:
            tokens = count(messages)
            managed = Managed(list(messages), list(range(len(messages))), tokens, tokens)
        else:
            managed = manage(messages, self.strategy, count, memory, about, count_parts)
        return Outcome(self.name, managed, turns)


OFF = Plan("none")
"""What a client asks for that wants nothing done."""


@dataclass(frozen=True)
class Outcome:
    """What was done with a conversation."""

    name: str
    managed: Managed
    thinking_turns: int = 0

    @property
    def edits(self) -> list[JsonObject]:
        """In Anthropic's words, by the names that the client used. Nothing is said of what took nothing away."""
        managed = self.managed
        edits: list[JsonObject] = []
        if self.thinking_turns:
            edits.append(
                {"type": CLEAR_THINKING, "cleared_thinking_turns": self.thinking_turns, "cleared_input_tokens": 0}
            )
        if managed.cleared_tool_uses or managed.cleared_messages:
            edit = {"type": self.name, "cleared_tool_uses": managed.cleared_tool_uses}
            if managed.cleared_messages:
                edit["cleared_messages"] = managed.cleared_messages
            edit["cleared_input_tokens"] = max(0, managed.original_tokens - managed.tokens)
            edits.append(edit)
        return edits

    @property
    def report(self) -> JsonObject:
        return {"applied_edits": self.edits, "original_input_tokens": self.managed.original_tokens}

    @property
    def anthropic_edits(self) -> list[JsonObject]:
        """Its API knows no other types: a strategy that isn't its own is a clearing of tool uses with a name."""
        known = (CLEAR_TOOL_USES, CLEAR_THINKING)
        return [
            edit if edit["type"] in known else {**edit, "type": CLEAR_TOOL_USES, "strategy": edit["type"]}
            for edit in self.edits
        ]


def read_default(options: Any, context: int) -> Plan | None:
    """The server's, of `settings.context`.

    Raises:
        ContextError: its trigger is above the context.
    """
    plan = OFF if options is None else _named(options)
    try:
        return None if plan == OFF else plan.within(context)
    except ContextError as error:
        raise ContextError(f"DSV32_CONTEXT: {error}") from error


def warn_without_effect(options: Any) -> None:
    """Of the server's, where a chat template renders conversations."""
    if options is not None:
        logger.warning("dsv32: DSV32_CONTEXT has no effect: a chat template renders this model's conversations")


def read_template_kwargs(kwargs: Mapping[str, Any]) -> Plan | None:
    """Of `chat_template_kwargs`, which every API takes; None where it says nothing."""
    if kwargs.get("context") is None:
        return None
    return _reading("chat_template_kwargs.context", lambda: _named(kwargs["context"]))


def read_responses(body: Mapping[str, Any]) -> Plan | None:
    """Of `truncation`; refuses `context_management`, which is something else."""
    entries = body.get("context_management")
    if entries not in (None, []):
        listed = entries if isinstance(entries, list) else [entries]
        kinds = [entry.get("type") if isinstance(entry, Mapping) else entry for entry in listed]
        raise Refusal(
            f"context_management: expected none, got {', '.join(map(str, kinds))}; compaction returns an item that "
            'only the server which made it can read, and none is made here: use truncation "auto"',
            param="context_management",
        )
    truncation = body.get("truncation")
    if truncation not in (None, "auto", "disabled"):
        raise Refusal(f"truncation: expected auto or disabled, got {truncation!r}", param="truncation")
    return None if truncation is None else Plan(TRUNCATION, Truncate()) if truncation == "auto" else OFF


def read_messages(body: Mapping[str, Any]) -> Plan | None:
    """Of `context_management`; refuses `compaction`."""
    if body.get("compaction") is not None:
        raise Refusal("compaction: expected none; no block is made here, and none is read: use context_management")
    given = body.get("context_management")
    if given is None:
        return None
    edits = given.get("edits", []) if isinstance(given, Mapping) and not set(given) - {"edits"} else None
    edits = [] if given == {"edits": None} else edits
    if not isinstance(edits, list):
        raise Refusal(f'context_management: expected {{"edits": […]}}, got {given!r}')
    kinds = [edit.get("type") if isinstance(edit, Mapping) else edit for edit in edits]
    for place, kind in enumerate(kinds):
        name = f"context_management.edits[{place}]"
        if not isinstance(edits[place], Mapping) or not isinstance(kind, str) or kind not in _EDIT_FIELDS:
            raise Refusal(f"{name}: expected {' or '.join(_EDIT_FIELDS)}, got {kind!r}")
        if kind in kinds[:place]:
            raise Refusal(f"{name}: a second {kind}; give one")
        if kind == CLEAR_THINKING and place:
            raise Refusal(f"{name}: expected {CLEAR_THINKING} first, got it after {kinds[0]}")
        if unknown := [key for key in edits[place] if key not in ("type", *_EDIT_FIELDS[kind])]:
            raise Refusal(f"{name}: expected {', '.join(_EDIT_FIELDS[kind])}, got {', '.join(map(str, unknown))}")
    plan = Plan(CLEAR_TOOL_USES)
    for place, edit in enumerate(edits):
        name = f"context_management.edits[{place}]"
        if edit["type"] == CLEAR_THINKING:
            keep = edit.get("keep", {"type": "thinking_turns", "value": 1})
            keeps_all = keep in ("all", {"type": "all"})
            turns = None if keeps_all else _value(keep, f"{name}.keep", "thinking_turns", least=1)
            plan = replace(plan, clears_thinking=True, thinking_turns=turns)
        else:
            plan = replace(plan, strategy=_reading(name, partial(_clear_tool_uses, edit, name)))
    return plan if edits else OFF


def settle(asked: Sequence[Plan | None], default: Plan | None, context: int, answer: Any) -> Plan | None:
    """The one plan of a request, the server's where it says nothing, or none.

    Args:
        asked: what each part of the request that may ask for one says.
        default: the server's.
        context: tokens of a prompt and its answer.
        answer: as many the answer may have, if the request says.

    Raises:
        Refusal: there are two strategies, or one whose trigger is above the context.
    """
    plans = [plan for plan in asked if plan is not None]
    strategies = [plan for plan in plans if plan.strategy is not None]
    if len(strategies) > 1:
        names = " and ".join(plan.name for plan in strategies)
        raise Refusal(f"chat_template_kwargs.context: expected one strategy, got {names}", param="chat_template_kwargs")
    chosen = next(iter(strategies), OFF if OFF in plans else default or OFF)
    thinking = next((plan for plan in plans if plan.clears_thinking), None)
    if thinking is not None:
        chosen = replace(chosen, clears_thinking=True, thinking_turns=thinking.thinking_turns)
    return None if chosen == OFF else _reading(chosen.name, lambda: chosen.within(context, answer))


def _named(options: Any) -> Plan:
    strategy = read_strategy(options)
    return OFF if strategy is None else Plan(options if isinstance(options, str) else options["strategy"], strategy)


def _clear_tool_uses(edit: Mapping[str, Any], name: str) -> Strategy:
    options: JsonObject = {}
    if (trigger := edit.get("trigger")) is not None:
        kind = trigger.get("type") if isinstance(trigger, Mapping) else None
        field = "trigger_tool_uses" if kind == "tool_uses" else "trigger_tokens"
        options[field] = _value(trigger, f"{name}.trigger", "input_tokens", "tool_uses", least=1)
    if edit.get("keep") is not None:
        options["keep"] = _value(edit["keep"], f"{name}.keep", "tool_uses")
    if edit.get("clear_at_least") is not None:
        options["clear_at_least"] = _value(edit["clear_at_least"], f"{name}.clear_at_least", "input_tokens")
    if edit.get("exclude_tools") is not None:
        options["exclude_tools"] = _names(edit["exclude_tools"], f"{name}.exclude_tools", "a list of names")
    inputs = edit.get("clear_tool_inputs")
    if isinstance(inputs, bool):
        options["clear_tool_inputs"] = inputs
    elif inputs is not None:
        options["clear_tool_inputs"] = _names(inputs, f"{name}.clear_tool_inputs", "true, false or a list of names")
    return ClearToolUses(**options)


def _value(given: Any, name: str, *kinds: str, least: int = 0) -> int:
    value = given.get("value") if isinstance(given, Mapping) else None
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not is_number or given.get("type") not in kinds or set(given) - {"type", "value"}:
        expected = " or ".join(f'"{kind}"' for kind in kinds)
        raise Refusal(f'{name}: expected {{"type": {expected}, "value": N}}, N from {least} on, got {given!r}')
    return int(given["value"])


def _names(given: Any, name: str, expected: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise Refusal(f"{name}: expected {expected}, got {given!r}")
    return tuple(given)


def _reading(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ContextError as error:
        raise Refusal(f"{name}: {error}", param=name) from error
