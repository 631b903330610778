"""`dsv32 demo`: a stock engine with this plugin answers a chat, on whatever machine this is."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv32_plugin import __version__, settings, tiny
from dsv32_plugin.console import CommandError, stderr, stdout

if TYPE_CHECKING:
    from dsv32_plugin.serving import Server

NAME = "dsv32-demo"
START_SECONDS = 600
PARSERS = ["--tool-call-parser", "dsv32", "--reasoning-parser", "dsv32"]
COMMON_OPTIONS = ["--served-model-name", NAME, "--dtype", "float32", *PARSERS]


@dataclass(frozen=True)
class Engine:
    """How the demonstration starts an engine."""

    command: str
    server: str
    """Class in `serving`."""
    options: tuple[str, ...]
    on_gpus: str


ENGINES = {
    "vllm": Engine(
        "vllm serve",
        "VllmServer",
        (
            *("--max-model-len", "2048"),
            *("--kv-cache-memory-bytes", str(256 * 2**20)),
            "--enforce-eager",
            "--enable-auto-tool-choice",
        ),
        "vllm serve deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8 --enable-auto-tool-choice",
    ),
    "sglang": Engine(
        "sglang.launch_server",
        "SglangServer",
        ("--context-length", "2048", "--max-total-tokens", "8192"),
        "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3.2 --tp-size 8",
    ),
}
"""By their names on PyPI."""
# Nothing leaves the machine, and waiting threads leave the cores to working ones.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
RECOMMENDED = "and ask it with temperature 1.0 and top_p 0.95, as DeepSeek recommends"
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the weather in Hangzhou today, and should I take an umbrella?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "date": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


@dataclass(frozen=True)
class Figures:
    """What one streamed answer cost."""

    prompt_tokens: int
    tokens: int
    first_token_s: float
    total_s: float


def run(
    model: Path | None = None, *, engine: str | None = None, max_tokens: int = 48, options: Sequence[str] = ()
) -> None:
    """The whole demonstration; raises CommandError with the next step when a part of it fails."""
    engine = engine or next((name for name in ENGINES if find_spec(name) is not None), "vllm")
    for name in (engine, "openai"):
        if find_spec(name) is None:
            raise CommandError(f"{name} is not installed; pip install 'dsv32-plugin[{engine}]'")
    from dsv32_plugin import serving

    chosen = ENGINES[engine]
    model = model or _checkpoint()
    log_path = _cache() / f"demo-{engine}.log"
    server_class: type[Server] = getattr(serving, chosen.server)
    server = server_class(model, [*COMMON_OPTIONS, *chosen.options, *options], log_path=log_path, env=ENVIRONMENT)
    stdout.print(f"server      {' '.join(server.command)}", soft_wrap=True, markup=False)
    try:
        with _stopping_on_sigterm(), server:
            ready_s = _wait(server, chosen.command)
            stdout.print(f"ready       {ready_s:.1f} s")
            figures = _chat(f"{server.url}/v1", max_tokens)
            proof = re.search(r"dsv32: serving .*", server.log())
    except serving.ServerError as error:
        off = "" if settings.plugin_enabled() else "\nDSV32_PLUGIN=0 switches the plugin off; unset it"
        raise CommandError(f"{error}{off}\n'dsv32 doctor' says what is wrong") from error
    if proof is None:
        raise CommandError("the server answered, but not through the plugin; 'dsv32 doctor' says why")
    stdout.print(f"served by   {proof.group().removeprefix('dsv32: serving ')}", soft_wrap=True, markup=False)
    stdout.print(
        f"figures     {figures.prompt_tokens} prompt tokens, first token after {figures.first_token_s:.2f} s, "
        f"{figures.tokens} tokens in {figures.total_s:.2f} s",
        soft_wrap=True,
    )
    stdout.print("stopped     the weights are random, so is the answer; on GPUs the same is", soft_wrap=True)
    stdout.print(f"\n{chosen.on_gpus} {' '.join(PARSERS)}\n{RECOMMENDED}", soft_wrap=True, markup=False)


def _checkpoint() -> Path:
    """The tiny checkpoint in the user's cache, written if it is not there."""
    spec = tiny.TinySpec()
    key = zlib.crc32(json.dumps(spec.config()).encode())
    path = _cache() / f"tiny-{__version__}-{key:08x}"
    if not path.exists():
        with stderr.status("writing a tiny checkpoint with random weights"):
            tiny.write(spec, path)
    stdout.print(f"checkpoint  {path}", soft_wrap=True, markup=False)
    return path


def _cache() -> Path:
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv32"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _wait(server: Server, command: str) -> float:
    with stderr.status(f"{command} is starting") as status:

        def show(elapsed_s: float) -> None:
            status.update(f"{command} is starting, {elapsed_s:.0f} s; its log is {server.log_path}")

        return server.wait_until_ready(START_SECONDS, show)


def _chat(url: str, max_tokens: int) -> Figures:
    """Stream one answer to the terminal, as any OpenAI client would ask for it."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    request: dict[str, Any] = {
        "model": NAME,
        "messages": MESSAGES,
        "tools": TOOLS,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"chat_template_kwargs": {"thinking": True}},
    }
    stdout.print(f"question    {MESSAGES[-1]['content']}", soft_wrap=True, markup=False)
    stdout.print("answer      ", end="")
    started = time.monotonic()
    first_s, usage = None, None
    try:
        for chunk in client.chat.completions.create(**request):
            usage = chunk.usage or usage
            for style, text in _texts(chunk):
                first_s = first_s if first_s is not None else time.monotonic() - started
                stdout.print(_printable(text), style=style, end="", soft_wrap=True, markup=False)
    except OpenAIError as error:
        raise CommandError(f"the server refused the chat: {error}") from error
    finally:
        stdout.print()
    if first_s is None or usage is None:
        raise CommandError("the server ended its answer without a token")
    return Figures(usage.prompt_tokens, usage.completion_tokens, first_s, time.monotonic() - started)


def _texts(chunk: Any) -> Iterator[tuple[str, str]]:
    """What a chunk adds, each with its style: reasoning dim, calls in colour, the answer plain."""
    for choice in chunk.choices:
        delta = choice.delta
        reasoning = getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)
        calls = [part for call in delta.tool_calls or [] for part in (call.function.name, call.function.arguments)]
        for style, texts in (("dim", [reasoning]), ("", [delta.content]), ("cyan", calls)):
            yield from ((style, text) for text in texts if text)


def _printable(text: str) -> str:
    """Random weights may say anything, terminal control sequences included."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Make SIGTERM leave the block like Ctrl-C does, so that the server is stopped."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo", help="serve a tiny checkpoint and chat with it", description=__doc__
    )
    parser.add_argument("--model", type=Path, help="checkpoint to serve (default: a tiny one, written when missing)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one that is installed")
    parser.add_argument("--max-tokens", type=int, default=48, help="length of the answer (default: 48)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="more options for the engine, after --")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    if arguments.model is not None and not (arguments.model / "config.json").exists():
        raise CommandError(f"--model: expected a checkpoint folder with a config.json, got {arguments.model}")
    run(arguments.model, engine=arguments.engine, max_tokens=arguments.max_tokens, options=arguments.options)
    return 0
