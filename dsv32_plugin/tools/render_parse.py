"""`dsv32 render` and `dsv32 parse`: a chat as the model reads it, an output as the plugin reads it."""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_plugin.parsers import EncodingError, OutputParser, encode_messages
from dsv32_plugin.parsers.messages import read_tools


class _Problem(Exception):
    """What stopped the command, in a sentence for the user."""


def add_commands(subparsers: Any) -> None:
    """Add `render` and `parse` to an argparse subparsers object; each sets `handler`, which returns an exit status."""
    render = subparsers.add_parser(
        "render",
        help="print the prompt of a JSON chat",
        description="Print the prompt that the model reads. FILE holds a list of messages, or an object with messages "
        "and, if wanted, tools, response_format and other options of encode_messages.",
    )
    render.add_argument("file", metavar="FILE", help="JSON file, - for standard input")
    render.add_argument("--mode", choices=("thinking", "chat"), help="default: the file's thinking_mode, or thinking")
    render.add_argument("--variant", choices=("v3.2", "speciale"), help="speciale refuses tools")
    render.add_argument("--tools", metavar="FILE", help="JSON file with the request's tools")
    render.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or its folder: print the token ids too")
    render.set_defaults(handler=render_command)

    parse = subparsers.add_parser(
        "parse",
        help="print the message in a model's output",
        description="Print as JSON the message in an output of the model, and the notes on its damage.",
    )
    parse.add_argument("file", metavar="FILE", help="text file, - for standard input")
    parse.add_argument("--thinking", action="store_true", help="the prompt ended with <think>")
    parse.add_argument("--tools", metavar="FILE", help="JSON file with the request's tools")
    parse.add_argument("--policy", choices=("repair", "strict"), default="repair", help="default: repair")
    parse.set_defaults(handler=parse_command)


def render_command(args: argparse.Namespace) -> int:
    """Handler of `dsv32 render`."""
    return _reporting("render", _render, args)


def parse_command(args: argparse.Namespace) -> int:
    """Handler of `dsv32 parse`."""
    return _reporting("parse", _parse, args)


def _reporting(name: str, command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    try:
        command(args)
    except _Problem as problem:
        print(f"dsv32 {name}: {problem}", file=sys.stderr)
        return 2
    return 0


_OPTIONS = frozenset(inspect.signature(encode_messages).parameters) - {"messages"}


def _render(args: argparse.Namespace) -> None:
    chat = _read_json(args.file)
    options: dict[str, Any] = {}
    if isinstance(chat, dict):
        options = {name: value for name, value in chat.items() if name in _OPTIONS}
        if "messages" not in chat:
            raise _Problem(f"{args.file}: expected a list of messages or an object with messages")
        chat = chat["messages"]
    if args.tools:
        options["tools"] = _read_tools(args.tools)
    if args.mode:
        options["thinking_mode"] = args.mode
    if args.variant:
        options["variant"] = args.variant
    try:
        prompt = encode_messages(chat, **options)
    except EncodingError as error:
        raise _Problem(f"{args.file}: {error}") from error
    ids = _token_ids(args.tokenizer, prompt) if args.tokenizer else None
    print(prompt)
    if ids is not None:
        print(json.dumps(ids))


def _parse(args: argparse.Namespace) -> None:
    tools = _read_tools(args.tools) if args.tools else None
    message = OutputParser.parse(_read_text(args.file), tools, args.thinking, args.policy)
    notes = [{"code": note.code, "offset": note.offset, "detail": note.detail} for note in message.notes]
    print(json.dumps({"message": message.to_openai(), "notes": notes}, ensure_ascii=False, indent=2))


def _read_tools(file: str) -> Any:
    tools = _read_json(file)
    tools = tools.get("tools") if isinstance(tools, dict) else tools
    try:
        read_tools(tools)
    except EncodingError as error:
        raise _Problem(f"{file}: {error}") from error
    return tools


def _read_json(file: str) -> Any:
    text = _read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Problem(f"{file}: not JSON: {error}") from error


def _read_text(file: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _Problem(f"{file}: {getattr(error, 'strerror', None) or error}") from error


def _token_ids(path: str, prompt: str) -> list[int]:
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise _Problem(f"--tokenizer: {file}: no such file; give a tokenizer.json or its folder")
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise _Problem("--tokenizer needs the package tokenizers: pip install tokenizers") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises a bare Exception
        raise _Problem(f"--tokenizer: {file}: {error}") from error
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    return ids
