"""How `dsv32 bench layer` shows its progress and its record on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from dsv32_plugin.benchmarks import layer
from dsv32_plugin.benchmarks.harness import progress
from dsv32_plugin.benchmarks.layer_record import SIDES, curves
from dsv32_plugin.console import stdout


def run(plan: layer.Plan, output: Path, seconds: float, started: float) -> int:
    with progress() as bar:
        task = bar.add_task("", total=len(plan.steps()) * len(SIDES))

        def on_row(row: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=line(row))
            bar.console.print(line(row), markup=False, soft_wrap=True)

        record = layer.run(plan, output, seconds=seconds, started=started, on_row=on_row)
    return show(record)


def line(row: dict[str, Any]) -> str:
    name = f"{row['mode']} B={row['B']} T={row['T']} L={row['L']} H={row['H']} {row['side']}"
    if "total" not in row:
        return f"{name}: {row.get('error') or 'missing, ' + row['missing']}"
    parts = ", ".join(f"{operation} {us}" for operation, us in row["operations"].items())
    return f"{name}: {row['total']['median_us']} us ({parts})"


def table(record: dict[str, Any]) -> Table:
    found = Table(title=f"{record['gpu']}, commit {record['commit']}", title_justify="left", header_style="bold")
    for heading in ("mode", "B", "heads", "context", *(f"{side} µs" for side in SIDES), "ours over dense"):
        found.add_column(heading, justify="left" if heading == "mode" else "right")
    for (mode, batch, heads), sides in curves(record["rows"]).items():
        found.add_section()
        for context in sorted({n for measured in sides.values() for n in measured}):
            us = {side: sides.get(side, {}).get(context, {}).get("total", {}).get("median_us") for side in SIDES}
            gain = f"{us['dense'] / us['ours']:.2f}" if us["dense"] and us["ours"] else ""
            times = [f"{us[side]:.1f}" if us[side] else "missing" for side in SIDES]
            found.add_row(mode, str(batch), str(heads), f"{context}", *times, gain)
    return found


def crossover_text(row: dict[str, Any]) -> str:
    name = f"{row['mode']} B={row['B']} H={row['H']}: {row['side']}"
    if row["context"] is None:
        return f"{name} is slower than dense up to {row['longest']} tokens"
    begin = "at every context measured" if row["from_start"] else f"from {row['context']:.0f} tokens on"
    return f"{name} is faster than dense {begin}, {row['gain_at_longest']:.2f} times at {row['longest']}"


def crossover_cell(row: dict[str, Any]) -> str:
    if row["context"] is None:
        return f"not up to {row['longest']}"
    begin = "always" if row["from_start"] else f"{row['context']:.0f}"
    return f"{begin} ({row['gain_at_longest']:.2f} ×)"


def show(record: dict[str, Any]) -> int:
    """Print the record; the exit status: 1 if some side was wrong."""
    stdout.print(table(record))
    for row in record["crossovers"]:
        stdout.print(crossover_text(row), soft_wrap=True, markup=False)
    stdout.print(f"{record['seconds']} s in all", soft_wrap=True)
    reasons = {f"missing: {row['side']} ({row['missing']})": None for row in record["rows"] if "missing" in row}
    for reason in reasons:
        stdout.print(reason, style="yellow", soft_wrap=True, markup=False)
    wrong = [row for row in record["rows"] if "error" in row]
    for row in wrong:
        stdout.print(line(row), style="red", soft_wrap=True, markup=False)
    if record["not_run"]:
        stdout.print(f"not run: {record['not_run']}", style="yellow", soft_wrap=True, markup=False)
    if "meaningless" in record:
        stdout.print(record["meaningless"], style="bold red", soft_wrap=True)
    return int(bool(wrong))
