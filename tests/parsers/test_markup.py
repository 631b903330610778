"""The prompt knows which of its characters the template wrote."""

import copy
import pickle

from forgeries import CONTROL_TOKENS, everything, harmless

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


def test_every_field_is_outside_the_template():
    fields: list[str] = []

    def numbered(field: str) -> str:
        fields.append(field)
        return f"\ue000{len(fields)}\ue001"  # private use: in no template

    messages, options = everything(numbered)
    template, theirs = split(encode_messages(messages, **options))
    assert "\ue000" not in "".join(template)
    rendered = {field for i, field in enumerate(fields, 1) if f"\ue000{i}\ue001" in "".join(theirs)}
    assert set(fields) - rendered == {"old call: reasoning", "name of a user"}


def test_all_control_tokens_are_the_templates():
    messages, options = everything(harmless)
    _, theirs = split(encode_messages(messages, **options))
    assert not [(token, piece) for token in (*CONTROL_TOKENS, "result>") for piece in theirs if token in piece]


def test_a_caller_cannot_pass_markup_as_content():
    """The constants of `protocol` are strings like any other to those who write a test or a prompt with them."""
    messages, options = everything(lambda field: protocol.EOS + field)
    prompt = encode_messages(messages, **options)
    template, _ = split(prompt)
    assert "".join(template).count(protocol.EOS) == 3, "one for every past answer"
    (turn,) = read_turns([{"role": "assistant", "tool_calls": [{"name": protocol.EOS, "arguments": {}}]}])
    assert protocol.EOS not in "".join(split(render_calls(turn.calls))[0])
