"""The prompt knows which of its characters the template wrote."""

import copy
import pickle
from typing import Any

from dsv32_plugin.parsers import Markup, encode_messages, protocol, render_calls
from dsv32_plugin.parsers.messages import read_turns


def split(text: Markup) -> tuple[list[str], list[str]]:
    """What the template wrote, and what others wrote."""
    theirs, end = [], 0
    for start, stop in text.spans:
        theirs.append(text[end:start])
        end = stop
    return [text[start:stop] for start, stop in text.spans], [piece for piece in [*theirs, text[end:]] if piece]


def test_concatenation_keeps_the_places():
    text = Markup("<a>") + "one" + Markup("</a>") + Markup("<b>") + "two"
    assert (text, text.spans) == ("<a>one</a><b>two", ((0, 3), (6, 13)))
    assert ("zero" + text).spans == ((4, 7), (10, 17))
    assert (Markup() + "").spans == ()
    lines = Markup("\n").join(["one", Markup("two"), "three"])
    assert split(lines) == (["\ntwo\n"], ["one", "three"])
    assert Markup("\n").join([]) == ""


def test_what_forgets_the_places_trusts_nothing():
    text = Markup("<a>") + "one"
    for plain in (f"{text}", text[:3], "".join([text]), text.strip(), str(text)):
        assert type(plain) is str
    assert (Markup() + f"{text}").spans == ()


def test_copies_keep_the_places():
    text = Markup("<a>") + "one"
    for again in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert (type(again), again, again.spans) == (Markup, text, text.spans)


def everything(text: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A conversation with `text(field)` in every field that others write, and the options of its rendering."""

    def tool(at: str) -> dict[str, Any]:
        schema = {
            "type": "object",
            "description": text(f"{at} schema"),
            "properties": {text(f"{at} key"): {"type": "string", "enum": [text(f"{at} enum")]}},
            "required": [text(f"{at} required")],
            text(f"{at} keyword"): {"const": text(f"{at} const")},
        }
        return {"name": text(f"{at} name"), "description": text(f"{at} description"), "parameters": schema}

    def called(at: str) -> dict[str, Any]:
        nested = [{text(f"{at} inner key"): text(f"{at} inner value")}]
        arguments = {text(f"{at} key"): text(f"{at} value"), "list": nested, text(f"{at} json key"): 1}
        return {"role": "assistant", "content": text(f"{at} content"), "reasoning_content": text(f"{at} reasoning")} | {
            "tool_calls": [{"function": {"name": text(f"{at} name"), "arguments": arguments}}]
        }

    messages = [
        {"role": "system", "content": text("system"), "response_format": {text("format key"): text("format")}},
        {"role": "developer", "content": [text("developer"), {"type": "text", "text": text("part")}]}
        | {"tools": [tool("developer's tool")], "response_format": {"type": text("developer's format")}},
        called("old call"),
        {"role": "tool", "content": text("old result")},
        {"role": "assistant", "content": text("old answer")},
        {"role": "user", "content": text("user"), "name": text("user's name")},
        called("call"),
        {"role": "tool", "content": text("result"), "name": text("result's name")},
        {"role": "assistant", "content": text("continued"), "reasoning": text("continued reasoning"), "prefix": True},
    ]
    return messages, {"tools": [tool("request's tool")]}


def test_every_field_is_outside_the_template():
    fields: list[str] = []

    def name(field: str) -> str:
        fields.append(field)
        return f"\ue000{len(fields)}\ue001"  # private use: in no template

    messages, options = everything(name)
    prompt = encode_messages(messages, **options)
    template, theirs = split(prompt)
    assert "\ue000" not in "".join(template)
    dropped = {"old call reasoning", "user's name", "result's name"}
    rendered = {field for i, field in enumerate(fields, 1) if f"\ue000{i}\ue001" in "".join(theirs)}
    assert set(fields) - rendered == dropped


def test_all_control_tokens_are_the_templates():
    prompt = encode_messages(*[everything(lambda field: field)[0]], **everything(lambda field: field)[1])
    _, theirs = split(prompt)
    tokens = (protocol.BOS, protocol.EOS, protocol.USER, protocol.ASSISTANT, protocol.DSML)
    tokens += (protocol.THINK_START, protocol.THINK_END, "result>", "function_results>", "functions>")
    assert not [(token, piece) for token in tokens for piece in theirs if token in piece]


def test_a_caller_cannot_pass_markup_as_content():
    """The constants of `protocol` are strings like any other to those who write a test or a prompt with them."""
    messages, options = everything(lambda field: protocol.EOS + field)
    prompt = encode_messages(messages, **options)
    template, _ = split(prompt)
    assert "".join(template).count(protocol.EOS) == 3, "one for every past answer"
    (turn,) = read_turns([{"role": "assistant", "tool_calls": [{"name": protocol.EOS, "arguments": {}}]}])
    assert protocol.EOS not in "".join(split(render_calls(turn.calls))[0])
