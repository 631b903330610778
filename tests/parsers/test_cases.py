"""Every named case, whole and in pieces."""

import json
import random

import pytest
from parser_cases import CASES, Case

from dsv32_plugin.parsers import Event, Note, OutputParser, ToolCall, assemble, ended_parameters, merge

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def run(case: Case, cuts: list[int]) -> tuple[list[Event], tuple[Note, ...]]:
    parser = OutputParser(list(case.tools), case.thinking, case.policy, **dict(case.options))  # type: ignore[arg-type]
    events: list[Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(case.text)], strict=True):
        events += parser.feed(case.text[start:end])
    events += parser.finish()
    return merge(events), parser.notes


def expected_arguments(call: ToolCall, expected: object) -> object:
    return call.arguments if isinstance(expected, str) else json.loads(call.arguments)


def test_there_are_enough_cases_and_no_two_share_a_name():
    assert len(CASES) >= 120
    assert len({case.id for case in CASES}) == len(CASES)


@all_cases
def test_meaning(case: Case):
    message = OutputParser.parse(case.text, case.tools, case.thinking, case.policy, **dict(case.options))  # type: ignore[arg-type]
    calls = tuple(
        (call.name, expected_arguments(call, expected[1] if expected else None))
        for call, expected in zip(message.tool_calls, [*case.calls, *[None] * 99], strict=False)
    )
    assert (message.reasoning, message.content, calls) == (case.reasoning, case.content, case.calls)
    assert tuple(note.code for note in message.notes) == case.notes


@all_cases
def test_cut_in_two_anywhere(case: Case):
    whole = run(case, [])
    for cut in range(len(case.text) + 1):
        assert run(case, [cut]) == whole, cut


@all_cases
def test_random_chunks(case: Case):
    whole = run(case, [])
    rng = random.Random(case.id)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(case.text) + 1), k=rng.randrange(2, 20)))
        assert run(case, cuts) == whole, cuts


@all_cases
def test_truncated_anywhere(case: Case):
    """However early the text stops: a whole call is one JSON object, an unfinished one the beginning of one."""
    for end in range(len(case.text)):
        message = OutputParser.parse(case.text[:end], case.tools, case.thinking, case.policy, **dict(case.options))  # type: ignore[arg-type]
        for call in message.tool_calls:
            assert is_json_object(call.arguments) is call.complete, end
            assert call.complete or call.arguments[:1] == "{"
            assert "DSML" not in call.name
            if not call.complete:
                assert call is message.tool_calls[-1]
                ended_parameters(call.arguments)


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@all_cases
def test_events_are_well_nested(case: Case):
    events, notes = run(case, list(range(len(case.text))))
    message = assemble(events, notes)
    starts = [e for e in events if type(e).__name__ == "ToolCallStart"]
    ends = [e for e in events if type(e).__name__ == "ToolCallEnd"]
    assert [e.index for e in starts] == list(range(len(message.tool_calls)))
    assert [e.index for e in ends] == [i for i, call in enumerate(message.tool_calls) if call.complete]
