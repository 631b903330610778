"""`dsv32 demo`: a stock engine with this plugin answers from the trained tiny model, on whatever machine this is.

Two questions that are answered right only if selection, positions, caches, template and parsers are: a code among
hundreds, and one that takes a tool. The model makes the call itself, and answers from the result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from dsv32_plugin import settings
from dsv32_plugin.console import CommandError, stderr, stdout
from dsv32_plugin.engines import ENGINES
from dsv32_plugin.training import tasks

if TYPE_CHECKING:
    from openai import OpenAI

    from dsv32_plugin.tools.serving import Server

NAME = "dsv32-demo"
_HERE = Path(__file__).parent.parent
_CHECKOUT = _HERE.parent / "assets" / "tiny-dsv32"
TRAINED = _CHECKOUT if _CHECKOUT.exists() else _HERE / "trained"
"""The trained checkpoint; a wheel holds it beside the code."""
START_SECONDS = 600
CONTEXT_TOKENS = 4000
PARSERS = ["--tool-call-parser", "dsv32", "--reasoning-parser", "dsv32"]
COMMON_OPTIONS = ["--served-model-name", NAME, "--dtype", "float32", *PARSERS]
# Nothing leaves the machine, and waiting threads leave the cores to working ones.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
RECOMMENDED = "and ask it with temperature 1.0 and top_p 0.95, as DeepSeek recommends"
WEATHER = {"sky": "rain", "celsius": 17}
WEATHER_QUESTION = "What is the weather in Hangzhou in 3 days?"
WEATHER_ARGUMENTS = {"city": "Hangzhou", "days": 3}
WEATHER_ANSWER = "In Hangzhou: rain, 17 degrees."


@dataclass
class Answer:
    """One streamed answer and what it cost."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI tool calls, their arguments put together."""
    prompt_tokens: int = 0
    tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0


def run(
    model: Path | None = None, *, engine: str | None = None, max_tokens: int = 160, options: Sequence[str] = ()
) -> None:
    """The whole demonstration; raises CommandError with the next step when a part of it fails.

    A `model` of the user's own may answer what it likes; the trained tiny model must answer right.
    """
    engine = engine or next((name for name in ENGINES if find_spec(name) is not None), "vllm")
    for name in (engine, "openai"):
        if find_spec(name) is None:
            raise CommandError(f"{name} is not installed; pip install 'dsv32-plugin[{engine}]'")
    from dsv32_plugin.tools import serving

    strict = model is None
    model = model or TRAINED
    chosen = ENGINES[engine]
    # Several may run at once: each has a log of its own, which stays where something went wrong.
    log_path = _cache() / f"demo-{engine}-{os.getpid()}.log"
    given = [*COMMON_OPTIONS, *chosen.demo_options, *options]
    server = serving.SERVERS[engine](model, given, log_path=log_path, env=ENVIRONMENT)
    stdout.print(f"checkpoint  {model}", soft_wrap=True, markup=False)
    stdout.print(f"server      {' '.join(server.command)}", soft_wrap=True, markup=False)
    try:
        with serving.stopping_on_sigterm(), server:
            ready_s = _wait(server, chosen.command)
            stdout.print(f"ready       {ready_s:.1f} s")
            wrong = _conversations(f"{server.url}/v1", max_tokens)
            proof = re.search(r"dsv32: serving .*", server.log())
    except serving.ServerError as error:
        off = "" if settings.plugin_enabled() else "\nDSV32_PLUGIN=0 switches the plugin off; unset it"
        raise CommandError(f"{error}{off}\n'dsv32 doctor' says what is wrong") from error
    if proof is None:
        raise CommandError("the server answered, but not through the plugin; 'dsv32 doctor' says why")
    stdout.print(f"served by   {proof.group().removeprefix('dsv32: serving ')}", soft_wrap=True, markup=False)
    if wrong and strict:
        raise CommandError(f"the trained model answered, but not right: {'; '.join(wrong)}; please report this")
    log_path.unlink()
    stdout.print("stopped     on GPUs the same is", soft_wrap=True)
    start = chosen.start("deepseek-ai/DeepSeek-V3.2", 8, " ".join(PARSERS))
    stdout.print(f"\n{start}\n{RECOMMENDED}", soft_wrap=True, markup=False)


def _cache() -> Path:
    path = settings.cache_folder()
    path.mkdir(parents=True, exist_ok=True)
    return path


def _wait(server: Server, command: str) -> float:
    with stderr.status(f"{command} is starting") as status:

        def show(elapsed_s: float) -> None:
            status.update(f"{command} is starting, {elapsed_s:.0f} s; its log is {server.log_path}")

        return server.wait_until_ready(START_SECONDS, show)


def _conversations(url: str, max_tokens: int) -> list[str]:
    """Both conversations, as any OpenAI client would have them; what was answered otherwise than it should."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    try:
        return [*_needle(client, max_tokens), *_weather(client, max_tokens)]
    except OpenAIError as error:
        raise CommandError(f"the server refused the chat: {error}") from error


def _needle(client: OpenAI, max_tokens: int) -> list[str]:
    question, expected = tasks.needles_of(Random(0), CONTEXT_TOKENS, 1, thinking=0).messages
    lines = question["content"].splitlines()
    _show("question", f"{lines[0]} {lines[1]} ... {len(lines) - 2} codes ... {lines[-2]} {lines[-1]}")
    answer = _ask(client, [question], max_tokens, thinking=False)
    return [] if answer.content == expected["content"] else [f"expected {expected['content']}, got {answer.content!r}"]


def _weather(client: OpenAI, max_tokens: int) -> list[str]:
    tools = [definition for definition, _ in tasks.TOOLS]
    messages: list[dict[str, Any]] = [tasks.user(WEATHER_QUESTION)]
    _show("question", WEATHER_QUESTION)
    answer = _ask(client, messages, max_tokens, thinking=True, tools=tools)
    if not answer.calls:
        return [f"expected a call of get_weather, got {answer.content!r}"]
    wrong = []
    function = answer.calls[0]["function"]
    if (function["name"], function["arguments"]) != ("get_weather", json.dumps(WEATHER_ARGUMENTS)):
        wrong.append(f"expected get_weather with {WEATHER_ARGUMENTS}, got {function}")
    result = json.dumps(WEATHER)
    # Until the next question the model keeps reading its reasoning, as it was trained to.
    messages.append(
        {
            "role": "assistant",
            "reasoning": answer.reasoning,  # as vLLM calls it
            "reasoning_content": answer.reasoning,  # and SGLang
            "content": answer.content,
            "tool_calls": answer.calls,
        }
    )
    messages += [{"role": "tool", "tool_call_id": call["id"], "content": result} for call in answer.calls]
    _show("result", result)
    answer = _ask(client, messages, max_tokens, thinking=True, tools=tools)
    if answer.content != WEATHER_ANSWER:
        wrong.append(f"expected {WEATHER_ANSWER!r}, got {answer.content!r}")
    return wrong


def _show(label: str, text: str) -> None:
    stdout.print(f"{label:<12}{_printable(text)}", soft_wrap=True, markup=False)


def _ask(client: OpenAI, messages: list[dict[str, Any]], max_tokens: int, *, thinking: bool, **request: Any) -> Answer:
    """Stream one answer to the terminal."""
    request |= {
        "model": NAME,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"chat_template_kwargs": {"thinking": thinking}},
    }
    stdout.print("answer      ", end="")
    started = time.monotonic()
    answer, shown = Answer(), None
    try:
        for chunk in client.chat.completions.create(**request):
            if chunk.usage:
                answer.prompt_tokens, answer.tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            for choice in chunk.choices:
                _add(answer, choice.delta)
                for style, text in _texts(choice.delta):
                    answer.first_token_s = answer.first_token_s or time.monotonic() - started
                    if shown not in (None, style):
                        stdout.print("\n            ", end="")
                    shown = style
                    stdout.print(_printable(text), style=style, end="", soft_wrap=True, markup=False)
    finally:
        stdout.print()
    answer.total_s = time.monotonic() - started
    if not answer.first_token_s or not answer.tokens:
        raise CommandError("the server ended its answer without a token")
    _show(
        "",
        f"{answer.prompt_tokens} prompt tokens, first token after {answer.first_token_s:.2f} s, "
        f"{answer.tokens} tokens in {answer.total_s:.2f} s",
    )
    return answer


def _add(answer: Answer, delta: Any) -> None:
    """Put a streamed piece where it belongs; a call comes as its name, then its arguments in pieces."""
    answer.reasoning += _reasoning(delta) or ""
    answer.content += delta.content or ""
    for call in delta.tool_calls or []:
        if call.index == len(answer.calls):
            function = {"name": call.function.name, "arguments": ""}
            answer.calls.append({"id": call.id, "type": "function", "function": function})
        answer.calls[call.index]["function"]["arguments"] += call.function.arguments or ""


def _reasoning(delta: Any) -> str | None:
    return getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)


def _texts(delta: Any) -> Iterator[tuple[str, str]]:
    """What a delta adds, each with its style: reasoning dim, calls in colour, the answer plain."""
    calls = [part for call in delta.tool_calls or [] for part in (call.function.name, call.function.arguments)]
    for style, texts in (("dim", [_reasoning(delta)]), ("", [delta.content]), ("cyan", calls)):
        yield from ((style, text) for text in texts if text)


def _printable(text: str) -> str:
    """A model may say anything, terminal control sequences included."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo", help="serve the trained tiny checkpoint and chat with it", description=__doc__
    )
    parser.add_argument("--model", type=Path, help="checkpoint to serve (default: the trained tiny one)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one that is installed")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer (default: 160)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="more options for the engine, after --")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    if arguments.model is not None and not (arguments.model / "config.json").exists():
        raise CommandError(f"--model: expected a checkpoint folder with a config.json, got {arguments.model}")
    run(arguments.model, engine=arguments.engine, max_tokens=arguments.max_tokens, options=arguments.options)
    return 0
