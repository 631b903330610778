"""The whole engine, ours beside vLLM's own: prefill, decode, start-up and memory at DeepSeek-V3.2's sizes.

    python -m dsv32_plugin.benchmarks.engine                                     # every side, every case
    python -m dsv32_plugin.benchmarks.engine --sides plugin --heads 16 --only decode
    python -m dsv32_plugin.benchmarks.engine --table                             # print the record

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
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks.engine_view import (
    BATCHES,
    SIDES,
    Run,
    case_name,
    cases,
    find,
    merge,
    show,
    summarise,
    takes,
)
from dsv32_plugin.benchmarks.engine_worker import MARK
from dsv32_plugin.benchmarks.records import CHECKOUT, model_of

CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""DeepSeek-V3.2's config.json with fewer layers and no quantisation."""
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
CACHE_VARIABLES = (
    "HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE", "DG_JIT_CACHE_DIR",
)  # fmt: skip
"""Where engines keep what they compile: under --caches, so that a run knows whether it began cold."""
OWN_START = re.compile(
    r"dsv32: (\d+) kernels: found in ([\d.]+) s, .* and for ([\d.]+) s alone, loaded in ([\d.]+) s, run in ([\d.]+) s"
)
"""What the plugin says of its part of a start."""


def own_start(line: str) -> dict[str, float] | None:
    """Seconds that a start takes for the plugin's kernels, if this line of the log says it."""
    found = OWN_START.search(line)
    if found is None:
        return None
    count, *seconds = found.groups()
    return {"kernels": int(count), "own_s": round(sum(map(float, seconds)), 1)}


def write_config(run: Run, experts: int, out: Path) -> None:
    config = {**CONFIG, "num_attention_heads": run.heads, "num_key_value_heads": run.heads, "n_routed_experts": experts}
    if run.side == "dense":
        config = {key: value for key, value in config.items() if not key.startswith("index_")}
        config |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    else:
        config |= {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def engine_options(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    # The dense kernels read their own fp8 layout.
    kv_cache_dtype = "fp8" if run.side == "dense" and run.kv_cache_dtype == "fp8_ds_mla" else run.kv_cache_dtype
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

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        self.run = run
        self.tail: deque[str] = deque(maxlen=15)
        self.own_start: dict[str, float] | None = None
        self._folder = tempfile.TemporaryDirectory()
        caches = (args.caches or Path(self._folder.name, "caches")).resolve() / run.side
        self.state = "warm" if caches.exists() else "cold"
        write_config(run, args.experts, Path(self._folder.name))
        self.options = engine_options(run, args)
        log_path = args.logs / f"{run.side}-{run.heads}-{run.kv_cache_dtype}.log" if args.logs else Path(os.devnull)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        task = {"model": self._folder.name, "options": self.options, "started": time.time()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dsv32_plugin.benchmarks.engine_worker", json.dumps(task)],
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


def measure(runs: list[Run], args: argparse.Namespace, record: dict[str, Any], deadline: float) -> None:
    """Start the sides, then let them take turns; the record is on disk after every result."""
    workers: list[Worker] = []
    try:
        for run in runs:
            if len(workers) == 1 and args.start_together:
                time.sleep(args.head_start)
            workers.append(Worker(run, args))
            if not args.start_together:
                started(workers[-1], args, record, workers[-1].result())
        if args.start_together:
            for worker in workers:
                started(worker, args, record, worker.result())
        for case in cases(args.only):
            taking = [worker for worker in workers if takes(worker.run.side, case)]
            found: list[list[dict[str, Any]]] = [[] for _ in taking]
            for number in range(case["rounds"]):
                for worker, rounds in zip(taking, found, strict=True):
                    if time.time() < deadline and not (rounds and "error" in rounds[-1]):
                        rounds.append(worker.ask(case | {"round": number}))
            for worker, rounds in zip(taking, found, strict=True):
                if rounds:
                    take(worker, args, record, case, rounds)
    finally:
        for worker in workers:
            worker.stop()


def started(worker: Worker, args: argparse.Namespace, record: dict[str, Any], found: dict[str, Any] | None) -> None:
    entry = find(record, worker.run)
    if entry is None:
        entry = dataclasses.asdict(worker.run)
        record["runs"].append(entry)
    options = worker.options | {"experts": args.experts}
    entry |= {"options": options, "variables": ENVIRONMENT, "environment": machine(args), "failed": None}
    if found is None:
        entry["failed"] = list(worker.tail)
        print(f"{worker.run.name} did not start\n" + "\n".join(worker.tail), flush=True)
    else:
        # Beside the others' starts only what the plugin says of its own part is worth keeping, and no more than a
        # start by itself has said.
        startup = entry.setdefault("startup", {})
        times = {} if args.start_together else found
        if times or not startup.get(worker.state):
            startup[worker.state] = times | (worker.own_start or {})
    print(f"{worker.run.name}: {found}", flush=True)
    save(record, args.output)


def take(
    worker: Worker, args: argparse.Namespace, record: dict[str, Any], case: dict[str, Any], rounds: list[dict[str, Any]]
) -> None:
    entry = find(record, worker.run)
    assert entry is not None
    if entry["failed"]:
        return
    if rounds[-1].get("ended"):
        entry["failed"] = rounds[-1]["log"]
    row = case | rounds[-1] if "error" in rounds[-1] else summarise(case, rounds)
    entry["rows"] = {**entry.get("rows", {}), case_name(case): row}
    print(f"{worker.run.name}, {case_name(case)}: {row}", flush=True)
    save(record, args.output)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to repeat this run, and what tells two machines apart."""
    commit = os.environ.get("DSV32_COMMIT", "")
    if not commit:
        git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8],
        "commit": commit,
        "chosen": {
            name: value for name, value in vars(args).items() if name not in ("caches", "logs", "output", "merge")
        },
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def gpu_and_driver() -> tuple[str, str]:
    """Their names, without a CUDA context in this process."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return gpu, driver


def open_record(path: Path) -> dict[str, Any]:
    """The record to add to; one of this GPU and these versions if there is none."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("vllm", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    gpu, driver = gpu_and_driver()
    head = {"kind": "engine", "gpu": gpu, "driver": driver, "versions": versions}
    if not path.exists():
        return {**head, "runs": []}
    record = json.loads(path.read_text())
    merge(record, {**head, "runs": []})
    return record


def save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated: " + ", ".join(SIDES))
    parser.add_argument("--heads", default="128,16", help="attention heads: 128, or 16 as on one of 8 ranks")
    parser.add_argument("--kv-cache-dtype", default="fp8_ds_mla", help="comma-separated: fp8_ds_mla, bfloat16")
    parser.add_argument("--only", default="", help="words that a case's name must contain, e.g. 'decode B=1 L=2048'")
    parser.add_argument("--experts", type=int, default=16, help="routed experts, the same on every side (V3.2 has 256)")
    parser.add_argument("--start-together", action="store_true", help="start all sides at once; no start is timed then")
    parser.add_argument(
        "--head-start", type=float, default=0.0, help="then, seconds that the first side begins before the others"
    )
    parser.add_argument("--cache-gib", type=float, default=4.0, help="size of the KV cache")
    parser.add_argument("--options", default="{}", help="more arguments of vLLM's LLM for every side, as JSON")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case later than this after the start")
    parser.add_argument("--caches", type=Path, help="keep compiled code here, so that a second run starts warm")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--output", type=Path, help="the record (default: benchmarks/results/GPU/engine.json)")
    parser.add_argument("--table", action="store_true", help="print the record and stop")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="add these records to --output and stop")
    args = parser.parse_args()
    if args.output is None:
        args.output = CHECKOUT / "benchmarks" / "results" / model_of(gpu_and_driver()[0]).lower() / "engine.json"
    if args.table or args.merge:
        paths = [*([args.output] if args.output.exists() else []), *args.merge]
        record, *others = [json.loads(path.read_text()) for path in paths]
        for other in others:
            merge(record, other)
        save(record, args.output)
        show(record)
        return 0
    unknown = set(args.sides.split(",")) - set(SIDES)
    if unknown:
        parser.error(f"--sides: expected {', '.join(SIDES)}; got {', '.join(sorted(unknown))}")
    # So that the engine is stopped, too, when this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = open_record(args.output)
    deadline = time.time() + args.seconds
    for heads in args.heads.split(","):
        for cache in args.kv_cache_dtype.split(","):
            runs = [Run(side, int(heads), cache) for side in args.sides.split(",")]
            measure(runs, args, record, deadline)
    show(record)
    failed = [entry for entry in record["runs"] if entry["failed"]]
    wrong = [row for entry in record["runs"] for row in entry.get("rows", {}).values() if "error" in row]
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
