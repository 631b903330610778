"""The chat hooks of the SGLang adapter without a server: every cut of a stream gives the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from scripted_sglang import CHAT, ENDED, Endpoints, Said, chat_streamed, put_hooks
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.platforms import current_platform

from dsv32_plugin.parsers.protocol import THINK_END
from dsv32_plugin.sglang_adapter import hooks, upstream

pytestmark = pytest.mark.engine

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="true">a < b</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)
# Text, whether it was asked to think, and what must come of it: reasoning, content, calls.
ANSWERS = [
    pytest.param("Plain <b>.", False, ("", "Plain <b>.", []), id="content"),
    pytest.param(f"I think.{THINK_END}So.", True, ("I think.", "So.", []), id="reasoning"),
    pytest.param("I think <", True, ("I think <", "", []), id="cut-off-reasoning"),
    pytest.param(f"Hm.{THINK_END}Ask:{CALL}", True, ("Hm.", "Ask:", ['{"x": "a < b"}']), id="reasoning-and-call"),
    pytest.param(f"Hm.{CALL}", True, ("Hm.", "", ['{"x": "a < b"}']), id="call-in-unclosed-reasoning"),
    pytest.param(CALL + CALL, False, ("", "", ['{"x": "a < b"}'] * 2), id="two-blocks"),
    pytest.param("It is a <", False, ("", "It is a <", []), id="what-looks-like-markup"),
    pytest.param(CALL[: CALL.index("b<") + 1], False, ("", "", ['{"x": "a < b']), id="cut-off-call"),
]


@pytest.fixture
def endpoints(monkeypatch: pytest.MonkeyPatch) -> Endpoints:
    put_hooks(monkeypatch)
    return Endpoints(monkeypatch)


def make_body(thinking: bool, **options: Any) -> dict[str, Any]:
    return CHAT.body([TOOL["function"]], "auto") | {"chat_template_kwargs": {"thinking": thinking}, **options}


def parts(said: Said) -> tuple[str, str, list[str]]:
    """Reasoning, content and the arguments of each call."""
    return said.reasoning, said.content, [arguments for _, arguments in said.calls]


@pytest.mark.parametrize(("text", "thinking", "expected"), ANSWERS)
def test_every_cut_of_a_stream(
    endpoints: Endpoints, text: str, thinking: bool, expected: tuple[str, str, list[str]]
) -> None:
    everywhere = list(range(1, len(text)))
    cuts = [everywhere, [], *([cut] for cut in everywhere)]
    body = make_body(thinking, stream=True, n=len(cuts))
    answer = endpoints.ask(CHAT.path, body, *[(text, ENDED)] * len(cuts), cuts=cuts)
    for index, cut in enumerate(cuts):
        assert parts(chat_streamed(answer, index)) == expected, f"cut at {cut}"


def test_reasoning_can_be_said_at_once(endpoints: Endpoints) -> None:
    body = make_body(True, stream=True, stream_reasoning=False)
    said = CHAT.said(endpoints, body, (f"I think.{THINK_END}So.", ENDED))
    assert parts(said) == ("I think.", "So.", [])


@pytest.mark.parametrize(("text", "thinking", "expected"), ANSWERS)
def test_a_whole_answer(endpoints: Endpoints, text: str, thinking: bool, expected: tuple[str, str, list[str]]) -> None:
    said = CHAT.said(endpoints, make_body(thinking), (text, ENDED))
    assert parts(said) == expected
    whole = bool(expected[2]) and expected[2][-1].endswith("}")
    assert said.finish == ("tool_calls" if whole else "stop")


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False}}, False),
    ],
)
def test_who_thinks(endpoints: Endpoints, options: dict[str, Any], thinks: bool) -> None:
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}], **options)
    assert endpoints.chat._get_reasoning_from_request(request) is thinks


def is_in(release: str, releases: str) -> bool:
    """Whether a cell of the page means it: `all`, `0.5.15`, `to 0.5.21`, `from 0.5.16`, `0.5.16 to 0.5.21`."""
    first, _, last = releases.removeprefix("from ").partition("to ")
    if releases == "all" or not releases.startswith(("0", "to ", "from ")):
        return releases == "all"
    if "to " not in releases:
        last = "" if releases.startswith("from ") else first
    low, high, here = (tuple(int(part) for part in text.split(".") if part.strip()) for text in (first, last, release))
    return low <= here and (not high or here <= high)


@pytest.mark.parametrize(
    ("releases", "of"),
    [
        ("all", [15, 18, 23]),
        ("0.5.15", [15]),
        ("to 0.5.18", [15, 18]),
        ("from 0.5.18", [18, 23]),
        ("0.5.16 to 0.5.21", [18]),
        ("why", []),
    ],
)
def test_a_cell_of_the_page_names_releases(releases: str, of: list[int]) -> None:
    assert [patch for patch in (15, 18, 23) if is_in(f"0.5.{patch}", releases)] == of


def test_the_page_of_patches_names_every_hook() -> None:
    """For the release that is installed here."""
    page = (Path(__file__).parent.parent / "docs" / "patches.md").read_text(encoding="utf-8")
    page = page.partition("\n## SGLang\n")[2].partition("\n## vLLM's endpoints\n")[0]
    if not current_platform.is_out_of_tree():
        page = page.partition("Only without a GPU")[0]
    release = upstream.installed_version().partition(".post")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| `")]
    rows = {target.strip("`") for _, target, releases, *_ in cells if is_in(release, releases)}
    wanted = [*hooks.of_process(), *hooks.of_drafts()]
    assert {hook.target.removeprefix("sglang.") for hook in wanted} == rows
