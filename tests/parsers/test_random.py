"""The guarantees on random outputs: 5,000 here, by a fixed seed; `DSV32_RANDOM_OUTPUTS` asks for more."""

import json
import os
import random
import re

import pytest
from parser_cases import EOS, TOOLS
from random_outputs import Output, random_output

from dsv32_plugin.parsers import Event, Message, OutputParser, assemble, encode_messages, ended_parameters, merge

COUNT = int(os.environ.get("DSV32_RANDOM_OUTPUTS", "5000"))
SEEDS = 10


def parse(output: Output, cuts: list[int], text: str | None = None, ended: bool | None = None):
    text = output.text if text is None else text
    parser = OutputParser(**{"tools": TOOLS, **output.options})
    events: list[Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        events += parser.feed(text[start:end])
    events += parser.finish(ended=output.ended if ended is None else ended)
    return merge(events), parser.notes


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def check(output: Output, rng: random.Random) -> None:
    events, notes = parse(output, [])
    message = assemble(events, notes)
    check_cuts(output, rng, events, notes)
    check_calls(message)
    check_nothing_is_lost(output, message)
    if output.options.get("policy") != "strict" and not output.text.endswith(EOS):
        with_eos, without = parse(output, [], output.text + EOS), parse(output, [], ended=True)
        assert with_eos == without, "EOS says that the model ended its turn"


def check_cuts(output: Output, rng: random.Random, events: list[Event], notes: tuple) -> None:
    every = list(range(len(output.text)))
    some = sorted(rng.choices(range(len(output.text) + 1), k=rng.randrange(1, 9)))
    for cuts in (some, every):
        assert parse(output, cuts) == (events, notes), f"cut at {cuts}"


def check_calls(message: Message) -> None:
    for call in message.tool_calls:
        assert call.name
        assert not re.search(r"[<>]|[|｜‖] ?DSML", call.name)
        assert is_json_object(call.arguments) is call.complete
        if not call.complete:
            assert call is message.tool_calls[-1]
            assert call.arguments.startswith("{")
            ended_parameters(call.arguments)
    encode_messages([{"role": "user", "content": "u"}, message.to_openai(), {"role": "user", "content": "u"}])


def check_nothing_is_lost(output: Output, message: Message) -> None:
    over = [note.offset for note in message.notes if note.code == "next_turn"]
    said = message.reasoning + message.content + "".join(call.name + call.arguments for call in message.tool_calls)
    said += "".join(note.detail for note in message.notes if note.code == "truncated_markup")
    for mark in output.marks:
        at = output.text.find(mark)
        assert at < 0 or mark in said or (over and at > over[0]), f"{mark!r} is lost"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_outputs(seed: int):
    rng = random.Random(seed)
    for _ in range(COUNT // SEEDS):
        output = random_output(rng)
        try:
            check(output, rng)
        except Exception as error:
            raise AssertionError(f"{error}\n{output}") from error
