"""The command-line agents: how each is configured for the server, run once, and told to go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 400


class Agent:
    """One agent in a folder of its own, which is its home, too: nothing of the user's is read or sent."""

    command: str
    limit = "max_tokens"
    """The request's name for the longest answer."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.env: dict[str, str] = {}
        self.work = self.folder / "work"
        self.mcp_calls = self.folder / "mcp-calls"
        self.mcp_server = [sys.executable, str(Path(__file__).parent / "mcp_server.py"), str(self.mcp_calls)]
        self.work.mkdir()
        subprocess.run(["git", "init", "-q", str(self.work)], check=True)
        self.configure()

    def configure(self) -> None:
        """Write the agent's settings, with the MCP server `sums` among them."""

    def arguments(self, ask: str, goes_on: bool) -> list[str]:
        """Of the command."""
        raise NotImplementedError

    def run(self, ask: str, *, goes_on: bool = False) -> str:
        """Everything that it prints; `goes_on` keeps to the last conversation."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "TERM": "dumb", "NO_COLOR": "1", **self.env}
        process = subprocess.run(
            [shutil.which(self.command) or self.command, *self.arguments(ask, goes_on)],
            cwd=self.work,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        return process.stdout + process.stderr

    def shell(self, command: str) -> str:
        """The mark that has the model run this command."""
        raise NotImplementedError

    def write(self, path: Path, content: str) -> str:
        """The mark that has the model write this file."""
        raise NotImplementedError

    def add(self) -> str:
        """The marks that have the model call the MCP server's tool."""
        return mark("add", a=2, b=3)

    def _mcp_command(self) -> dict[str, Any]:
        return {"command": self.mcp_server[0], "args": self.mcp_server[1:]}

    def _settings(self, path: str, content: Any) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


def mark(tool: str, **arguments: Any) -> str:
    return f"[[call {tool} {json.dumps(arguments)}]]"


class Codex(Agent):
    """Codex CLI, over Responses."""

    command = "codex"
    limit = "max_output_tokens"

    def configure(self) -> None:
        self._settings(
            ".codex/config.toml",
            f"""
model = "tiny"
model_provider = "local"
model_reasoning_effort = "high"
model_context_window = 40000
approval_policy = "never"
sandbox_mode = "danger-full-access"

[model_providers.local]
name = "local"
base_url = "{self.url}/v1"
wire_api = "responses"

[mcp_servers.sums]
command = {json.dumps(self.mcp_server[0])}
args = {json.dumps(self.mcp_server[1:])}
required = true # the first request waits for its tools
startup_timeout_sec = 60
""",
        )

    def arguments(self, ask: str, goes_on: bool) -> list[str]:
        return ["exec", *(["resume", "--last"] if goes_on else []), "--skip-git-repo-check", ask]

    def shell(self, command: str) -> str:
        return mark("exec_command", cmd=command)

    def write(self, path: Path, content: str) -> str:
        return mark("exec_command", cmd=f"echo '{content}' > {path}")


class ClaudeCode(Agent):
    """Claude Code, over Messages."""

    command = "claude"

    def configure(self) -> None:
        self._settings("mcp.json", {"mcpServers": {"sums": self._mcp_command()}})
        self.env = {
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_AUTH_TOKEN": "none",
            "ANTHROPIC_MODEL": "tiny",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "tiny",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4000",
            "MAX_THINKING_TOKENS": "2000",
            # So that the MCP server's tools are there at the first request, and not behind a search.
            "MCP_CONNECTION_NONBLOCKING": "0",
            "MCP_CONNECT_TIMEOUT_MS": "60000",
            "ENABLE_TOOL_SEARCH": "false",
        }

    def arguments(self, ask: str, goes_on: bool) -> list[str]:
        allowed = ["--allowedTools", "Bash", "Write", "Read", "mcp__sums"]
        return ["-p", ask, *(["-c"] if goes_on else []), "--mcp-config", str(self.folder / "mcp.json"), *allowed]

    def shell(self, command: str) -> str:
        return mark("Bash", command=command, description="as asked")

    def write(self, path: Path, content: str) -> str:
        return mark("Write", file_path=str(path), content=content)


class Opencode(Agent):
    """opencode, over chat completions."""

    command = "opencode"

    def configure(self) -> None:
        model = {"name": "tiny", "tool_call": True, "reasoning": True, "limit": {"context": 40000, "output": 4000}}
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": f"{self.url}/v1", "apiKey": "none"},
            "models": {"tiny": model},
        }
        self._settings(
            "work/opencode.json",
            {
                "provider": {"local": provider},
                "model": "local/tiny",
                "small_model": "local/tiny",
                "autoupdate": False,
                "mcp": {"sums": {"type": "local", "command": self.mcp_server}},
            },
        )
        self.env = {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}

    def arguments(self, ask: str, goes_on: bool) -> list[str]:
        # It puts quotation marks around an argument of several words, and backslashes before those in it.
        return ["run", *(["--continue"] if goes_on else []), "--", *ask.split(" ")]

    def shell(self, command: str) -> str:
        return mark("bash", command=command, description="as asked")

    def write(self, path: Path, content: str) -> str:
        return mark("write", filePath=str(path), content=content)


class QwenCode(Agent):
    """Qwen Code, over chat completions."""

    command = "qwen"

    def configure(self) -> None:
        self._settings(
            ".qwen/settings.json",
            {
                "security": {"auth": {"selectedType": "openai"}},
                "telemetry": {"enabled": False},
                "privacy": {"usageStatisticsEnabled": False},
                "mcpServers": {"sums": self._mcp_command()},
                "general": {"disableAutoUpdate": True, "disableUpdateNag": True},
            },
        )
        self.env = {"OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": "tiny"}

    def arguments(self, ask: str, goes_on: bool) -> list[str]:
        return ["-p", ask, "--approval-mode", "yolo", *(["--continue"] if goes_on else [])]

    def shell(self, command: str) -> str:
        return mark("run_shell_command", command=command, is_background=False)

    def write(self, path: Path, content: str) -> str:
        return mark("write_file", file_path=str(path), content=content)

    def add(self) -> str:
        return mark("tool_search", query="select:mcp__sums__add") + "[[then]]" + super().add()


AGENTS = {"codex": Codex, "claude": ClaudeCode, "opencode": Opencode, "qwen": QwenCode}
