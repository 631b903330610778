"""`dsv32 bench`: measure, compare, draw, and write the documentation's figures."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks import records


def add_command(subparsers: Any) -> None:
    """Nothing here imports torch: handlers do that when they run."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="measure the kernels, a layer or a server beside their peers", description=__doc__
    )
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    _add_kernels(commands)
    _add_layer(commands)


def _add_kernels(commands: Any) -> None:
    parser = commands.add_parser("kernels", help="every operation over its grid, beside the kernels installed here")
    parser.add_argument("--only", default="", help="words that a case's name must contain, e.g. 'sparse B=64'")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    _add_run_options(parser, "kernels.json")
    parser.set_defaults(handler=_kernels)


def _add_layer(commands: Any) -> None:
    parser = commands.add_parser("layer", help="one attention layer against the context: dense, in-tree and ours")
    parser.add_argument("--contexts", type=_sizes, help="tokens, e.g. 1k,32k,128k (default: 1k to 128k by doubling)")
    parser.add_argument("--batches", type=_sizes, help="sequences of a decode (default: 1,16,64)")
    parser.add_argument("--heads", type=_sizes, help="attention heads of this rank (default: 128)")
    _add_run_options(parser, "layer.json")
    parser.set_defaults(handler=_layer)


def _add_run_options(parser: argparse.ArgumentParser, name: str) -> None:
    default = records.results_folder() / name
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after this long")
    parser.add_argument("--output", type=Path, default=default, help="the record (default: %(default)s)")
    parser.add_argument("--no-precompile", action="store_true", help="compile kernels one by one as they are needed")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part[:-1]) << 10 if part.lower().endswith("k") else int(part) for part in text.split(","))


def _precompile(arguments: argparse.Namespace) -> None:
    """Fill Triton's cache with all processors, so that the run spends its time measuring."""
    import torch

    from dsv32_plugin.console import stderr
    from dsv32_plugin.kernels import aot

    if torch.cuda.is_available() and not arguments.no_precompile:
        with stderr.status("compiling the kernels"):
            aot.precompile(aot.target_of_device(0))


def _kernels(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import bench_kernels, harness

    if not arguments.list:
        _precompile(arguments)
    return harness.handle(bench_kernels.cases, arguments)


def _layer(arguments: argparse.Namespace) -> int:
    from dsv32_plugin.benchmarks import layer, layer_view

    plan = layer.default_plan(
        **{name: value for name in ("contexts", "batches", "heads") if (value := getattr(arguments, name))}
    )
    _precompile(arguments)
    return layer_view.run(plan, arguments.output, arguments.seconds)
