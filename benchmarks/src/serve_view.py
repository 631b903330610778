"""How `dsv32 bench serve` reads its options and shows its progress and its record on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dsv32_plugin.benchmarks import records
from dsv32_plugin.benchmarks.serve_record import BACKENDS
from dsv32_plugin.console import CommandError, stderr, stdout


def run(arguments: argparse.Namespace) -> int:
    try:
        from dsv32_plugin.benchmarks import serve
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'dsv32-plugin[vllm]'") from error

    chosen: dict[str, Any] = {
        "backends": _known("--backend", arguments.backend, BACKENDS),
        "workloads": _known("--workload", arguments.workload, serve.WORKLOADS),
        "rates": arguments.rate,
        **{name: getattr(arguments, name) for name in ("requests", "layers", "experts", "heads", "longest")},
        "checkpoint": arguments.checkpoint,
        "together": arguments.together,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    plan = serve.Plan(engine=arguments.engine, options=arguments.options, **given)
    with stderr.status("looking at the plugin") as status:
        record = serve.run(
            plan,
            arguments.output or records.default_path(f"serve-{plan.engine}"),
            on_state=status.update,
            on_row=lambda row: stdout.print(line(row), markup=False, soft_wrap=True),
        )
    return show(record)


def _known(option: str, names: Sequence[str] | None, known: Any) -> Sequence[str] | None:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise CommandError(f"{option}: expected names of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def line(row: dict[str, Any]) -> str:
    name = f"{row['engine']} {row['backend']} {row['workload']}, {row['layers']} layers, {row['load']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    first, token = row["ttft_ms"], row["tpot_ms"]
    ready = f"ready after {row['ready_s']} s, " if "ready_s" in row else ""
    return (
        f"{name}: {row['completed']} of {row['requests']} answered, {ready}first token "
        f"{first['median']:.0f} ms, per token {token['median']:.1f} ms, {row['output_tokens_per_s']:.0f} tokens/s"
    )


def table(record: dict[str, Any]) -> Table:
    found = Table(title=f"{record['gpu']}, commit {record['commit']}", title_justify="left", header_style="bold")
    for heading in (
        "server",
        "workload",
        "answered",
        "first token ms",
        "p90",
        "per token ms",
        "p90",
        "tokens/s in",
        "out",
    ):
        found.add_column(heading, justify="left" if heading == "server" else "right")
    for row in record["rows"]:
        server = f"{row['engine']} {row['backend']}, {row['layers']} layers\n{row['workload']}, {row['load']}"
        if "error" in row:
            found.add_row(server, "failed", style="red")
            continue
        latency = [f"{row[key][point]:.1f}" for key in ("ttft_ms", "tpot_ms") for point in ("median", "p90")]
        rates = [f"{row[key]:.0f}" for key in ("input_tokens_per_s", "output_tokens_per_s")]
        found.add_row(server, f"{row['completed']}/{row['requests']}", *latency, *rates)
        if more := row.get("extrapolated"):
            label = f"extended to {more['layers']} layers (not measured)"
            found.add_row(label, "", f"{more['ttft_ms']:.1f}", "", f"{more['tpot_ms']:.1f}", style="dim italic")
    return found


def show(record: dict[str, Any]) -> int:
    """Print the record; the exit status: 1 if a server failed or a request was not answered."""
    stdout.print(table(record))
    stdout.print(record["method"], soft_wrap=True)
    methods = {row["extrapolated"]["method"]: None for row in record["rows"] if "extrapolated" in row}
    for method in methods:
        stdout.print(f"Extended: {method}", soft_wrap=True)
    if "meaningless" in record:
        stdout.print(record["meaningless"], style="bold red", soft_wrap=True)
    failed = [row for row in record["rows"] if "error" in row or row["completed"] < row["requests"]]
    for row in failed:
        reason = row.get("error") or "; ".join(row["errors"])
        stdout.print(
            f"{row['backend']} {row['workload']} {row['load']}: {reason}", style="red", soft_wrap=True, markup=False
        )
    return int(bool(failed))
