"""Compilation ahead of time: every variant of every kernel that is launched on a chip, compiled without the chip.

Each operation's `calls.py` makes the calls of a model with tensors that have no data. Every implementation that a chip
can choose is run on them, up to the moment at which Triton would compile: what it wanted to launch is the list. The
list serves the tests, the compile matrix of the documentation, and a run that fills Triton's disk cache in parallel
before its first launch.

    python -m dsv32_plugin.kernels.runtime.aot --target sm90 --operation select_topk
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..operations import FOLDERS
from .ahead import Launch, Launches, jobs_here
from .calls import Call, Spill
from .dispatch import implementation_module, implementations
from .target import TARGETS, Target, pretend

OPERATIONS = tuple(dict.fromkeys(FOLDERS.values()))
CUDA_SHARED_BYTES = 48 << 10
"""What a program may have before its launch must ask for more, which Triton does for its own part alone."""
CUDA_RESERVED_BYTES = 1 << 10
"""What CUDA takes for itself, and counts from sm90 on."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of one kernel. `name`, the kernel and the call that first launched it, is unique in the operation."""

    operation: str
    implementation: str
    name: str
    launch: Launch
    spill: Spill | None = None


@dataclasses.dataclass
class Record:
    """What one compilation gave; `error` is empty when the variant is good on its target."""

    target: str
    operation: str
    implementation: str
    case: str
    kernel: str = ""
    num_warps: int = 0
    num_stages: int = 0
    shared_bytes: int = 0
    registers: int = 0
    spill_bytes: int = 0
    spill_reason: str = ""
    seconds: float = 0.0
    error: str = ""


class Driver:
    """As much of a Triton driver as is asked before a kernel is compiled."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp_size)
        self.name = target.name

    def get_current_device(self) -> str:
        """A device of its own for every target: Triton keeps what it has compiled by device."""
        return self.name

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def driver_of(target: Target) -> Iterator[None]:
    """Inside the block Triton takes `target` for the device."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(Driver(target))
    try:
        with pretend(target):
            yield
    finally:
        driver._active = before


_RECORDING = threading.Lock()
"""The chip in use and Triton's hook are the process's, and targets are compiled by a thread each."""


@functools.cache
def _variants(target: Target) -> tuple[Variant, ...]:
    found: dict[Any, Variant] = {}
    with driver_of(target):
        for operation in OPERATIONS:
            described = importlib.import_module(f"dsv32_plugin.kernels.ops.{operation}.calls")
            for implementation in implementations(operation, target):
                module = implementation_module(operation, implementation)
                for call in described.calls():
                    for key, launch in _launches(getattr(module, call.operation), call):
                        spill = next((s for s in described.SPILLS if _spills(s, launch)), None)
                        name = f"{launch.kernel}-{call.name}"
                        found.setdefault(key, Variant(operation, implementation, name, launch, spill))
    return tuple(found.values())


def _launches(function: Callable[..., Any], call: Call) -> Iterator[tuple[Any, Launch]]:
    launches = Launches()
    with launches.record():
        function(**call.arguments)
    for launch in launches:
        if call.covers(launch):
            # AMD's launches also mark tensors below 2 GiB; the code differs in its address arithmetic only.
            marks = {k: [a for a in v if a[0] != "tt.pointer_range"] for k, v in launch.attributes.items()}
            launch = launch._replace(attributes=marks)
            yield (launch.function, repr(launch[1:4]), repr(launch.options())), launch


def _spills(spill: Spill, launch: Launch) -> bool:
    constants = launch.named_constants
    return spill.kernel == launch.kernel and all(constants[k] == v for k, v in spill.constants.items())


def variants(target: Target, operations: Iterable[str] = OPERATIONS) -> list[Variant]:
    """Every variant that is launched on `target`, under the first operation and implementation that launches it."""
    wanted = set(operations)
    with _RECORDING:
        found = _variants(target)
    return [variant for variant in found if variant.operation in wanted]


def compile_variant(variant: Variant, target: Target) -> Record:
    """Compile one variant and read its resources; problems are returned, not raised."""
    import triton
    from triton.backends.compiler import GPUTarget

    launch = variant.launch
    record = Record(
        target=target.name,
        operation=variant.operation,
        implementation=variant.implementation,
        case=variant.name,
        kernel=launch.kernel,
        spill_reason=variant.spill.reason if variant.spill else "",
    )
    start = time.perf_counter()
    try:
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        options = launch.options()
        record.num_warps = options["num_warps"]
        compiled = triton.compile(launch.source(), target=gpu, options=options)
        record.num_stages = compiled.metadata.num_stages
        record.shared_bytes = compiled.metadata.shared
        if target.is_cuda:
            record.registers, record.spill_bytes, static_bytes = _cuda_resources(compiled.asm["cubin"], target)
            record.shared_bytes += static_bytes
            if static_bytes and record.shared_bytes > CUDA_SHARED_BYTES:
                record.error = (
                    f"shared memory: {record.shared_bytes} bytes, a part of them static; no launch allows more"
                )
        else:
            record.registers, record.spill_bytes = _hip_resources(compiled.asm["amdgcn"])
    except Exception as error:
        record.error = _describe(error)
    record.seconds = round(time.perf_counter() - start, 2)
    accepted = variant.spill.spill_bytes if variant.spill else 0
    if record.shared_bytes > target.shared_bytes:
        record.error = f"shared memory: {record.shared_bytes} bytes, {target.name} has {target.shared_bytes}"
    elif record.spill_bytes > accepted:
        record.error = f"spills {record.spill_bytes} bytes, {accepted} are written down"
    return record


def _describe(error: BaseException) -> str:
    """The chain of causes, innermost first: Triton wraps the reason in the place where it was met."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return " <- ".join(f"{type(e).__name__}: {str(e)[-600:]}" for e in reversed(causes))


def _cuda_resources(cubin: bytes, target: Target) -> tuple[int, int, int]:
    """Registers and stack bytes a thread (Triton's kernels use a stack only to spill), and the shared bytes that a
    kernel declares beside those that Triton hands out; of the cubin's only kernel."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"no resource usage in: {text}")
    reserved = CUDA_RESERVED_BYTES if int(target.arch) >= 90 else 0
    return int(usage[1]), int(usage[2]), int(usage[3]) - reserved


def _hip_resources(assembly: str) -> tuple[int, int]:
    """Vector registers (accumulation registers included) and scratch bytes a lane."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    if registers is None or scratch is None:
        raise RuntimeError("no kernel metadata in the assembly")
    return int(registers[1]), int(scratch[1])


def compile_target(
    target: Target, operations: Iterable[str] = OPERATIONS, shard: tuple[int, int] = (0, 1)
) -> Iterator[Record]:
    """Compile every n-th variant of a target from the i-th, for shard (i, n), in a subprocess.

    An abort of the compiler costs one variant, not the run.
    """
    first, step = shard
    todo = variants(target, operations)[first::step]
    done = 0
    while done < len(todo):
        command = [sys.executable, "-m", __name__, "--json", "--target", target.name]
        command += ["--shard", str(first), str(step), "--skip", str(done)]
        for operation in operations:
            command += ["--operation", operation]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield Record(**json.loads(line))
                    done += 1
        if done < len(todo):
            lost = todo[done]
            error = f"the compiler ended with {process.returncode}"
            yield Record(target.name, lost.operation, lost.implementation, lost.name, error=error)
            done += 1


def precompile(target: Target, operations: Iterable[str] = OPERATIONS, jobs: int | None = None) -> list[Record]:
    """Fill Triton's disk cache for one chip with `jobs` processes (default: `jobs_here`), before a server starts."""
    chosen, step = tuple(operations), jobs or jobs_here()
    with concurrent.futures.ThreadPoolExecutor(step) as pool:
        shards = [(i, step) for i in range(step)]
        return [r for rows in pool.map(lambda s: list(compile_target(target, chosen, s)), shards) for r in rows]


def compile_all(
    targets: Iterable[Target], operations: Iterable[str] = OPERATIONS, *, jobs: int | None = None, share: int = 1
) -> list[Record]:
    """Compile the lists of several targets, one subprocess a target, `jobs` at a time.

    With `share` n each target compiles every n-th variant, starting at another one than the target before it, so
    that n targets together compile every variant.
    """
    chosen = tuple(operations)

    def compile_one(numbered: tuple[int, Target]) -> list[Record]:
        number, target = numbered
        return list(compile_target(target, chosen, (number % share, share)))

    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return [record for records in pool.map(compile_one, enumerate(targets)) for record in records]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsv32_plugin.kernels.runtime.aot", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--operation", choices=OPERATIONS, action="append", help="may be repeated; default: all")
    parser.add_argument("--case", default="", help="only variants whose name contains this")
    parser.add_argument(
        "--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th variant from I"
    )
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON record a line")
    args = parser.parse_args(argv)
    target = TARGETS[args.target]
    failures = 0
    first, step = args.shard
    for variant in variants(target, args.operation or OPERATIONS)[first::step][args.skip :]:
        if args.case not in variant.name:
            continue
        record = compile_variant(variant, target)
        failures += bool(record.error)
        if args.json:
            print(json.dumps(dataclasses.asdict(record)), flush=True)
        else:
            print(
                f"{record.target} {record.operation}/{record.implementation} {record.case}: "
                f"{record.registers} registers, "
                f"{record.shared_bytes} bytes shared, {record.spill_bytes} spilled, {record.seconds} s {record.error}",
                flush=True,
            )
    return int(failures > 0 and not args.json)


if __name__ == "__main__":
    sys.exit(main())
