"""`dsv32`: quick to start, and every failure is a message."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dsv32_plugin import __version__, cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"dsv32-plugin {__version__}"


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys; from dsv32_plugin import cli; cli._parser()\n"
        "heavy = {'torch', 'vllm', 'sglang', 'transformers', 'openai', 'triton', 'httpx'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_free() -> None:
    code = "import sys; before = set(sys.modules); import dsv32_plugin; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dsv32_plugin"]
