"""`dsv32 bench`: measure, compare, draw, and write the documentation's figures."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks import records
from dsv32_plugin.benchmarks.layer_record import SIDES
from dsv32_plugin.console import CommandError, stderr, stdout


def add_command(subparsers: Any) -> None:
    """Nothing here imports torch: handlers do that when they run."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="measure the kernels, a layer or a server next to their peers", description=__doc__
    )
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    for add in (
        _add_kernels,
        _add_layer,
        _add_engine,
        _add_serve,
        _add_whole,
        _add_cost,
        _add_compare,
        _add_plot,
        _add_report,
    ):
        add(commands)


def _add_kernels(commands: Any) -> None:
    parser = commands.add_parser("kernels", help="every operation over its grid, beside the kernels installed here")
    parser.add_argument("--only", default="", help="words that a case's name must contain, e.g. 'sparse B=64'")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    _add_run_options(parser)
    parser.set_defaults(handler=_kernels)


def _add_layer(commands: Any) -> None:
    parser = commands.add_parser("layer", help="one attention layer against the context: dense, in-tree and ours")
    parser.add_argument("--contexts", type=_sizes, help="tokens, e.g. 1k,32k,128k (default: 1k to 128k by doubling)")
    parser.add_argument("--batches", type=_sizes, help="sequences of a decode (default: 1,16,64)")
    parser.add_argument("--heads", type=_sizes, help="attention heads of this rank (default: 128,16)")
    _add_run_options(parser)
    parser.set_defaults(handler=_layer)


def _add_engine(commands: Any) -> None:
    parser = commands.add_parser("engine", help="vLLM whole, step by step: prefill, decode, start-up, memory")
    parser.add_argument(
        "--sides", default=",".join(records.BACKENDS), help="comma-separated: " + ", ".join(records.BACKENDS)
    )
    parser.add_argument("--heads", default="128,16", help="attention heads: 128, or 16 as on one of 8 ranks")
    parser.add_argument("--kv-cache-dtype", default="fp8_ds_mla", help="comma-separated: fp8_ds_mla, bfloat16")
    parser.add_argument("--only", default="", help="words that a case's name must contain, e.g. 'decode B=1 L=2048'")
    parser.add_argument("--experts", type=int, default=16, help="routed experts, the same on every side (V3.2 has 256)")
    parser.add_argument("--start-together", action="store_true", help="start all sides at once; no start is timed then")
    parser.add_argument(
        "--head-start", type=float, default=0.0, help="then, seconds that the first side begins before the others"
    )
    parser.add_argument(
        "--next-to", action="append", default=[], metavar="PYTHON",
        help="the Python of another environment, with another release of vLLM and this package; repeat for more",
    )  # fmt: skip
    parser.add_argument("--cache-gib", type=float, default=4.0, help="size of the KV cache")
    parser.add_argument("--options", default="{}", help="more arguments of vLLM's LLM for every side, as JSON")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case later than this after the start")
    parser.add_argument("--caches", type=Path, help="keep compiled code here, so that a second run starts warm")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--output", type=Path, help="the record (default: benchmarks/results/GPU/engine.json)")
    parser.add_argument("--table", action="store_true", help="print the record and stop")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="add these records to --output and stop")
    parser.set_defaults(handler=_engine)


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="a real server under an open-loop load, with the plugin and without")
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--backend", type=_names, metavar="NAMES", help="of plugin,in-tree,dense (default: plugin)")
    parser.add_argument("--workload", type=_names, metavar="NAMES", help="of chat,document,agent (default: chat)")
    rate_help = "requests a second, alone (one after the other) or burst (all at once); the default is alone,2,burst"
    parser.add_argument("--rate", type=_rates, metavar="RATES", help=rate_help)
    parser.add_argument("--requests", type=int, help="of each workload (default: 64)")
    parser.add_argument("--layers", type=_sizes, help="of the model; with two numbers the times are extended to 61")
    parser.add_argument("--experts", type=int, help="of a layer (default: 256)")
    parser.add_argument("--heads", type=int, help="attention heads (default: 128)")
    parser.add_argument("--together", action="store_true", help="all servers at once on one GPU, loaded in turn")
    parser.add_argument("--longest", type=int, help="tokens of a prompt with its answer (default: 131072)")
    parser.add_argument("--checkpoint", type=Path, help="serve this one in place of dummy weights of the real sizes")
    parser.add_argument(
        "--output", type=Path, help="the record (default: benchmarks/results/GPU; of a part of the run: bench-results)"
    )
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="more options for the engine, after --")
    parser.set_defaults(handler=_serve)


def _add_whole(commands: Any) -> None:
    parser = commands.add_parser("whole", help="a model of all its layers, cut over GPUs as dsv32 plan says")
    parser.add_argument("--engine", choices=("vllm", "sglang"), help="default: the one that is installed")
    parser.add_argument("--model", choices=("V3.2", "GLM-5"), default="V3.2")
    parser.add_argument("--gpus", type=int, default=1, help="that share the model (default: 1)")
    parser.add_argument("--layout", type=_names, metavar="NAMES", help="of TP,DP, where there are several GPUs")
    parser.add_argument(
        "--backend", type=_names, metavar="NAMES", help="of plugin,in-tree,dense (default: all that pair)"
    )
    parser.add_argument("--layers", type=int, default=0, help="default: all")
    parser.add_argument("--experts", type=int, default=256, help="of a layer (default: 256); 16 fit one H200")
    parser.add_argument("--only", default="", help="words that a case's name must contain, e.g. 'L=2048'")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--start-seconds", type=float, default=900, help="wait so long for a server (default: 900)")
    parser.add_argument("--retry", action="store_true", help="measure again what the record has a failure of")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--output", type=Path, help="the record, also to go on with (default: benchmarks/results/GPU)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="more options for the engine, after --")
    parser.set_defaults(handler=_whole)


def _rates(text: str) -> tuple[float, ...]:
    """ValueError, which argparse reports, for what is no number."""
    named = {"alone": 0.0, "burst": math.inf}
    rates = tuple(named[part] if part in named else float(part) for part in text.split(","))
    if not all(rate >= 0 for rate in rates):
        raise ValueError("a rate below 0")
    return rates


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _add_cost(commands: Any) -> None:
    parser = commands.add_parser("cost", help="dollars a million tokens against the position, from a measured layer")
    parser.add_argument("layer", type=Path, metavar="LAYER.json", help="a record of dsv32 bench layer")
    parser.add_argument("--price", type=float, help="US dollars a GPU hour (default: 2, as in the paper)")
    parser.add_argument("--batch", type=int, help="sequences of the decode (default: the most measured)")
    parser.add_argument("--heads", type=int, help="attention heads of the GPU (default: the most measured)")
    parser.add_argument("--layers", type=int, help="of the model (default: 61)")
    for mode in ("prefill", "decode"):
        help_text = f"time of one GPU that all but the attention layers takes for a token in {mode} (default: left out)"
        parser.add_argument(f"--rest-{mode}-us", type=float, default=0.0, help=help_text)
    parser.add_argument("--output", type=Path, help="the record (default: cost.json beside LAYER.json)")
    parser.set_defaults(handler=_cost)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="ratios of two records, and whether their spread explains them")
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--only", default="", help="words that a row's name must contain, e.g. 'ours cold'")
    parser.add_argument("--output", type=Path, help="write the comparison as a record")
    parser.set_defaults(handler=_compare)


def _add_plot(commands: Any) -> None:
    parser = commands.add_parser("plot", help="draw records as PNG files beside them, those of several GPUs together")
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD.json")
    parser.set_defaults(handler=_plot)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="write the documentation's figures from benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document is out of date")
    parser.add_argument("--no-plots", action="store_true", help="leave the pictures as they are")
    parser.set_defaults(handler=_report)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after this long")
    parser.add_argument(
        "--output", type=Path, help="the record (default: benchmarks/results/GPU; of a part of the run: bench-results)"
    )
    parser.add_argument("--no-precompile", action="store_true", help="compile kernels one by one as they are needed")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part[:-1]) << 10 if part.lower().endswith("k") else int(part) for part in text.split(","))


def _precompile(arguments: argparse.Namespace) -> None:
    """Fill Triton's cache with all processors, so that the run spends its time measuring."""
    import torch

    from dsv32_plugin.kernels.runtime import aot
    from dsv32_plugin.kernels.runtime.target import target_of_device

    if torch.cuda.is_available() and not arguments.no_precompile:
        with stderr.status("compiling the kernels"):
            aot.precompile(target_of_device(0))


def _kernels(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import bench_kernels, harness

    started = time.monotonic()
    if not arguments.list:
        _precompile(arguments)
    return harness.handle(bench_kernels.cases, arguments, "kernels", started)


def _layer(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import harness, layer, views

    started = time.monotonic()
    chosen = {name: value for name in ("contexts", "batches", "heads") if (value := getattr(arguments, name))}
    whole = not chosen and arguments.seconds == math.inf
    output = arguments.output or records.default_path("layer", whole=whole)
    _precompile(arguments)
    plan = layer.default_plan(**chosen)
    with harness.progress() as bar:
        task = bar.add_task("", total=len(plan.steps()) * len(SIDES))

        def on_row(row: records.Row) -> None:
            bar.update(task, advance=1, description=records.line(row))
            bar.console.print(records.line(row), markup=False, soft_wrap=True)

        record = layer.run(plan, output, seconds=arguments.seconds, started=started, on_row=on_row)
    return views.show(record)


def _engine(arguments: argparse.Namespace) -> int:
    try:
        from dsv32_plugin.benchmarks import engine
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'dsv32-plugin[vllm]'") from error

    return engine.handle(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from dsv32_plugin.benchmarks import serve, views
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'dsv32-plugin[vllm]'") from error

    names = ("requests", "layers", "experts", "heads", "longest", "checkpoint", "together")
    chosen: dict[str, Any] = {
        "backends": _known("--backend", arguments.backend, records.BACKENDS),
        "workloads": _known("--workload", arguments.workload, serve.WORKLOADS),
        "rates": arguments.rate,
        **{name: getattr(arguments, name) for name in names},
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    plan = serve.Plan(engine=arguments.engine, options=arguments.options, **given)
    output = arguments.output or records.default_path(f"serve-{plan.engine}")
    with stderr.status("looking at the plugin") as status:

        def on_row(row: records.Row) -> None:
            stdout.print(records.line(row), markup=False, soft_wrap=True)

        record = serve.run(plan, output, on_state=status.update, on_row=on_row)
    return views.show(record)


def _whole(arguments: argparse.Namespace) -> int:
    import torch

    try:
        from dsv32_plugin.benchmarks import views, whole
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'dsv32-plugin[vllm]'") from error

    if arguments.gpus < 1:
        raise CommandError(f"--gpus: expected 1 or more, got {arguments.gpus}")
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    engine = arguments.engine or next((name for name in whole.LAYOUTS if find_spec(name) is not None), "vllm")
    plan = whole.Plan(
        engine=engine, model=arguments.model, gpus=arguments.gpus, layers=arguments.layers, experts=arguments.experts,
        sides=_known("--backend", arguments.backend, records.BACKENDS) or whole.sides(arguments.gpus),
        layouts=_known("--layout", arguments.layout, whole.LAYOUTS[engine]) or whole.layouts(engine, arguments.gpus),
        only=arguments.only, seconds=arguments.seconds, start_s=arguments.start_seconds, retry=arguments.retry,
        logs=arguments.logs, options=arguments.options, chip=whole.chip() if torch.cuda.is_available() else "",
    )  # fmt: skip
    with stderr.status("looking at the plugin") as status:

        def on_row(row: records.Row) -> None:
            stdout.print(records.line(row), markup=False, soft_wrap=True)

        output = arguments.output or records.default_path(f"whole-{engine}")
        record = whole.run(plan, output, on_state=status.update, on_row=on_row)
    failed = views.show(record)
    if whole.unfinished(plan, record):
        stdout.print(f"{output} is not complete: the same command goes on", style="bold", soft_wrap=True)
        return 1
    return failed


def _known(option: str, names: Sequence[str] | None, known: Iterable[str]) -> Sequence[str] | None:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise CommandError(f"{option}: expected names of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def _cost(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import cost, views

    given = {name: value for name in ("price", "batch", "heads", "layers") if (value := getattr(arguments, name))}
    rest_us = {"prefill": arguments.rest_prefill_us, "decode": arguments.rest_decode_us}
    record = cost.compute(records.read(arguments.layer, "layer"), rest_us=rest_us, **given)
    records.write(record, arguments.output or arguments.layer.with_name("cost.json"))
    return views.show(record)


def _compare(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import compare, views

    before, after = records.read(arguments.before), records.read(arguments.after)
    words = arguments.only.split()
    pairs = [pair for pair in compare.compare(before, after) if all(word in pair.name for word in words)]
    record = compare.record(before, after, pairs)
    if arguments.output:
        records.write(record, arguments.output)
    return views.show(record)


def _plot(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import plots

    found = {path: records.read(path, *plots.KINDS) for path in arguments.records}
    written = [picture for path, record in found.items() for picture in plots.draw(record, path)]
    for kind in plots.TOGETHER:
        if mine := {path: record for path, record in found.items() if record["kind"] == kind}:
            written += plots.draw_together(list(mine.values()), next(iter(mine)).with_suffix(".png"))
    for picture in written:
        stdout.print(str(picture), soft_wrap=True)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import report

    if not (records.CHECKOUT / "docs").is_dir():
        raise CommandError("report writes the documentation of a checkout; install the package with pip install -e .")
    if not (arguments.check or arguments.no_plots):
        report.draw_all(records.CHECKOUT / "benchmarks" / "results")
    stale = report.write(records.CHECKOUT, check=arguments.check)
    for path in stale:
        verb = "is out of date: run dsv32 bench report" if arguments.check else "written"
        stdout.print(f"{path.relative_to(records.CHECKOUT)} {verb}", soft_wrap=True)
    return int(arguments.check and bool(stale))
