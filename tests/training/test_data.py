"""Tokenizer, tasks and batches: what the model reads is what the encoder renders, and answers can be found in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch

from dsv32_plugin.parsers import OutputParser, encode_messages, protocol
from dsv32_plugin.training import tasks, tokenizer
from dsv32_plugin.training.data import Rows, answer_mask, batches, row
from dsv32_plugin.training.tasks import Conversation

KINDS: dict[str, Callable[[Random], Conversation]] = {
    "needles": lambda random: tasks.needles(random, 5, 3),
    "copying": tasks.copying,
    "addition": tasks.addition,
    "tool use": tasks.tool_use,
    "greeting": tasks.greeting,
}
SEEDS = range(20)


class TestTokenizer:
    @pytest.mark.parametrize("text", ["", "abc 12\n\n", "ü€𝄞\0\x7f", "</thin", "｜DSML", "a" * 5000])
    def test_text_is_its_bytes(self, text: str) -> None:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text

    @pytest.mark.parametrize("piece", [*tokenizer.SPECIAL, *tokenizer.WORDS])
    def test_a_piece_is_one_token(self, piece: str) -> None:
        before, (id,), after = (tokenizer.encode(text) for text in ("x", piece, "y"))
        assert tokenizer.encode(f"x{piece}y") == [*before, id, *after]
        assert tokenizer.decode([id]) == piece

    def test_tokens_are_built_as_in_the_real_vocabulary(self) -> None:
        """The mark is one token, flagged special, and a tag is brackets, the mark and words."""
        start, end = (tokenizer.encode(tag) for tag in (protocol.CALLS_START, protocol.PARAMETER_END))
        assert [tokenizer.decode([id]) for id in start] == ["<", protocol.DSML, "function_calls", ">"]
        assert [tokenizer.decode([id]) for id in end] == ["<", "/", protocol.DSML, "parameter", ">"]
        without = tokenizer.tokenizer().decode(start, skip_special_tokens=True)
        assert without == "<function_calls>", "which an engine does where nobody asks it not to"
        assert all(not set(word) & set("<>｜") for word in tokenizer.WORDS)

    def test_ids(self) -> None:
        assert tokenizer.encode(protocol.BOS + protocol.EOS) == [0, 1], "as in the real vocabulary"
        marks = protocol.USER + protocol.ASSISTANT + protocol.THINK_START + protocol.THINK_END
        assert tokenizer.encode(marks) == [
            tokenizer.USER_ID,
            tokenizer.ASSISTANT_ID,
            tokenizer.THINK_START_ID,
            tokenizer.THINK_END_ID,
        ]

    def test_the_prose_of_the_tools_block_is_short(self) -> None:
        """It must leave the context to the schemas."""
        head = protocol.TOOLS_HEAD + protocol.TOOLS_TAIL
        assert len(tokenizer.encode(head)) < 0.2 * len(head)

    def test_transformers_reads_it(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        tokenizer.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for seed in SEEDS:
            text = tasks.chat(Random(seed)).text()
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def spans(text: str) -> list[str]:
    """The pieces of a rendered conversation that the answer mask covers."""
    ids = tokenizer.encode(text)
    mask = answer_mask(torch.tensor([ids]))[0].tolist()
    found: list[list[int]] = []
    for i, (id, inside) in enumerate(zip(ids, mask, strict=True)):
        if inside and not mask[i - 1]:
            found.append([])
        if inside:
            found[-1].append(id)
    return [tokenizer.decode(span) for span in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
class TestConversations:
    def test_the_mask_covers_what_the_assistant_says(self, kind: str, seed: int) -> None:
        conversation = KINDS[kind](Random(seed))
        turns = sum(message["role"] == "assistant" for message in conversation.messages)
        said = spans(conversation.text())
        assert len(said) == turns
        prompt, last = conversation.cut(-1)
        assert said[-1] == last
        assert prompt + last == conversation.text()

    def test_the_last_answer_parses_back(self, kind: str, seed: int) -> None:
        conversation = KINDS[kind](Random(seed))
        prompt, answer = conversation.cut(-1)
        thinking = prompt.endswith(protocol.THINK_START)
        message = OutputParser.parse(answer.removesuffix(protocol.EOS), conversation.tools or None, thinking)
        assert not message.notes
        assert message.content == conversation.messages[-1]["content"]
        assert message.reasoning == (conversation.messages[-1]["reasoning_content"] if thinking else "")


@pytest.mark.parametrize("seed", SEEDS)
def test_calls_are_typed_as_their_schema_says(seed: int) -> None:
    conversation = tasks.tool_use(Random(seed), 1)
    prompt, answer = conversation.cut(0)
    thinking = prompt.endswith(protocol.THINK_START)
    message = OutputParser.parse(answer.removesuffix(protocol.EOS), conversation.tools, thinking)
    (call,) = message.tool_calls
    wanted = conversation.messages[-3]["tool_calls"][0]["function"]
    assert call.name == wanted["name"]
    assert json.loads(call.arguments) == wanted["arguments"]
    schema = next(t["function"] for t in conversation.tools if t["function"]["name"] == call.name)["parameters"]
    types = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "array": list}
    for name, value in wanted["arguments"].items():
        assert isinstance(value, types[schema["properties"][name]["type"]])
    said = next(message["content"] for message in conversation.messages if message["role"] == "user")
    for value in wanted["arguments"].values():
        for part in value if isinstance(value, list) else [value]:
            assert isinstance(part, bool) or str(part) in said, "arguments are taken from the sentence"


@pytest.mark.parametrize("tokens", [128, 512, 1000, 4096])
@pytest.mark.parametrize("questions", [None, 1])
def test_needles_fill_the_context_and_no_more(tokens: int, questions: int | None) -> None:
    for seed in SEEDS:
        used = len(tokenizer.encode(tasks.needles_of(Random(seed), tokens, questions).text()))
        assert 0.5 * tokens - 50 < used <= tokens


def test_additions_are_right_and_the_held_out_ones_are_kept_apart() -> None:
    for seed in range(200):
        for evaluation in (False, True):
            question, answer = tasks.addition(Random(seed), evaluation=evaluation).messages
            a, b = map(int, question["content"].split("+"))
            assert answer["content"] == str(a + b)
            assert tasks.held_out(a, b) is evaluation


def test_addition_steps() -> None:
    assert tasks.steps(48, 175) == "8+5+0=13, 4+7+1=12, 0+1+1=2"
    assert tasks.steps(0, 0) == "0+0+0=0"


def test_a_text_is_the_encoders() -> None:
    conversation = tasks.tool_use(Random(1), 1)
    expected = encode_messages(conversation.messages, thinking_mode=conversation.mode, tools=conversation.tools)
    assert conversation.text() == expected


def test_rows_have_their_length() -> None:
    for seed in SEEDS:
        assert len(row(Random(seed), 256, 0.5)) == 256


def test_batches_do_not_depend_on_the_workers() -> None:
    alone, shared = (list(islice(batches(Rows(7, 2, 128, 0.5), workers), 5)) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], next(iter(Rows(8, 2, 128, 0.5))))
    later = next(batches(Rows(7, 2, 128, 0.5, first=3), 2))
    assert torch.equal(later, alone[3]), "as after a resume"
