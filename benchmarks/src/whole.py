"""`dsv32 bench whole`: a model of all its layers, cut over some GPUs and started as `dsv32 plan` says, side by side.

Real sizes and block-fp8 with dummy weights; what does not fit has fewer experts (`--experts 16` on one H200). Several
GPUs are cut in both ways that `dsv32 plan` knows, and the trained tiny model first answers with the same options, since
dummy weights prove nothing about ranks. Each row is on disk when it is measured: the same command goes on where it was
cut. A side that does not start has the reason in its row and no figure, and the next one's turn comes; `--retry` tries
it again. Without a GPU a tiny model rehearses it all.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from dsv32_plugin.benchmarks import dummy_weights, records, serve, whole_loads, whole_needle
from dsv32_plugin.benchmarks.records import BACKENDS, Record, Row
from dsv32_plugin.benchmarks.serve import MODEL
from dsv32_plugin.benchmarks.whole_loads import REAL, REHEARSAL, Shape
from dsv32_plugin.console import CommandError
from dsv32_plugin.core.config import DsaConfig
from dsv32_plugin.tools import plan as plans
from dsv32_plugin.tools import serving, tiny
from dsv32_plugin.tools.plan import CHIPS, MODELS, Way

LAYOUTS = {"vllm": ("TP", "DP"), "sglang": ("DP", "TP")}
"""How several GPUs share a model, in the order of interest: each matrix, or attention whole on each (`dsv32 plan`)."""
POOL = re.compile(r"KV cache size: ([\d,]+) tokens|max_total_num_tokens=(\d+)")
WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB|Load weight end.*mem usage=([\d.]+) GB")
"""What engines say of a rank when they start."""
FAULT = re.compile(r".*\b[A-Za-z]*(?:Error|Exception)\b: .*")
METHOD = (
    "One client, prompts of random token ids, answers of fixed length; block-fp8 weights drawn so that selections "
    "scatter and all experts are visited. B=1: new prompts, one after the other. B above 1: prompts in the prefix "
    "cache, so that all decode together, at most the largest power of two that the caches hold. Rates: Poisson "
    "arrivals. Memory is of the GPU that holds most, planned by `dsv32 plan`. Dense has no indexer and a bfloat16 "
    "cache"
)


LAST_LINES = 6
"""Of a log, in the reason of a failure."""
MOST_ALONE = 64
"""Sequences of a batch on one GPU."""
REHEARSED = tiny.TinySpec(fp8=True)
ON_CPU = {
    "vllm": "--dtype float32 --enforce-eager --kv-cache-memory-bytes 100663296 --max-model-len {}",
    "sglang": "--dtype float32 --skip-server-warmup --max-total-tokens 8192 --context-length {}",
}


@dataclass(frozen=True)
class Plan:
    engine: str
    model: str = "V3.2"
    gpus: int = 1
    layers: int = 0
    """0: all."""
    experts: int = 256
    sides: Sequence[str] = BACKENDS
    layouts: Sequence[str] = ("TP",)
    only: str = ""
    seconds: float = math.inf
    start_s: float = 900
    retry: bool = False
    options: Sequence[str] = ()
    logs: Path | None = None
    """Where the servers' logs stay."""
    chip: str = ""
    """Of `dsv32 plan`; none without a GPU."""

    @property
    def shape(self) -> Shape:
        return REAL if self.chip else REHEARSAL

    def sizes(self, side: str) -> dict[str, Any]:
        """The config.json: the published one with fewer layers and experts, or without the indexer."""
        found = MODELS[self.model][1] if self.chip else REHEARSED.config()
        layers = self.layers or found["num_hidden_layers"]
        changed: dict[str, Any] = {
            "num_hidden_layers": layers,
            "first_k_dense_replace": min(found["first_k_dense_replace"], layers - 1),
        }
        if self.chip:
            changed |= {"n_routed_experts": self.experts, "num_experts": self.experts}
        return serve.as_dense(found | changed) if side == "dense" else found | changed

    def shares(self, layout: str) -> int:
        return self.gpus if layout == "DP" else 1

    def way(self, layout: str, context: int) -> Way | None:
        """What `dsv32 plan` says of this layout; None without a GPU."""
        if not self.chip:
            return None
        config, aim = DsaConfig.from_hf(self.sizes("plugin")), "throughput" if self.shares(layout) > 1 else "latency"
        ways = plans.ways(config, MODEL, CHIPS[self.chip], 1, self.gpus, context, fp8=True)
        return next(way for way in ways if (way.engine, way.aim) == (self.engine, aim))

    def launch(self, layout: str, side: str, context: int) -> list[str]:
        """The engine's options. Raises ServerError where the model does not fit."""
        way = self.way(layout, context)
        if way is None:
            options = shlex.split(plans.cut_options(self.engine, (1, self.gpus), self.shares(layout)))
            options += shlex.split(ON_CPU[self.engine].format(context))
        elif not way.command:
            raise serving.ServerError(f"{way.limit}; give fewer --experts")
        else:
            options = shlex.split(way.command)
            options = options[options.index(MODEL) + 1 :]
        if side == "dense" and "--kv-cache-dtype" in options:
            at = options.index("--kv-cache-dtype")
            del options[at : at + 2]
        return [*options, "--served-model-name", MODEL, *self.options]

    def cases(self, pool: int) -> list[dict[str, Any]]:
        """What a server whose caches hold so many tokens is asked, short before long."""
        shape = self.shape
        found: list[dict[str, Any]] = []
        for length in shape.lengths:
            fits = max(1, pool // (length + 1 + shape.answer))
            asked = (batch for batch in shape.batches if self.gpus > 1 or batch <= MOST_ALONE or not self.chip)
            batches = (batch if batch <= fits else 1 << (fits.bit_length() - 1) for batch in asked)
            found += [{"L": length, "B": batch} for batch in dict.fromkeys(batches)]
        if self.gpus > 1:
            found += [
                {"workload": name, "load": serve.load_name(rate)}
                for name, (*_, rates) in shape.rates.items()
                for rate in rates
            ]
        return [case for case in found if set(self.only.split()) <= set(records.name_of(case).split())]


def sides(gpus: int) -> tuple[str, ...]:
    """Those that are worth a start: of several GPUs the pair."""
    return BACKENDS if gpus == 1 else BACKENDS[:2]


def layouts(engine: str, gpus: int) -> tuple[str, ...]:
    return LAYOUTS[engine] if gpus > 1 else ("TP",)


def chip() -> str:
    """The GPU here. Raises CommandError for one that `dsv32 plan` does not know."""
    import torch

    name = records.model_of(torch.cuda.get_device_name())
    if name not in CHIPS:
        raise CommandError(f"expected a GPU of {', '.join(CHIPS)}, whose memory dsv32 plan knows; got {name}")
    return name


def run(
    plan: Plan, output: Path, *, on_state: Callable[[str], None] = lambda text: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Record:  # fmt: skip
    """Measure what the record at `output` does not have yet.

    Raises:
        CommandError: nothing can be measured here, or `output` is of another commit, machine or method.
    """
    check(plan)
    record = opened(output)
    deadline = time.monotonic() + plan.seconds
    with serving.stopping_on_sigterm():
        for layout, side in product(plan.layouts, plan.sides):
            subject = Subject(plan, layout, side, record, deadline, on_state)
            for row in () if subject.late() else subject.rows():
                on_row(row)
                record["rows"] = records.replaced(record["rows"], [row])
                records.write(record, output)
    return record


def check(plan: Plan) -> None:
    import torch

    if find_spec(plan.engine) is None:
        raise CommandError(f"{plan.engine} is not installed; pip install 'dsv32-plugin[{plan.engine}]'")
    count = torch.cuda.device_count()
    if plan.chip and count < plan.gpus:
        raise CommandError(f"--gpus: expected at most the {count} that torch sees here, got {plan.gpus}")
    DsaConfig.from_hf(plan.sizes("plugin")).check(1, attention=plan.gpus, experts=1)
    if "plugin" in plan.sides:
        serve.check_plugin()


def opened(output: Path) -> Record:
    """The record to go on with, or a new one."""
    new: Record = {**records.provenance("whole"), "method": METHOD, "rows": []}
    if not output.exists():
        return new
    old = records.read(output, "whole")
    for key in ("gpu", "cuda", "versions", "commit", "method"):
        if old[key] != new[key]:
            raise CommandError(
                f"{output}: expected a record with {key} {new[key]}, got {old[key]}; give another --output"
            )
    commands = dict.fromkeys((*old["command"].split("; "), new["command"]))
    return {**new, "command": "; ".join(commands), "rows": old["rows"]}


@dataclass
class Subject:
    """One side of one layout."""

    plan: Plan
    layout: str
    side: str
    record: Record
    deadline: float
    on_state: Callable[[str], None]

    def row(self, found: Row, **case: Any) -> Row:
        plan, sizes = self.plan, self.plan.sizes(self.side)
        about = {"model": plan.model if plan.chip else "tiny", "layers": sizes["num_hidden_layers"]}
        about |= {"experts": sizes["n_routed_experts"], "engine": plan.engine, "launch": f"{self.layout}{plan.gpus}"}
        return {"case": about | case, "side": self.side, **found}

    def known(self, **case: Any) -> Row | None:
        """What the record has of a case; with --retry no failure."""
        wanted = self.row({}, **case)
        same = (row for row in self.record["rows"] if (row["case"], row["side"]) == (wanted["case"], self.side))
        row = next(same, None)
        return None if row is None or ("error" in row and self.plan.retry) else row

    def left(self, start: Row) -> list[dict[str, Any]]:
        pool = int(start["figures"]["pool_tokens"]["median"])
        return [case for case in self.plan.cases(pool) if self.known(**case) is None]

    def rows(self) -> Iterator[Row]:
        start = self.known(workload="start")
        if start and ("error" in start or not self.left(start)):
            return
        if (needle := self.needle()) is not None:
            if "error" in needle and self.late():
                return
            yield needle
            # In-tree need not serve sizes as small as these.
            if "error" in needle and self.side == "plugin":
                yield self.row({"error": f"the needle: {needle['error']}"}, workload="start")
                return
        try:
            with tempfile.TemporaryDirectory(prefix="dsv32-whole-") as folder:
                yield from self.served(Path(folder), start)
        except serving.ServerError as error:
            if not self.late():
                # It started before: what that gave stays.
                yield self.row(
                    {"error": str(error)[-2000:]}, **(self.left(start)[0] if start else {"workload": "start"})
                )

    def late(self) -> bool:
        """Whether the time is up; what a server did not do by then, it did not fail to do."""
        return time.monotonic() >= self.deadline

    def wait_s(self) -> float:
        return min(self.plan.start_s, self.deadline - time.monotonic())

    def needle(self) -> Row | None:
        """The trained model behind the same options, where there are ranks to prove; None once it has answered."""
        if self.plan.gpus == 1 or self.side == "dense" or self.known(workload="needle"):
            return None
        self.on_state(f"{self.layout}{self.plan.gpus} {self.side}: the needle")
        try:
            options = self.plan.launch(self.layout, self.side, whole_needle.CONTEXT)
            right = whole_needle.ask(self.plan.engine, self.side, options, self.plan.gpus, self.wait_s())
        except serving.ServerError as error:
            return self.row({"error": reason(error)}, workload="needle")
        return self.row({"figures": {"needles_right": {"median": right}}}, workload="needle")

    def served(self, folder: Path, start: Row | None) -> Iterator[Row]:
        """Start the server, and ask what the record lacks while there is time. Raises ServerError if it did not."""
        plan, model = self.plan, folder / "model"
        options = [*plan.launch(self.layout, self.side, plan.shape.context), "--load-format", "dummy"]
        tiny.write_without_weights(plan.sizes(self.side), model)
        env = {**serve.ENVIRONMENT, **dummy_weights.variables(folder), "DSV32_PLUGIN": str(int(self.side == "plugin"))}
        name = f"{self.layout}{plan.gpus} {self.side}"
        log_path = (plan.logs or folder) / f"{plan.model} {name}.log".replace(" ", "-")
        server = serving.SERVERS[plan.engine](model, options, log_path=log_path, env=env)
        with server:
            say = self.on_state
            try:
                ready_s = server.wait_until_ready(self.wait_s(), lambda s: say(f"{name}: starting, {s:.0f} s"))
                served_by = serve.served_by(server, plan.engine, self.side)
                if dummy_weights.SAID not in server.log():
                    raise serving.ServerError(f"{plan.engine} drew its own dummy weights")
            except serving.ServerError as error:
                raise serving.ServerError(reason(error, server.log())) from error
            if start is None:
                start = self.row(self.started(server, ready_s) | {"served_by": served_by}, workload="start")
                yield start
            for case in self.left(start):
                if self.late():
                    return
                say(f"{name}: {records.name_of(case)}")
                try:
                    found = whole_loads.ask(server.url, plan.shape, case, plan.shares(self.layout))
                    server.check_running()
                except serving.ServerError as error:
                    yield self.row({"error": reason(error, server.log())}, **case)
                    return
                if "figures" in found:
                    found["figures"] |= used(plan.gpus)
                yield self.row(found, **case)

    def started(self, server: serving.Server, ready_s: float) -> Row:
        """What the start took, and what `dsv32 plan` says that it takes."""
        log, plan = server.log(), self.plan
        pools = [int((a or b).replace(",", "")) for a, b in POOL.findall(log)]
        if not pools:
            raise serving.ServerError(f"the log does not say how many tokens the caches hold\n{server.log_tail()}")
        weights = [float(a or b) for a, b in WEIGHTS.findall(log)]
        found = {"ready_s": round(ready_s, 1), "pool_tokens": max(pools) * plan.shares(self.layout)}
        found |= {"weights_gib": max(weights)} if weights else {}
        way = plan.way(self.layout, plan.shape.context)
        if way is not None and self.side == "plugin":
            planned = {"weights_gib": way.gib["weights"], "pool_tokens": way.tokens, "used_gib": sum(way.gib.values())}
            found |= {f"planned_{name}": round(value, 2) for name, value in planned.items()}
        figures = {name: {"median": value} for name, value in found.items()} | used(plan.gpus)
        return {"figures": figures, "server": " ".join(server.command[2:])}


def used(gpus: int) -> dict[str, dict[str, float]]:
    """The memory of the GPU that holds most; nothing without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"used_gib": {"median": round(max(map(float, lines[:gpus])) / 1024, 2)}}


def reason(error: serving.ServerError, log: str = "") -> str:
    """The first fault that the log names, with the rank that it is of, and how the error begins and ends."""
    text = str(error)
    first, lines = FAULT.search(log or text), text.splitlines()
    told = [first.group().strip()[:500]] if first else []
    return "\n".join([*told, *lines[:1], *lines[1:][-LAST_LINES:]])[:2000]


def unfinished(plan: Plan, record: Record) -> bool:
    """Whether the same command would go on."""
    plan = replace(plan, retry=False)
    for layout, side in product(plan.layouts, plan.sides):
        subject = Subject(plan, layout, side, record, 0.0, lambda text: None)
        start = subject.known(workload="start")
        if start is None or ("figures" in start and subject.left(start)):
            return True
    return False
