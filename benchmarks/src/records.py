"""What a run leaves behind: one JSON file with everything that a reader needs to repeat it.

Every record has a `kind`, the command that can read it, where it is from (GPU, versions, commit, command, date), and
rows:

    {"case": {what is measured}, "side": who does it, "figures": {name: {"median", "low", "high"}}, ...}

The name of a figure ends with its unit; low and high, the 10th and 90th percentile, are there where it has a spread.
What else stands in a row says how it was measured. A row without figures has the reason: "error" or "missing".
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsv32_plugin.console import CommandError

CHECKOUT = Path(__file__).resolve().parents[2]
MEANINGLESS = "no GPU: the references at tiny sizes. It shows that the harness works; the figures mean nothing."
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
"""What they call themselves."""
OURS = "ours"
BACKENDS = ("plugin", "in-tree", "dense")
"""Sides of a server or an engine."""
NAMES = ("operation", "mode", "model", "engine", "launch", "workload", "state", "load", "data", "parser", "name")
"""What a case says without its key."""
PACKAGES = ("dsv32-plugin", "torch", "triton", "vllm", "sglang", "transformers", "flashinfer-python")

Record = dict[str, Any]
Row = dict[str, Any]


def default_path(kind: str, *, whole: bool = True) -> Path:
    """Where a record of this kind goes on this machine.

    A whole run on a GPU goes to that GPU's folder in `benchmarks/results` of the checkout. What would make a poor
    record there (a part, a run without a GPU), and every run without a checkout, goes to $OUT or `bench-results`.
    """
    import torch

    results = CHECKOUT / "benchmarks" / "results"
    if not (whole and torch.cuda.is_available() and results.is_dir()):
        return Path(os.environ.get("OUT", "bench-results")) / f"{kind}.json"
    return results / model_of(torch.cuda.get_device_name()).lower() / f"{kind}.json"


def model_of(gpu: str) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`."""
    model = re.search(r"[A-Za-z]*\d+[A-Za-z]*", gpu)
    return model.group() if model else gpu


def provenance(kind: str) -> Record:
    """GPU, versions, commit, command and date. `kind` says which command can read the record."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "kind": kind,
        "gpu": torch.cuda.get_device_name() if on_gpu else f"none ({platform.machine()} CPU)",
        "cuda": torch.version.cuda or torch.version.hip or "",
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "commit": commit(),
        "command": _command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **({} if on_gpu else {"meaningless": MEANINGLESS}),
    }


def name_of(case: dict[str, Any]) -> str:
    """`dense decode B=1 L=2048` of a row's case."""
    return " ".join(str(value) if key in NAMES else f"{key}={value}" for key, value in case.items())


def median(row: Row, figure: str) -> float | None:
    """None where the row has no such figure."""
    found: float | None = row.get("figures", {}).get(figure, {}).get("median")
    return found


def line(row: Row) -> str:
    """A row as it is told while a command runs."""
    name = f"{name_of(row['case'])} {row['side']}"
    if "figures" not in row:
        return f"{name}: {row.get('error') or 'missing, ' + row['missing']}"
    shown = [
        f"{figure} {value['median']}" + (f" ({value['low']} to {value['high']})" if "low" in value else "")
        for figure, value in row["figures"].items()
    ]
    if "completed" in row:
        shown.insert(0, f"{row['completed']} of {row['requests']} answered")
    shown += [f"{operation} {us}" for operation, us in row.get("operations", {}).items()]
    return f"{name}: {', '.join(shown)}"


def missing(record: Record) -> dict[str, str]:
    """Every side that some case lacks -> the first reason given."""
    found: dict[str, str] = {}
    for row in record["rows"]:
        if "missing" in row:
            found.setdefault(row["side"], row["missing"])
    return found


def replaced(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The rows of both; what was measured again replaces what there was."""
    return list({(name_of(row["case"]), row["side"]): row for row in (*old, *new)}.values())


def write(record: Record, path: Path) -> None:
    """One row a line, so that a difference between two records can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in record.items():
        if key in ("rows", "runs") and value:
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f' "{key}": [\n{rows}\n ]')
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    # A run that is cut in the middle of this leaves the record as it was.
    partial = path.with_name(path.name + ".partial")
    partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path, *kinds: str) -> Record:
    """A record of one of these kinds.

    Raises:
        CommandError: the file is missing, is not a record, or is one of another kind or of an older form.
    """
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: expected a record of dsv32 bench: {error}") from error
    kind = record.get("kind")
    if kinds and kind not in kinds:
        raise CommandError(f"{path}: expected a record of `dsv32 bench {' or '.join(kinds)}`, got one of {kind!r}")
    if not all("case" in row for row in record.get("rows", [{}])):
        expected = "rows with a case, a side and figures"
        raise CommandError(f"{path}: expected {expected}, got those of a version before 0.2.0; measure again")
    return record


def version_of(package: str) -> str:
    """absent where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


@functools.cache
def commit() -> str:
    if named := os.environ.get("DSV32_COMMIT"):
        return named
    if not (CHECKOUT / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _command() -> str:
    name, given = Path(sys.argv[0]).name, sys.argv[1:]
    if "--output" in given:  # where the record went says nothing about it
        place = given.index("--output")
        given = given[:place] + given[place + 2 :]
    return shlex.join(["dsv32"] if name in ("dsv32", "cli.py") else ["python", name]) + " " + shlex.join(given)
