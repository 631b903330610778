"""The whole engine, ours beside vLLM's own: prefill, decode, start-up and memory at DeepSeek-V3.2's sizes.

    dsv32 bench engine                                     # every side, every case
    dsv32 bench engine --sides plugin --heads 16 --only decode
    dsv32 bench engine --next-to /other/venv/bin/python    # that environment's release, too, in the same run
    dsv32 bench engine --table                             # print the record

Real sizes but 5 layers, dummy bfloat16 weights and fewer experts, so that one GPU holds all sides at once. The sides
get the same arguments; each runs in a process of its own. They are started one after the other, then take turns, case
by case. A run adds to the record or replaces what it measured again, so that parts can be measured one after the other;
a record is of one kind of GPU and one set of versions.

The answers of dummy weights mean nothing, so this proves only that every request got its tokens. That the answers of
either side are right is what tests/engine shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks import records, serve, views
from dsv32_plugin.benchmarks.engine_worker import MARK
from dsv32_plugin.benchmarks.records import BACKENDS, Record, Row
from dsv32_plugin.console import CommandError

LAYERS, DENSE_LAYERS = 5, 3
LENGTHS = (2048, 32768, 131072)
BATCHES = (1, 16, 64)
LONGEST_DENSE = 32768
"""Longer prompts take the dense side longer than all the others' cases together."""
MOST_DISTINCT = {2048: 64, 32768: 8, 131072: 2}
"""Distinct prompts of a decode case: filling the cache with more would take longer than all the measurements."""
PREFILL, DECODE, GRAPH = "prefill", "decode", "graph"
ROUNDS = {PREFILL: 4, DECODE: 4, GRAPH: 1}
"""Of each case, in each of which every side takes its turn. The first one warms up."""
LONG_ROUNDS = 3
"""Of prefills of more than LONGEST_DENSE tokens."""
MODEL_LENGTH = 135168
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Compile what is used, when it is used first: each case warms up.
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    # Greedy requests do not use FlashInfer's sampler, and its compilation at the first start takes 100 s on every side.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # The worker asks the engine's process for its memory with a function of its own.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
TOLD = (
    "sides", "heads", "kv_cache_dtype", "only", "experts", "start_together", "head_start", "cache_gib", "options",
    "seconds",
)  # fmt: skip
"""What a record says of its command."""
CACHE_VARIABLES = (
    "HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE", "DG_JIT_CACHE_DIR",
)  # fmt: skip
"""Where engines keep what they compile: under --caches, so that a run knows whether it began cold."""
OWN_START = re.compile(
    r"dsv32: (\d+) kernels: found in ([\d.]+) s, .* and for ([\d.]+) s alone, loaded in ([\d.]+) s, run in ([\d.]+) s"
)
"""What the plugin says of its part of a start."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """An interpreter and what is installed for it."""

    python: str
    versions: dict[str, str]

    @classmethod
    def of(cls, python: str) -> Environment:
        """Raises CommandError where it does not run, or has no vLLM or no dsv32-plugin."""
        ask = (
            "import json, sys\nfrom importlib.metadata import version\n"
            "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
        )
        try:
            done = subprocess.run(
                [python, "-c", ask, "vllm", "dsv32-plugin", "torch", "triton"],
                capture_output=True, text=True, check=True, env={**os.environ, "VLLM_PLUGINS": ""},
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            raise CommandError(f"{python}: expected a Python that has vllm and dsv32-plugin: {why}") from error
        return cls(python, json.loads(done.stdout))


@dataclasses.dataclass(frozen=True)
class Run:
    """One engine: what is compared is what differs in `side`, or in the release, alone."""

    side: str
    heads: int
    cache: str
    release: str = ""
    """vLLM's, where the record compares several."""

    def row(self, workload: str, **case: Any) -> Row:
        about: dict[str, Any] = {"engine": "vllm", "heads": self.heads, "cache": self.cache, "workload": workload}
        if self.release:
            about["release"] = self.release
        return {"case": about | case, "side": self.side}


def cases(only: str) -> list[dict[str, Any]]:
    """Those whose names have every word of `only`; short before long, so that a run that is cut off has most rows."""
    found: list[dict[str, Any]] = []
    for length in LENGTHS:
        rounds = LONG_ROUNDS if length > LONGEST_DENSE else ROUNDS[PREFILL]
        found.append({"kind": PREFILL, "L": length, "seed": 10_000_000 + length, "rounds": rounds})
        for kind in (DECODE, GRAPH):
            for batch in BATCHES:
                distinct = min(batch, MOST_DISTINCT[length])
                found.append({"kind": kind, "B": batch, "L": length, "distinct": distinct, "rounds": ROUNDS[kind]})
    return [case for case in found if set(only.split()) <= set(case_name(case).split())]


def takes(side: str, case: dict[str, Any]) -> bool:
    """Whether a case is measured on a side."""
    return side != "dense" or case["L"] <= LONGEST_DENSE


def case_name(case: dict[str, Any]) -> str:
    return " ".join([case["kind"], *(f"{key}={case[key]}" for key in ("B", "L") if key in case)])


def summarise(run: Run, case: dict[str, Any], rounds: list[dict[str, Any]]) -> Row:
    """One side's row of a case, of what its rounds gave."""
    shape = {key: case[key] for key in ("B", "L", "distinct") if key in case}
    row = run.row(case["kind"], **shape) | {key: case[key] for key in ("seed", "rounds") if key in case}
    if "error" in rounds[-1]:
        return row | rounds[-1]
    # The first round warms up, where there are others.
    counted = rounds[1:] or rounds
    peak = {"peak_gib": {"median": max(found["peak_gib"] for found in rounds)}}
    if case["kind"] == PREFILL:
        prompts, seconds = rounds[0]["prompts"], [found["seconds"] for found in counted]
        middle, low, high = (round(prompts * case["L"] / of(seconds)) for of in (statistics.median, max, min))
        speed = {"tokens_per_s": {"median": middle, "low": low, "high": high}}
        about = {"prompts": prompts, "warm_up_s": rounds[0]["seconds"], "seconds": seconds}
        return {**row, "figures": speed | peak, **about}
    steps = sorted(ms for found in counted for ms in found["steps_ms"])
    step = {"median": statistics.median(steps), "low": steps[len(steps) // 10], "high": steps[-1 - len(steps) // 10]}
    figures = {"ms_per_step": {name: round(ms, 3) for name, ms in step.items()}, **peak}
    rounds_ms = [round(statistics.median(found["steps_ms"]), 3) for found in counted]
    return {**row, "figures": figures, "steps": len(steps), "rounds_ms": rounds_ms}


def merge(record: Record, other: Record) -> None:
    """Add what another record of the same GPU and versions holds; its rows replace those of the same case."""
    if any(record[key] != other[key] for key in ("gpu", "versions")):
        names = [f"{found['gpu']}, {found['versions']}" for found in (record, other)]
        raise CommandError(f"expected a record of {names[0]}, got one of {names[1]}; give another --output")
    record["rows"] = records.replaced(record["rows"], other["rows"])
    runs = {
        (run["side"], run["heads"], run["cache"], run.get("release", "")): run
        for run in (*record["runs"], *other["runs"])
    }
    record["runs"] = list(runs.values())


def own_start(line: str) -> tuple[int, float] | None:
    """The plugin's kernels, and the seconds that a start takes for them, if this line of the log says it."""
    found = OWN_START.search(line)
    if found is None:
        return None
    count, *seconds = found.groups()
    return int(count), round(sum(map(float, seconds)), 1)


def write_config(run: Run, experts: int, out: Path) -> None:
    config = serve.config(run.side, LAYERS, experts, run.heads, dense_layers=DENSE_LAYERS)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def engine_options(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    # The dense kernels read their own fp8 layout.
    kv_cache_dtype = "fp8" if run.side == "dense" and run.cache == "fp8_ds_mla" else run.cache
    return {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "kv_cache_dtype": kv_cache_dtype,
        "max_model_len": MODEL_LENGTH,
        "max_num_seqs": max(BATCHES),
        "max_num_batched_tokens": 8192,
        # Of the memory, so much must be free when the second side starts; the cache has a size of its own.
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": int(args.cache_gib * 2**30),
        **json.loads(args.options),
    }


def environment(run: Run, caches: Path) -> dict[str, str]:
    env = {**os.environ, **ENVIRONMENT, "DSV32_PLUGIN": str(int(run.side == "plugin"))}
    for name in CACHE_VARIABLES:
        folder = caches / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        env[name] = str(folder)
    return env


class Worker:
    """One side's process. What it says beside results goes to its log."""

    def __init__(self, run: Run, place: Environment, args: argparse.Namespace) -> None:
        self.run = run
        self.tail: deque[str] = deque(maxlen=15)
        self.own_start: tuple[int, float] | None = None
        self._folder = tempfile.TemporaryDirectory()
        caches = (args.caches or Path(self._folder.name, "caches")).resolve() / f"{run.side}{run.release}"
        self.state = "warm" if caches.exists() else "cold"
        write_config(run, args.experts, Path(self._folder.name))
        options = engine_options(run, args)
        self.about: dict[str, Any] = {"options": options | {"experts": args.experts}, "variables": ENVIRONMENT}
        self.about |= {"versions": place.versions, **machine(args), "failed": None}
        log_path = args.logs / f"{run.side}{run.release}-{run.heads}-{run.cache}.log" if args.logs else Path(os.devnull)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        task = {"model": self._folder.name, "options": options, "started": time.time()}
        self._process = subprocess.Popen(
            [place.python, "-m", "dsv32_plugin.benchmarks.engine_worker", json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=environment(run, caches), cwd=self._folder.name, start_new_session=True,
        )  # fmt: skip
        self._results: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(log_path,), daemon=True).start()

    def _read(self, log_path: Path) -> None:
        assert self._process.stdout is not None
        with log_path.open("w") as log:
            for text in self._process.stdout:
                log.write(text)
                log.flush()
                if text.startswith(MARK):
                    self._results.put(json.loads(text[len(MARK) :]))
                else:
                    self.tail.append(text.rstrip())
                    self.own_start = self.own_start or own_start(text)
        self._results.put(None)

    def result(self) -> dict[str, Any] | None:
        """The next result; None once the process has ended."""
        return self._results.get()

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        """What one round of a case gave."""
        assert self._process.stdin is not None
        found = None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
            found = self.result()
        return found or {"error": "the engine ended", "ended": True, "log": list(self.tail)}

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def measure(runs: list[tuple[Run, Environment]], args: argparse.Namespace, record: Record, deadline: float) -> None:
    """Start the sides, then let them take turns; the record is on disk after every result."""
    workers: list[Worker] = []
    try:
        for run, place in runs:
            if len(workers) == 1 and args.start_together:
                time.sleep(args.head_start)
            workers.append(Worker(run, place, args))
            if not args.start_together:
                started(workers[-1], args, record, workers[-1].result())
        if args.start_together:
            for worker in workers:
                started(worker, args, record, worker.result())
        for case in cases(args.only):
            taking = [worker for worker in workers if not worker.about["failed"] and takes(worker.run.side, case)]
            found: list[list[dict[str, Any]]] = [[] for _ in taking]
            for number in range(case["rounds"]):
                for worker, rounds in zip(taking, found, strict=True):
                    if time.time() < deadline and not (rounds and "error" in rounds[-1]):
                        rounds.append(worker.ask(case | {"round": number}))
            for worker, rounds in zip(taking, found, strict=True):
                if rounds:
                    if rounds[-1].get("ended"):
                        worker.about["failed"] = rounds[-1]["log"]
                    add(worker, args, record, summarise(worker.run, case, rounds))
    finally:
        for worker in workers:
            worker.stop()


def started(worker: Worker, args: argparse.Namespace, record: Record, found: dict[str, Any] | None) -> None:
    """How long the start took: next to others' starts what the plugin says of its own part, unless more is known."""
    row = worker.run.row("start", state=worker.state)
    if found is None:
        worker.about["failed"] = list(worker.tail)
        print("\n".join(worker.tail), flush=True)
        add(worker, args, record, row | {"error": "the engine did not start"})
        return
    alone = {} if args.start_together else {name: found[name] for name in ("ready_s", "first_token_s")}
    kernels, own_s = worker.own_start or (0, None)
    figures = {name: {"median": seconds} for name, seconds in {**alone, "own_s": own_s}.items() if seconds is not None}
    known = any((other["case"], other["side"]) == (row["case"], row["side"]) for other in record["rows"])
    if figures and (alone or not known):
        add(worker, args, record, {**row, "figures": figures, "kernels": kernels})


def add(worker: Worker, args: argparse.Namespace, record: Record, row: Row) -> None:
    merge(record, {**record, "rows": [row], "runs": [dataclasses.asdict(worker.run) | worker.about]})
    print(records.line(row), flush=True)
    records.write(record, args.output)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to repeat this run, and what tells two machines apart."""
    chosen = {name: getattr(args, name) for name in TOLD}
    return {
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8],
        "commit": records.commit(),
        "chosen": chosen,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def gpu_and_driver() -> tuple[str, str]:
    """Their names, without a CUDA context in this process. Raises CommandError where there is no GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise CommandError(f"expected an NVIDIA GPU, but nvidia-smi found none ({error})") from error
    gpu, driver = found.split(", ")
    return gpu, driver


def open_record(path: Path) -> Record:
    """The record to add to; one of this GPU and these versions if there is none."""
    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    versions |= {package: records.version_of(package) for package in ("vllm", "triton")}
    gpu, driver = gpu_and_driver()
    record: Record = {"kind": "engine", "gpu": gpu, "driver": driver, "versions": versions, "runs": [], "rows": []}
    if path.exists():
        other, record = record, records.read(path, "engine")
        merge(record, other)
    return record


def handle(args: argparse.Namespace) -> int:
    """Raises CommandError for a side that there is not, or an environment without an engine."""
    if args.output is None:
        folder = records.CHECKOUT / "benchmarks" / "results" / records.model_of(gpu_and_driver()[0]).lower()
        args.output = folder / "engine.json"
    if args.table or args.merge:
        paths = [*([args.output] if args.output.exists() else []), *args.merge]
        record, *others = [records.read(path, "engine") for path in paths]
        for other in others:
            merge(record, other)
        records.write(record, args.output)
        return views.show(record)
    unknown = set(args.sides.split(",")) - set(BACKENDS)
    if unknown:
        raise CommandError(f"--sides: expected names of {', '.join(BACKENDS)}, got {', '.join(sorted(unknown))}")
    places = [Environment.of(python) for python in (sys.executable, *args.next_to)]
    releases = [place.versions["vllm"] for place in places]
    if len(set(releases)) < len(releases):
        raise CommandError(f"--next-to: expected another release of vLLM, got {' and '.join(releases)}")
    # So that the engine is stopped, too, when this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = open_record(args.output)
    deadline = time.time() + args.seconds
    for heads in args.heads.split(","):
        for cache in args.kv_cache_dtype.split(","):
            runs = [
                (Run(side, int(heads), cache, release if len(places) > 1 else ""), place)
                for release, place in zip(releases, places, strict=True)
                for side in args.sides.split(",")
            ]
            measure(runs, args, record, deadline)
    return views.show(record)
