"""`dsv32 bench serve`: the real server of an engine under an open-loop load, with the plugin, in-tree and dense.

Real sizes with few layers and dummy weights, so that one GPU holds them: every request does all the work of those
layers, and the answers mean nothing. With two numbers of layers the times are extended to the whole model, and marked.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks import records, serve_client
from dsv32_plugin.benchmarks.records import Record, Row
from dsv32_plugin.benchmarks.serve_client import WORKLOADS
from dsv32_plugin.benchmarks.sizes import REAL
from dsv32_plugin.console import CommandError
from dsv32_plugin.tools import demo, doctor, serving, tiny

FULL_LAYERS = 61
MODEL = "bench"
PROOF = re.compile(r"dsv32: serving .*")
"""The line of the server's log that only our model writes."""
WARM_UPS = 8
"""Requests of each workload, all at once, before the first is measured: engines compile kernels when they meet them."""
ENVIRONMENT = {
    **demo.ENVIRONMENT,
    # vLLM would compile FlashInfer's sampler at the first start, for minutes; greedy answers do not use it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Nor every DeepGEMM kernel there is: those that the load needs are compiled while it warms up.
    "VLLM_DEEP_GEMM_WARMUP": "skip",
}
"""The same for every server."""

METHOD = (
    "One client. Requests come alone, each sent when the last is answered; in an open loop with Poisson arrivals, "
    "whether or not the server keeps up; or in a burst, all at once. Prompts of random token ids, answers of fixed "
    "length; every backend gets the same requests, after a warm-up with others. {model}."
)
TOGETHER_CACHE = 6 << 30
TOGETHER = " The servers shared one GPU and took turns, load by load, so that one worked at a time."
DUMMY = (
    "DeepSeek-V3.2's sizes with few layers, {heads} heads on one GPU, {experts} of 256 experts, dummy bfloat16 weights"
)
EXTRAPOLATION = (
    "t({full}) = t({b}) + ({full} - {b}) * (t({b}) - t({a})) / ({b} - {a}), from the medians with {a} and {b} layers, "
    "of requests that were alone, so that nothing queued: each further layer takes as long as those between. The range "
    "of the time of a token is what the 10th and 90th percentiles of both allow: with few layers much of it is the "
    "host's, which differs from request to request. It is a model of {full} such layers on one GPU, not of a served "
    "DeepSeek-V3.2"
)


@dataclass(frozen=True)
class Plan:
    """What is served and how it is loaded."""

    engine: str = "vllm"
    backends: Sequence[str] = ("plugin",)
    workloads: Sequence[str] = ("chat",)
    layers: Sequence[int] = (2,)
    experts: int = 256
    heads: int = 128
    rates: Sequence[float] = (0.0, 2.0, math.inf)
    """Requests a second, from low to high. 0: each alone, sent when the last is answered; infinite: all at once."""
    requests: int = 64
    longest: int = 131072
    seed: int = 0
    start_s: float = 900
    answer_s: float = 600
    checkpoint: Path | None = None
    """Serve this one in place of dummy weights; then `layers`, `experts` and `heads` are its own."""
    together: bool = False
    """All servers at once on one GPU, loaded in turn; else one after the other."""
    options: Sequence[str] = ()
    """More options for the engine's command."""


def run(
    plan: Plan, output: Path, *, on_state: Callable[[str], None] = lambda text: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Record:  # fmt: skip
    """Start, load and stop the servers, one after the other or together; the record is on disk after each row.

    A record of the same commit, versions, GPU and method that is at `output` is added to, so that servers can be
    measured one by one; what is measured again replaces what it had.

    Raises:
        CommandError: the engine or a part of it is missing, or the plugin would not serve.
    """
    check(plan)
    dummy = DUMMY.format(heads=plan.heads, experts=plan.experts)
    method = METHOD.format(model=f"Checkpoint {plan.checkpoint.name}" if plan.checkpoint else dummy)
    method += TOGETHER if plan.together else ""
    record: Record = {**records.provenance("serve"), "method": method, "seed": plan.seed, "rows": []}
    if output.exists():
        record = merged(records.read(output, "serve"), record)
    served = list(itertools.product(plan.backends, plan.layers))
    with serving.stopping_on_sigterm():
        for group in [served] if plan.together else [[one] for one in served]:
            for row in measure(plan, group, on_state):
                on_row(row)
                record = merged(record, {**record, "rows": [row]})
                records.write(record, output)
    return record


def merged(old: Record, new: Record) -> Record:
    """Both records as one where they are of one kind, else the new one."""
    if any(old[key] != new[key] for key in ("gpu", "cuda", "versions", "commit", "method", "seed")):
        return new
    commands = dict.fromkeys((*old["command"].split("; "), *new["command"].split("; ")))
    rows = records.replaced(old["rows"], new["rows"])
    extrapolate(rows)
    return {**new, "command": "; ".join(commands), "rows": rows}


def check(plan: Plan) -> None:
    """What can be known before a server is started."""
    if find_spec(plan.engine) is None:
        raise CommandError(f"{plan.engine} is not installed; pip install 'dsv32-plugin[{plan.engine}]'")
    import torch

    others = [backend for backend in plan.backends if backend != "plugin"]
    if others and not torch.cuda.is_available():
        raise CommandError(
            f"--backend {','.join(others)}: {plan.engine} alone does not serve these models without a GPU"
        )
    if plan.together and plan.engine != "vllm":
        raise CommandError("--together needs --engine vllm, whose servers can be given shares of a GPU")
    if "dense" in plan.backends and plan.checkpoint is not None:
        raise CommandError("--backend dense needs dummy weights; leave --checkpoint out")
    if plan.checkpoint is None and max(plan.layers) >= FULL_LAYERS:
        raise CommandError(f"--layers: expected fewer than {FULL_LAYERS}; dsv32 bench whole measures the whole model")
    if "plugin" in plan.backends:
        check_plugin()


def check_plugin() -> None:
    """Raise CommandError where the doctor finds that the plugin would not serve."""
    wrong = [finding for finding in doctor.examine() if finding.level == "wrong"]
    if wrong:
        listed = "; ".join(f"{finding.name}: {finding.found}" for finding in wrong)
        raise CommandError(f"the plugin would not serve ({listed}); see dsv32 doctor")


def measure(plan: Plan, group: Sequence[tuple[str, int]], on_state: Callable[[str], None]) -> Iterator[Row]:
    """The rows of some servers that run at once, as they are measured: each load on one server after the other."""
    with ExitStack() as stack:
        servers = [Subject(plan, backend, layers, stack, on_state) for backend, layers in group]
        for server in servers:
            server.prepare()
        for workload, rate in itertools.product(plan.workloads, plan.rates):
            for server in servers:
                yield server.row(workload, rate)


class Subject:
    """A server that starts when this is made and stops with `stack`. Once it has failed, its rows say why."""

    def __init__(
        self, plan: Plan, backend: str, layers: int, stack: ExitStack, on_state: Callable[[str], None]
    ) -> None:
        self.plan, self.backend, self._on_state = plan, backend, on_state
        self.name = f"{plan.engine} {backend}, {layers} layers"
        self.layers = layers
        self.about: Row = {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv32-bench-")))
        model = plan.checkpoint or folder / "model"
        if plan.checkpoint is None:
            write_model(model, plan, backend, layers)
        else:
            self.layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        switch = {"DSV32_PLUGIN": "1" if backend == "plugin" else "0"}
        self._server = serving.SERVERS[plan.engine](
            model, options(plan, backend), log_path=folder / "server.log", env={**ENVIRONMENT, **switch}
        )
        self.about["server"] = " ".join(self._server.command[2:])
        stack.enter_context(self._server)

    def prepare(self) -> None:
        """Wait for it, make sure whose code serves, and let it compile what the loads need."""
        try:
            ready_s = self._server.wait_until_ready(
                self.plan.start_s, lambda s: self._on_state(f"{self.name}: starting, {s:.0f} s")
            )
            if not self.plan.together:  # then it is ready while another is waited for
                self.about["ready_s"] = round(ready_s, 1)
            self.about["served_by"] = served_by(self._server, self.plan.engine, self.backend)
            warm_up = replace(self.plan, seed=self.plan.seed + 1, requests=min(WARM_UPS, self.plan.requests))
            for workload in self.plan.workloads:
                self._on_state(f"{self.name}: {workload}, warming up")
                load(self._server.url, warm_up, workload, math.inf, lambda: None)
        except serving.ServerError as error:
            self.about["error"] = str(error)[-2000:]

    def row(self, workload: str, rate: float) -> Row:
        found: Row = {}
        if "error" not in self.about:
            state = functools.partial(
                _say, self._on_state, f"{self.name}: {workload}", self.plan.requests, itertools.count(1)
            )
            found = load(self._server.url, self.plan, workload, rate, state)
            try:
                self._server.check_running()
            except serving.ServerError as error:
                found = {}
                self.about["error"] = str(error)[-2000:]
        case = {"engine": self.plan.engine, "workload": workload, "load": load_name(rate), "layers": self.layers}
        return {"case": case, "side": self.backend, **self.about, **found}


def served_by(server: serving.Server, engine: str, backend: str) -> str:
    """Whose code serves, by the server's log. Raises ServerError where it is not the backend's."""
    proof = PROOF.search(server.log())
    if (proof is not None) != (backend == "plugin"):
        raise serving.ServerError(f"another backend serves than {backend}\n{server.log_tail()}")
    return proof.group() if proof else f"{engine}'s own code"


def _say(on_state: Callable[[str], None], label: str, total: int, numbers: Iterator[int]) -> None:
    on_state(f"{label}, {next(numbers)} of {total}")


def load(url: str, plan: Plan, workload: str, rate: float, on_answer: Callable[[], None]) -> Row:
    # Another seed for each rate: prompts that the server has seen would come from its prefix cache.
    seed = f"{plan.seed} {load_name(rate)}"
    sent = serve_client.requests(WORKLOADS[workload], plan.requests, rate, seed, longest=plan.longest)
    begun = time.process_time()
    answers, seconds = serve_client.drive(
        url, MODEL, sent, alone=rate == 0, timeout_s=plan.answer_s, on_answer=on_answer
    )
    busy = (time.process_time() - begun) / seconds
    return {**serve_client.summary(answers, seconds), "client_busy": round(busy, 2)}


def load_name(rate: float) -> str:
    return {0.0: "alone", math.inf: "burst"}.get(rate, f"{rate:g}/s")


def write_model(folder: Path, plan: Plan, backend: str, layers: int) -> None:
    """A checkpoint folder without weights, for engines that are told to make them up."""
    tiny.write_without_weights(config(backend, layers, plan.experts, plan.heads), folder)


def config(backend: str, layers: int, experts: int, heads: int, *, dense_layers: int = 1) -> dict[str, Any]:
    """The config.json of DeepSeek-V3.2 with fewer layers and experts; for dense MLA without the indexer."""
    found = replace(
        REAL, num_hidden_layers=layers, n_routed_experts=experts, num_attention_heads=heads,
        first_k_dense_replace=dense_layers,
    ).config()  # fmt: skip
    return as_dense(found) if backend == "dense" else found


def as_dense(config: dict[str, Any]) -> dict[str, Any]:
    """The same sizes without the indexer, as a model that both engines have."""
    kept = {key: value for key, value in config.items() if not key.startswith("index")}
    return {**kept, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}


def options(plan: Plan, backend: str) -> list[str]:
    """The same for every backend but for the cache: dense MLA reads bfloat16, the sparse kernels their fp8 rows."""
    import torch

    on_gpu = torch.cuda.is_available()
    if plan.engine == "sglang":
        common = ["--served-model-name", MODEL, "--context-length", str(plan.longest)]
        if not on_gpu:
            common += ["--dtype", "float32", "--skip-server-warmup"]
        elif backend != "dense":
            common += ["--kv-cache-dtype", "fp8_e4m3"]
    else:
        common = ["--served-model-name", MODEL, "--max-model-len", str(plan.longest), "--max-num-seqs", "256"]
        if not on_gpu:
            common += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20)]
        elif backend != "dense":
            common += ["--kv-cache-dtype", "fp8_ds_mla"]
        if on_gpu and plan.together:
            # With a cache of a given size the engine need not measure the memory, which others change meanwhile.
            share = 0.9 / (len(plan.backends) * len(plan.layers))
            common += ["--gpu-memory-utilization", f"{share:.2f}", "--kv-cache-memory-bytes", str(TOGETHER_CACHE)]
    dummy = [] if plan.checkpoint else ["--load-format", "dummy"]
    return [*common, *dummy, *plan.options]


def extrapolate(rows: list[Row], full: int = FULL_LAYERS) -> None:
    """Where requests were alone on two depths of a model, add to the deeper row what the whole model would take."""
    alone = [row for row in rows if "figures" in row and row["case"]["load"] == load_name(0)]
    for row in alone:
        same = {**row["case"], "layers": 0}, row["side"]
        twins = [other for other in alone if ({**other["case"], "layers": 0}, other["side"]) == same]
        shallow = min(twins, key=lambda twin: int(twin["case"]["layers"]))
        a, b = shallow["case"]["layers"], row["case"]["layers"]
        if a == b:
            continue

        def extended(name: str, of_a: str, of_b: str, row: Row = row, shallow: Row = shallow) -> float:
            a, b = shallow["case"]["layers"], row["case"]["layers"]
            before, after = shallow["figures"][name][of_a], row["figures"][name][of_b]
            return float(round(after + (full - b) / (b - a) * (after - before), 2))

        row["extrapolated"] = {
            "layers": full,
            **{name: extended(name, "median", "median") for name in ("ttft_ms", "tpot_ms")},
            "tpot_ms_range": [extended("tpot_ms", "high", "low"), extended("tpot_ms", "low", "high")],
            "method": EXTRAPOLATION.format(full=full, a=a, b=b),
        }
