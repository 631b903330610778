"""The command `dsv32`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dsv32_plugin import __version__
from dsv32_plugin.benchmarks import cli as bench
from dsv32_plugin.console import CommandError
from dsv32_plugin.core.config import ConfigError
from dsv32_plugin.tools import check, demo, doctor, plan, render_parse, tiny
from dsv32_plugin.training import command as train

FAILED = 2
"""Exit status of a command that could not do what was asked (argparse uses it too)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.handler(arguments)
    except (CommandError, ConfigError) as error:
        print(f"dsv32 {arguments.command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    """Nothing imported here imports torch or an engine: handlers do that when they run."""
    parser = argparse.ArgumentParser(prog="dsv32", description="Serve DeepSeek-V3.2 with stock vLLM and SGLang.")
    parser.add_argument("--version", action="version", version=f"dsv32-plugin {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (check, demo, doctor, plan, tiny, train, bench):
        module.add_command(subparsers)
    render_parse.add_commands(subparsers)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
