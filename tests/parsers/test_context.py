"""Strategies for conversations that outgrow the context: what holds for all of them, and what each does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv32_plugin.parsers import encode_messages
from dsv32_plugin.parsers.context import (
    ClearToolUses,
    ContextError,
    Discard75,
    DiscardAll,
    Managed,
    Memory,
    Strategy,
    Truncate,
    clear_thinking,
    manage,
    plan_summary,
    read_strategy,
)
from dsv32_plugin.parsers.history import CLEARED, History
from dsv32_plugin.parsers.sizes import Sizes

Message = dict[str, Any]
SYSTEM: Message = {"role": "system", "content": "Be brief."}


def render(messages: Sequence[Any]) -> str:
    return str(encode_messages(list(messages), always_answer=True, thinking_mode="thinking"))


def count(messages: Sequence[Any]) -> int:
    """A token a character, and each mark as many as the other: a message adds as many wherever it stands."""
    return len(render(messages).replace("</think>", "<think>"))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text, "reasoning_content": "So."}


def step(number: int, *results: str, thoughts: str = "I look.") -> list[Message]:
    """An assistant's message with a call for each result, and the results, the last first."""
    calls = [
        {"id": f"{number}.{i}", "type": "function", "function": {"name": f"f{i}", "arguments": f'{{"n": {number}}}'}}
        for i in range(len(results))
    ]
    return [
        {"role": "assistant", "content": f"step {number}", "reasoning_content": thoughts, "tool_calls": calls},
        *(
            {"role": "tool", "tool_call_id": f"{number}.{i}", "content": text}
            for i, text in reversed(list(enumerate(results)))
        ),
    ]


def task(number: int, steps: int, size: int = 100) -> list[Message]:
    return [user(f"task {number}"), *(m for i in range(steps) for m in step(10 * number + i, f"r{i} " + "x" * size))]


TEXTS = st.text("ab \n<｜", max_size=60)
STEPS = st.lists(st.lists(TEXTS, min_size=1, max_size=3), max_size=6)
TASKS = st.lists(st.tuples(TEXTS, STEPS, st.booleans()), min_size=1, max_size=4)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Any that a client may send: tasks of any steps, some with an answer, hints of the system's anywhere."""
    messages = [SYSTEM] if draw(st.booleans()) else []
    for number, (text, steps, answered) in enumerate(draw(TASKS)):
        messages.append(user(text))
        for i, results in enumerate(steps):
            messages += step(10 * number + i, *results)
            if draw(st.integers(0, 9)) == 0:
                messages.append({"role": "system", "content": "Go on."})
        if answered:
            messages.append(answer(f"done {number}"))
    if messages[-1]["role"] == "assistant":
        messages.append(user("and now?"))
    return messages


STRATEGIES = st.one_of(
    st.builds(DiscardAll),
    st.builds(Discard75),
    st.builds(Truncate),
    st.builds(
        ClearToolUses,
        keep=st.integers(0, 4),
        trigger_tool_uses=st.one_of(st.none(), st.integers(1, 6)),
        clear_at_least=st.sampled_from([0, 20, 200]),
        exclude_tools=st.sampled_from([(), ("f1",)]),
        clear_tool_inputs=st.sampled_from([False, True, ("f0",)]),
    ),
)
TRIGGERS = st.integers(60, 2500)


def ends_of(messages: list[Message]) -> list[int]:
    """Where a request ended: before each answer, and now."""
    roles = [message["role"] for message in messages]
    answers = [i for i in range(1, len(roles)) if roles[i] == "assistant" != roles[i - 1]]
    return [*answers, len(messages)]


@given(conversations(), STRATEGIES, TRIGGERS)
def test_no_call_or_result_is_alone_and_nothing_is_made_up(
    messages: list[Message], strategy: Strategy, trigger: int
) -> None:
    kept = manage(messages, replace(strategy, trigger_tokens=trigger), count)
    render(kept.messages)  # refuses a result without its call
    called = [call["id"] for m in kept.messages for call in m.get("tool_calls", ())]
    assert sorted(called) == sorted(m["tool_call_id"] for m in kept.messages if m["role"] == "tool")
    assert [m["role"] for m in kept.messages] == [messages[i]["role"] for i in kept.indices]
    assert kept.indices == sorted(set(kept.indices))
    for index, message in zip(kept.indices, kept.messages, strict=True):
        given = messages[index]
        assert message == given or message.get("content") == CLEARED or message["role"] == "assistant"
    assert kept.indices[-1] == len(messages) - 1, "what is asked now stays"
    assert {i for i, m in enumerate(messages) if m["role"] == "system"} <= set(kept.indices)
    assert kept.original_tokens == count(messages)
    assert kept.tokens == count(kept.messages)


@given(conversations(), STRATEGIES, TRIGGERS)
def test_above_the_trigger_is_only_what_nothing_can_be_taken_from(
    messages: list[Message], strategy: Strategy, trigger: int
) -> None:
    if isinstance(strategy, ClearToolUses):
        strategy = ClearToolUses(keep=0)
    kept = manage(messages, replace(strategy, trigger_tokens=trigger), count)
    if kept.tokens <= trigger:
        return
    left = History(kept.messages)
    if isinstance(strategy, ClearToolUses):
        assert left.uncleared(len(kept.messages)) == []
    elif isinstance(strategy, Truncate):
        assert left.units(len(kept.messages)) == []
    else:
        assert left.read_steps(len(kept.messages)) == []


@given(conversations(), STRATEGIES, TRIGGERS)
def test_twice_is_once(messages: list[Message], strategy: Strategy, trigger: int) -> None:
    strategy = replace(strategy, trigger_tokens=trigger)
    once = manage(messages, strategy, count)
    again = manage(once.messages, strategy, count)
    if not (isinstance(strategy, ClearToolUses) and (strategy.clear_at_least or strategy.exclude_tools)):
        assert again.messages == once.messages
        assert again.cleared_tool_uses == again.cleared_messages == 0


@given(conversations(), STRATEGIES, TRIGGERS)
def test_what_is_gone_stays_gone_and_prompts_extend_each_other(
    messages: list[Message], strategy: Strategy, trigger: int
) -> None:
    """Turn by turn, as a client sends it: by the whole conversation nothing else is decided than at the time."""
    strategy = replace(strategy, trigger_tokens=trigger)
    before: Managed | None = None
    for end in ends_of(messages):
        now = manage(messages[:end], strategy, count)
        if before is not None:
            kept_before = dict(zip(before.indices, before.messages, strict=True))
            kept_now = dict(zip(now.indices, now.messages, strict=True))
            old = max(before.indices) + 1
            assert [i for i in kept_now if i < old and i not in kept_before] == []
            for index, message in kept_before.items():
                if message.get("content") == CLEARED and index in kept_now:
                    assert kept_now[index].get("content") == CLEARED
            acted = (before.cleared_tool_uses, before.cleared_messages) != (now.cleared_tool_uses, now.cleared_messages)
            is_same_task = not any(m["role"] == "user" for m in messages[old:end])
            hinted = any(m["role"] == "system" for m in messages[old - 1 : end])
            if acted and not getattr(strategy, "trigger_tool_uses", None):
                assert count([*before.messages, *messages[old:end]]) > trigger, "only what no longer fits is taken away"
            if not acted and is_same_task and not hinted:
                assert render(now.messages).startswith(render(before.messages))
        before = now


@given(conversations(), STRATEGIES, TRIGGERS)
def test_what_is_remembered_changes_nothing(messages: list[Message], strategy: Strategy, trigger: int) -> None:
    strategy, memory = replace(strategy, trigger_tokens=trigger), Memory(4)
    for end in ends_of(messages):
        assert manage(messages[:end], strategy, count, memory) == manage(messages[:end], strategy, count)
    assert manage(messages, strategy, count, memory, "other tools") == manage(messages, strategy, count)


@given(conversations(), STRATEGIES)
def test_below_the_trigger_nothing_changes(messages: list[Message], strategy: Strategy) -> None:
    if isinstance(strategy, ClearToolUses):
        strategy = replace(strategy, trigger_tool_uses=None)
    kept = manage(messages, replace(strategy, trigger_tokens=100_000), count)
    assert kept == Managed(messages, list(range(len(messages))), count(messages), count(messages))


def shown(kept: Managed) -> list[str]:
    return [str(m["content"]).split(" x")[0] for m in kept.messages]


def test_discard_all_begins_anew_with_what_is_unread() -> None:
    messages = [SYSTEM, *task(1, 5)]
    kept = manage(messages, DiscardAll(count(messages) - 1), count)
    assert shown(kept) == ["Be brief.", "task 1", "step 14", "r4"]
    assert (kept.cleared_tool_uses, kept.cleared_messages) == (4, 8)


def test_after_a_discard_the_trajectory_grows_until_the_next() -> None:
    messages = task(1, 9)
    trigger = count(messages[: 1 + 2 * 4]) - 1  # the fourth result is one too many
    steps = [shown(manage(messages[: 1 + 2 * n], DiscardAll(trigger), count))[1::2] for n in range(1, 10)]
    assert [[int(text[-1]) for text in kept] for kept in steps] == [
        [0], [0, 1], [0, 1, 2], [3], [3, 4], [3, 4, 5], [6], [6, 7], [6, 7, 8],
    ]  # fmt: skip


def test_discard_75_takes_three_quarters_of_the_calls() -> None:
    messages = task(1, 8)
    kept = manage(messages, Discard75(count(messages) - 1), count)
    assert shown(kept) == ["task 1", "step 16", "r6", "step 17", "r7"]
    assert kept.cleared_tool_uses == 6


def test_parallel_calls_go_together() -> None:
    messages = [user("task"), *step(0, "a", "b", "c"), *step(1, "d"), *step(2, "e")]
    kept = manage(messages, Discard75(count(messages) - 1), count)
    assert kept.cleared_tool_uses == 3
    assert shown(kept) == ["task", "step 1", "d", "step 2", "e"]


def test_earlier_tasks_are_taken_only_where_this_one_is_not_enough() -> None:
    messages = [*task(1, 3), answer("done"), *task(2, 3, size=400)]
    kept = manage(messages, DiscardAll(count(messages) - 1), count)
    assert "step 10" in shown(kept)
    assert "step 20" not in shown(kept)
    small = manage(messages, DiscardAll(count([user("task 1"), answer("done"), user("task 2"), *messages[-2:]])), count)
    assert shown(small) == ["task 1", "done", "task 2", "step 22", "r2"]


def test_the_beginning_of_an_answer_has_read_nothing() -> None:
    """A client's prefill: the model has yet to see the results before it."""
    messages = [*task(1, 4), {"role": "assistant", "content": "It is"}]
    for strategy in (DiscardAll(50), Truncate(50)):
        assert shown(manage(messages, strategy, count)) == ["task 1", "step 13", "r3", "It is"]


def test_a_developers_hint_stays_one_when_all_questions_are_gone() -> None:
    """Without a user's message it would be one of the search agent's, which speak as the user."""
    agent = {"role": "developer", "content": "Search.", "tools": [{"name": "f", "parameters": {}}]}
    messages = [{"role": "developer", "content": "Be brief."}, user("q " * 50), answer("a"), agent]
    memory = Memory()
    for end in (2, 4):
        kept = manage(messages[:end], Truncate(20), count, memory)
    assert render(kept.messages).startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜>")
    assert shown(kept) == ["Be brief.", "Search."]


def test_what_is_remembered_of_a_developers_message_is_what_it_was() -> None:
    """A user's message that comes late makes system messages of those that were the search agent's."""
    hint, agent = (
        {"role": "developer", "content": "dev"},
        {"role": "developer", "content": "a", "tools": [{"name": "f"}]},
    )
    messages = [hint, answer("a"), answer("b"), agent, answer("c"), agent, user("q")]
    memory = Memory()
    for end in ends_of(messages):
        kept = manage(messages[:end], Truncate(1), count, memory)
    assert kept == manage(messages, Truncate(1), count)


def test_results_are_cleared_and_calls_stay() -> None:
    messages = task(1, 5)
    kept = manage(messages, ClearToolUses(count(messages) - 1), count)
    said = [text for n in range(5) for text in (f"step 1{n}", CLEARED if n < 2 else f"r{n}")]
    assert shown(kept) == ["task 1", *said]
    assert kept.messages[1] == messages[1]
    assert kept.cleared_tool_uses == 2


def test_the_last_results_are_kept_where_there_are_fewer() -> None:
    messages = task(1, 2)
    assert manage(messages, ClearToolUses(10, keep=3), count).messages == messages
    assert manage(messages, ClearToolUses(10, keep=0), count).cleared_tool_uses == 2


def test_inputs_are_cleared_of_the_functions_that_are_named() -> None:
    messages = [user("task"), *step(0, "a", "b"), *step(1, "c")]
    for of, arguments in ((True, [{}, {}]), (("f1",), ['{"n": 0}', {}]), ((), ['{"n": 0}', '{"n": 0}'])):
        strategy = ClearToolUses(count(messages) - 1, keep=1, clear_tool_inputs=of)
        calls = manage(messages, strategy, count).messages[1]["tool_calls"]
        assert [call["function"]["arguments"] for call in calls] == arguments


def test_the_last_results_are_those_of_the_last_calls() -> None:
    """`step` gives the results of parallel calls in the other order."""
    messages = [user("task"), *step(0, "a" * 50, "b" * 50, "c" * 50)]
    kept = manage(messages, ClearToolUses(count(messages) - 1, keep=1, exclude_tools=("f0",)), count)
    assert [m["content"] for m in kept.messages[2:]] == ["c" * 50, CLEARED, "a" * 50]


def test_nothing_is_cleared_where_it_is_not_worth_it() -> None:
    messages = task(1, 6)
    strategy = ClearToolUses(count(messages) - 1, keep=3)
    saved = manage(messages, strategy, count)
    saved_tokens = saved.original_tokens - saved.tokens
    assert manage(messages, replace(strategy, clear_at_least=saved_tokens), count) == saved
    assert manage(messages, replace(strategy, clear_at_least=saved_tokens + 1), count).messages == messages


def test_a_number_of_uses_is_a_trigger_too() -> None:
    messages = task(1, 6)
    kept = manage(messages, ClearToolUses(10**6, trigger_tool_uses=4, keep=2), count)
    assert kept.cleared_tool_uses == 3, "at the fifth result, and from there again after three more"


def test_truncation_takes_the_oldest_and_leaves_room() -> None:
    messages = [SYSTEM, *task(1, 3), answer("done"), *task(2, 4)]
    trigger = count(messages) - 1
    kept = manage(messages, Truncate(trigger), count)
    assert kept.tokens <= 0.75 * trigger
    assert shown(kept)[0] == "Be brief."
    assert "task 2" in shown(kept)
    assert shown(kept)[-2:] == ["step 23", "r3"]
    assert "step 10" not in shown(kept)
    assert manage(messages, Truncate(200), count).indices == [0, 9, 16, 17]


def test_a_truncated_answer_has_its_question() -> None:
    messages = [m for n in range(8) for m in (user(f"q{n} " + "x" * 50), answer(f"a{n}"))] + [user("now")]
    kept = manage(messages, Truncate(count(messages) - 1), count)
    roles = [m["role"] for m in kept.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_thinking_goes_turn_by_turn() -> None:
    messages = [*task(1, 2), answer("done"), *task(2, 2), answer("done"), *task(3, 2)]
    for keep, cleared in ((1, {1, 2}), (2, {1}), (3, set()), (None, set()), (0, {1, 2, 3})):
        kept, number = clear_thinking(messages, keep)
        assert number == len(cleared)
        tasks = [sum(m["role"] == "user" for m in kept[: i + 1]) for i in range(len(kept))]
        thought = {n for n, m in zip(tasks, kept, strict=True) if m.get("reasoning_content")}
        assert thought == {1, 2, 3} - cleared
    blocks = [{"type": "thinking", "thinking": "t"}, {"text": "a"}]
    kept, _ = clear_thinking([user("q"), {"role": "assistant", "content": blocks}, user("r")], 0)
    assert kept == [user("q"), {"role": "assistant", "content": blocks[1:]}, user("r")]


def test_a_summary_is_a_plan() -> None:
    messages = [SYSTEM, *task(1, 1), answer("done"), *task(2, 3)]
    assert plan_summary(messages, count(messages), count) is None
    assert plan_summary([SYSTEM, user("long " * 100)], 10, count) is None, "there are no calls to summarise"
    plan = plan_summary(messages, count(messages) - 1, count)
    assert plan is not None
    assert plan.summarised == messages[6:]
    assert plan.request[:-1] == messages
    assert plan.request[-1]["role"] == "user"
    continued = plan.continued(" Found it. ")
    assert continued[:-1] == messages[:5]
    assert continued[-1]["content"].startswith("task 2")
    assert continued[-1]["content"].endswith("Found it.")
    assert count(continued) < count(messages)
    longer = [*continued, *step(30, "x" * 100)]
    again = plan_summary(longer, 10, count)
    assert again is not None
    assert again.continued("More.")[-1]["content"] == continued[-1]["content"].replace("Found it.", "More.")
    parts = [*messages[:4], {"role": "user", "content": [{"type": "text", "text": "task 2"}]}, *messages[6:]]
    of_parts = plan_summary(parts, 10, count)
    assert of_parts is not None
    once = of_parts.continued("Found it.")
    twice = plan_summary([*once, *step(30, "x")], 10, count)
    assert twice is not None
    assert [len(kept[-1]["content"]) for kept in (once, twice.continued("More."))] == [2, 2]
    with pytest.raises(ContextError, match="summary: expected text"):
        plan.continued(" ")


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ("discard-all", DiscardAll()),
        ({"strategy": "discard-75", "trigger_tokens": 900}, Discard75(900)),
        ({"strategy": "keep-last-n", "keep": 5, "trigger_tokens": 900}, ClearToolUses(900, keep=5)),
        ("keep-last-n", ClearToolUses(keep=3)),
        ("keep-last-7", ClearToolUses(keep=7)),
        ("none", None),
    ],
)
def test_a_strategy_has_a_name(options: Any, strategy: Strategy | None) -> None:
    assert read_strategy(options) == strategy


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("discard-most", "expected one of discard-all, discard-75, keep-last-n or none, got 'discard-most'"),
        ("summary", "'summary', which a client carries out"),
        ({}, 'expected {"strategy"'),
        (["discard-all"], 'expected {"strategy"'),
        ({"strategy": "discard-all", "trigger": 5}, "expected strategy, trigger_tokens, keep, got trigger"),
        ({"strategy": "discard-all", "keep": 5}, "keep: expected none with strategy 'discard-all'"),
        ({"strategy": "discard-all", "trigger_tokens": 0}, "trigger_tokens: expected a whole number from 1 on, got 0"),
        ({"strategy": "discard-all", "trigger_tokens": True}, "got True"),
        ({"strategy": "discard-all", "trigger_tokens": "9"}, "got '9'"),
        ({"strategy": "keep-last-n", "keep": -1}, "keep: expected a whole number from 0 on, got -1"),
    ],
)
def test_what_is_no_strategy_is_named(options: Any, reason: str) -> None:
    with pytest.raises(ContextError) as error:
        read_strategy(options)
    assert reason in str(error.value)


def test_triggers_for_a_context() -> None:
    assert DiscardAll().within(131072).trigger_tokens == 104857
    assert ClearToolUses().within(131072).trigger_tokens == 100_000
    assert ClearToolUses().within(8192).trigger_tokens == 6553
    assert DiscardAll(8192).within(8192).trigger_tokens == 8191
    assert DiscardAll(8000).within(8192, 1000).trigger_tokens == 7192, "the answer that is asked for has room"
    assert DiscardAll(8000).within(8192, 9000).trigger_tokens == 8000, "which the engine refuses"
    assert Truncate().within(8192).trigger_tokens == 6553
    assert Truncate().within(8192, 100).trigger_tokens == 8092
    with pytest.raises(ContextError, match="at most the context of 8192 tokens, got 9000 tokens"):
        DiscardAll(9000).within(8192)


@pytest.mark.parametrize(
    "strategy",
    [
        DiscardAll(),
        Discard75(),
        ClearToolUses(),
        ClearToolUses(clear_at_least=10_000),
        ClearToolUses(exclude_tools=("f0",)),
        Truncate(),
    ],
    ids=["all", "75", "keep", "at-least", "exclude", "truncate"],
)
@pytest.mark.parametrize(
    "messages",
    [task(1, 1500), [m for n in range(700) for m in (*task(n, 1), answer("done"))] + [user("now")]],
    ids=["one-task", "many-tasks"],
)
@pytest.mark.parametrize("trigger", [60_000, 100], ids=["60k", "never-enough"])
def test_each_message_is_counted_a_few_times(strategy: Strategy, messages: list[Message], trigger: int) -> None:
    """Also where every prompt is above the trigger, and nothing more can go: once a server stood still for minutes."""
    counted = 0

    def counting(messages: Sequence[Any]) -> int:
        nonlocal counted
        counted += len(messages)
        return sum(len(str(m.get("content"))) + len(str(m.get("tool_calls", ""))) for m in messages)

    strategy, start = replace(strategy, trigger_tokens=trigger), time.process_time()
    kept = manage(messages, strategy, counting)
    assert counted < 25 * len(messages)
    memory = Memory()
    manage(messages[:-2], strategy, counting, memory)
    counted = 0
    assert manage(messages, strategy, counting, memory) == kept
    if trigger > 100:
        assert counted < 2.5 * len(messages), "of a conversation that goes on, only what is new, and the whole"
    assert time.process_time() - start < 10


@given(conversations(), STRATEGIES, TRIGGERS)
def test_what_is_added_up_is_the_prompt(messages: list[Message], strategy: Strategy, trigger: int) -> None:
    strategy, history = replace(strategy, trigger_tokens=trigger), History(messages, Sizes(count, count))
    for end in history.prompts():
        assert history.tokens(end) == count(history.prompt(end))
        if strategy.is_over(history, end):
            strategy.act(history, end)
            assert history.tokens(end) == count(history.prompt(end))
