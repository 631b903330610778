"""`dsv32 demo` against a stand-in for vLLM: what it asks, what it prints, and that it always stops the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsv32_plugin import cli
from dsv32_plugin.tools import demo, serving

FAKE = Path(__file__).parent / "fake_vllm"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_VLLM_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("FAKE_VLLM_REQUESTS", str(tmp_path / "requests"))
    monkeypatch.delenv("DSV32_PLUGIN", raising=False)
    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    monkeypatch.setattr(serving, "_STOP_SECONDS", 1.0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


def running(tmp_path: Path) -> list[int]:
    """Which processes of the stand-in are still there."""
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 5  # an orphan's death is reported by init, a moment later
    while pids and time.monotonic() < deadline:
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists() and " Z " not in _stat(pid)]
        time.sleep(0.02)
    return pids


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return " Z "


def requests(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]


def test_the_whole_story(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAINED", Path(model))
    assert cli.main(["demo", "--max-tokens", "7", "--", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "--dtype float32" in printed
    assert "--seed 3" in printed
    for part in ("hm\n", 'get_weather{"city": "Hangzhou", "days": 3}\n', "In Hangzhou: rain, 17 degrees.\n"):
        assert part in printed
    assert "5 prompt tokens, first token after" in printed
    assert "3 tokens in" in printed
    assert "DeepseekV32ForCausalLM with dsv32-plugin" in printed
    assert "vllm serve deepseek-ai/DeepSeek-V3.2" in printed
    assert running(tmp_path) == []

    needle, question, result = requests(tmp_path)
    assert len(needle["messages"][0]["content"]) > 3800
    assert needle["chat_template_kwargs"] == {"thinking": False}
    assert question["chat_template_kwargs"] == result["chat_template_kwargs"] == {"thinking": True}
    assert "get_weather" in [tool["function"]["name"] for tool in question["tools"]]
    assert [message["role"] for message in result["messages"]] == ["user", "assistant", "tool"]
    assert result["messages"][1]["reasoning"] == "hm"
    call = result["messages"][1]["tool_calls"][0]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Hangzhou", "days": 3}'}
    assert result["messages"][2]["tool_call_id"] == call["id"]
    assert all(request["max_tokens"] == 7 and request["stream"] is True for request in (needle, question, result))


def test_a_wrong_answer_of_the_trained_model_is_a_failure(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "nonsense")
    monkeypatch.setattr(demo, "TRAINED", Path(model))
    assert cli.main(["demo"]) == 2
    captured = capsys.readouterr()
    assert "the trained model answered, but not right: expected " in captured.err
    assert "expected a call of get_weather, got 'rain" in captured.err
    assert "rain\N{REPLACEMENT CHARACTER}[31m" in captured.out, "no control characters reach the terminal"
    assert running(tmp_path) == []


def test_a_model_of_the_users_own_may_answer_what_it_likes(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "nonsense")
    assert cli.main(["demo", "--model", model]) == 0
    assert len(requests(tmp_path)) == 2, "without a call there is no result to answer from"


def test_two_at_once_do_not_meet(tmp_path: Path, model: str) -> None:
    """They wrote to one log, where each found what the other's server said."""
    program = (
        "import sys; from dsv32_plugin import cli; from dsv32_plugin.tools import demo; demo.find_spec = str\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "demo", "--model", model]
    running_now = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in running_now]
    assert [process.returncode for process in running_now] == [0, 0], printed
    ports = {line for text in printed for line in text.splitlines() if line.startswith("server")}
    assert len(ports) == 2
    assert list((tmp_path / "cache" / "dsv32").iterdir()) == [], "what went well leaves nothing"
    assert running(tmp_path) == []


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        pytest.param("dies", "Device string must not be empty", id="the-server-ends"),
        pytest.param("never-ready", "was not ready after", id="the-server-never-answers"),
        pytest.param("refuses", "the server refused the chat", id="the-chat-is-refused"),
        pytest.param("no-token", "ended its answer without a token", id="an-empty-answer"),
        pytest.param("in-tree", "not through the plugin", id="vllm-runs-its-own-code"),
    ],
)
def test_what_can_go_wrong(
    tmp_path: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    message: str,
) -> None:
    monkeypatch.setenv("FAKE_VLLM", mode)
    monkeypatch.setattr(demo, "START_SECONDS", 2 if mode == "never-ready" else 30)
    assert cli.main(["demo", "--model", model]) == 2
    assert message in capsys.readouterr().err
    assert running(tmp_path) == []


def test_switched_off_is_said(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FAKE_VLLM", "dies")
    monkeypatch.setenv("DSV32_PLUGIN", "0")
    assert cli.main(["demo", "--model", model]) == 2
    assert "DSV32_PLUGIN=0 switches the plugin off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(signal.SIGINT, 130, id="ctrl-c"), pytest.param(signal.SIGTERM, 143, id="sigterm")],
)
@pytest.mark.parametrize("mode", ["never-ready", "ignores-sigterm"])
def test_an_interrupted_demo_leaves_nothing_behind(
    tmp_path: Path, model: str, number: signal.Signals, status: int, mode: str
) -> None:
    code = (
        "import sys; from dsv32_plugin import cli; from dsv32_plugin.tools import demo, serving\n"
        "serving._STOP_SECONDS = 1.0\n"
        "demo.find_spec = str; demo._conversations = lambda *args: __import__('time').sleep(600)\n"
        f"sys.exit(cli.main(['demo', '--model', {model!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "FAKE_VLLM": mode},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell's background jobs, these tests for one, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(number)
    assert process.wait(20) == status
    assert running(tmp_path) == []


def test_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'dsv32-plugin[vllm]'" in capsys.readouterr().err


def test_a_wrong_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model", "/nowhere"]) == 2
    assert "--model: expected a checkpoint folder with a config.json, got /nowhere" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_with_the_real_engine(engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained model must answer right: a wrong answer is an error of the command."""
    pytest.importorskip(engine)
    monkeypatch.delenv("PYTHONPATH")
    assert cli.main(["demo", "--engine", engine]) == 0
    printed = capsys.readouterr().out
    assert "DeepseekV32ForCausalLM with dsv32-plugin" in printed
    assert 'get_weather{"city": "Hangzhou", "days": 3}' in printed
