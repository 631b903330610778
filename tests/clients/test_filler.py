"""Recordings: what is left out of a request, and what is not."""

from __future__ import annotations

import json

import answers
import filler
import pytest


def test_texts_become_lengths_and_come_back_as_long() -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Tell nobody of the lake."}]}],
        "tools": [{"name": "f", "description": "Does it.", "parameters": {"required": ["x"], "type": "object"}}],
        "tool_choice": "auto",
    }
    blanked = filler.blank(body)
    assert "lake" not in json.dumps(blanked)
    assert blanked["messages"] == [{"role": "user", "content": [{"type": "text", "text": "⟨24⟩"}]}]
    assert blanked["tools"] == [{**body["tools"][0], "description": "⟨8⟩"}]
    assert blanked["tool_choice"] == "auto"
    assert len(json.dumps(filler.fill(blanked))) == len(json.dumps(body))


def test_the_marks_stay() -> None:
    text = 'First [[call f {"x": "a b [c]"}]] [[then]] and [[say so it is]].'
    blanked = filler.blank({"content": text})["content"]
    assert blanked == '⟨6⟩[[call f {"x": "a b [c]"}]]⟨1⟩[[then]]⟨5⟩[[say so it is]]⟨1⟩'
    assert len(filler.fill(blanked)) == len(text)


def test_arguments_stay_json() -> None:
    arguments = filler.blank({"arguments": json.dumps({"text": "My own text.", "n": 12})})["arguments"]
    assert json.loads(arguments) == {"text": "⟨12⟩", "n": 12}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n', id="chat-streamed"),
        pytest.param('{"choices": [{"message": {"content": "Hi"}}]}', id="chat"),
        pytest.param('{"type": "message", "content": [{"type": "text", "text": "Hi"}]}', id="messages"),
    ],
)
def test_answers_are_read(body: str) -> None:
    assert answers.read(body) == answers.Answer("Hi", [])
