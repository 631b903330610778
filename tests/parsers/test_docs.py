"""docs/parsing.md is the written table: every note has its row, and the examples are true."""

import re
from pathlib import Path

from parser_cases import CASES, TOOLS

from dsv32_plugin.parsers import OutputParser, encode_messages

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "parsing.md").read_text(encoding="utf-8")
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "parsers" / "src").glob("*.py"))
CODES = set(re.findall(r'(?:_note|repairs\.add)\(\s*"([a-z_]+)"', SOURCES)) | {"no_string_attribute", "spelling"}
CODES |= {"stray_end_tag", "repeated_start_tag"}


def test_every_note_has_a_row():
    table = PAGE[PAGE.index("## Damage") : PAGE.index("## Compared")]
    assert sorted(code for code in CODES if f"`{code}`" not in table) == []


def test_every_row_has_a_case():
    seen = {note for case in CASES for note in case.notes}
    assert sorted(CODES - seen - {"layout"}) == []  # `layout` is strict only, see test_completion


def test_the_example_output_is_well_formed():
    start = PAGE.index("{reasoning}</think>")
    example = PAGE[start : PAGE.index("<｜end▁of▁sentence｜>\n\n<function_results>")]
    message = OutputParser.parse(example, thinking=True)
    assert message.notes == ()
    assert message.tool_calls[0].arguments == '{"location": "Hangzhou", "days": 3}'


def test_the_example_of_rendering_runs():
    code = PAGE[PAGE.index("prompt = encode_messages(") : PAGE.index("```", PAGE.index("prompt = encode_messages("))]
    names: dict = {"encode_messages": encode_messages, "tools": TOOLS}
    exec(code, names)
    assert names["prompt"].endswith("Weather in Hangzhou?<｜Assistant｜><think>")
