"""Ahead-of-time compilation: every kernel configuration that can be chosen on a chip, compiled without the chip.

Each operation's `triton.py` (and `hopper.py`) has `aot_cases(target) -> list[AotCase]`. The same list serves the
tests, the compile matrix of the documentation, and a server that fills Triton's disk cache in parallel before its
first launch.

    python -m dsv32_plugin.kernels.runtime.aot --target sm90 --operation select_topk
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

OPERATIONS = (
    "norm_rope_cache",
    "index_query",
    "rope_query",
    "gather_cache",
    "index_logits",
    "select_topk",
    "index_topk",
    "sparse_mla",
    "dense_mla",
    "masked_mha",
)
IMPLEMENTATIONS = ("triton", "hopper")
CUDA_SHARED_BYTES = 48 << 10
"""What a program may have before its launch must ask for more, which Triton does for its own part alone."""
CUDA_RESERVED_BYTES = 1 << 10
"""What CUDA takes for itself, and counts from sm90 on."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel's configuration may depend on: nothing else about a chip is asked for."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    e4m3: bool
    """Triton converts and multiplies e4m3fn here; elsewhere its bytes are converted by hand."""

    @property
    def is_cuda(self) -> bool:
        return self.backend == "cuda"


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", "cuda", 80, 32, 163 << 10, e4m3=False),
        Target("sm86", "cuda", 86, 32, 99 << 10, e4m3=False),
        Target("sm89", "cuda", 89, 32, 99 << 10, e4m3=True),
        Target("sm90", "cuda", 90, 32, 227 << 10, e4m3=True),
        Target("sm100", "cuda", 100, 32, 227 << 10, e4m3=True),
        Target("sm120", "cuda", 120, 32, 99 << 10, e4m3=True),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, e4m3=False),
        Target("gfx950", "hip", "gfx950", 64, 160 << 10, e4m3=True),
    )
}


@functools.cache
def target_of_device(index: int) -> Target:
    """The target of one GPU of this process; a chip outside TARGETS gets its measured limits and its own name."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return TARGETS.get(arch, Target(arch, "hip", arch, properties.warp_size, 64 << 10, e4m3=False))
    capability = properties.major * 10 + properties.minor
    known = TARGETS.get(f"sm{capability}")
    if known is not None:
        return known
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Target(f"sm{capability}", "cuda", capability, 32, shared, e4m3=capability >= 89)


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One configuration of one kernel.

    name: readable and unique within the operation, e.g. "decode-h16-fp8".
    kernel: the function under @triton.jit (or Gluon's @gluon.jit).
    signature: type of every argument that is not a constexpr, as Triton writes it, with ":16" where the launch
        guarantees divisibility by 16 (pointers: alignment), e.g. {"x_ptr": "*bf16:16", "num_rows": "i32"}.
        Integers whose value varies belong in `do_not_specialize`, or the launch may ask for a variant not listed here.
    constexprs: value of every tl.constexpr argument; an optional pointer that is None belongs here too.
    num_stages: None where the launch does not name it and the backend's default holds.
    spill_bytes: spills that were looked at and accepted on this target; `spill_reason` says why.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    spill_bytes: int = 0
    spill_reason: str = ""

    def source(self) -> Any:
        """The source as a launch would build it, so that both meet in Triton's disk cache."""
        from triton.compiler import ASTSource
        from triton.runtime.jit import JITFunction

        names = self.kernel.arg_names
        both = self.signature.keys() & self.constexprs.keys()
        missing = set(names) - self.signature.keys() - self.constexprs.keys()
        unknown = (self.signature.keys() | self.constexprs.keys()) - set(names)
        if both or missing or unknown:
            raise ValueError(f"{self.name}: arguments given twice {both}, missing {missing}, unknown {unknown}")
        types = {n: self.signature[n].split(":")[0] if n in self.signature else "constexpr" for n in names}
        constants = {(names.index(n),): value for n, value in self.constexprs.items()}
        attributes = {}
        for i, (name, parameter) in enumerate(zip(names, self.kernel.params, strict=True)):
            kind = self.signature.get(name, "")
            if kind.endswith(":16"):
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif kind.startswith(("*", "i", "u")) and not parameter.do_not_specialize:
                attributes[(i,)] = []
        source_class = ASTSource
        if type(self.kernel) is not JITFunction:
            from triton.experimental.gluon._runtime import GluonASTSource

            source_class = GluonASTSource
        return source_class(self.kernel, types, constants, attributes)


@dataclasses.dataclass
class Record:
    """What one compilation gave; `error` is empty when the configuration is good on its target."""

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


def modules(operations: Iterable[str] = OPERATIONS) -> Iterator[tuple[str, str, Any]]:
    """(operation, implementation, module) of every kernel module that exists."""
    for operation in operations:
        package = f"dsv32_plugin.kernels.ops.{operation}"
        for implementation in IMPLEMENTATIONS:
            if importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.{implementation}"):
                yield operation, implementation, importlib.import_module(f"{package}.{implementation}")


def cases(target: Target, operations: Iterable[str] = OPERATIONS) -> list[tuple[str, str, AotCase]]:
    """Every configuration that can be chosen on `target`, as (operation, implementation, case)."""
    return [
        (operation, implementation, case)
        for operation, implementation, module in modules(operations)
        for case in module.aot_cases(target)
    ]


def compile_case(operation: str, implementation: str, case: AotCase, target: Target) -> Record:
    """Compile one configuration and read its resources; problems are returned, not raised."""
    import triton
    from triton.backends.compiler import GPUTarget

    record = Record(
        target=target.name,
        operation=operation,
        implementation=implementation,
        case=case.name,
        kernel=case.kernel.__name__,
        num_warps=case.num_warps,
        spill_reason=case.spill_reason,
    )
    start = time.perf_counter()
    try:
        options = {"num_warps": case.num_warps, **case.options}
        if case.num_stages is not None:
            options["num_stages"] = case.num_stages
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        compiled = triton.compile(case.source(), target=gpu, options=options)
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
    if record.shared_bytes > target.shared_bytes:
        record.error = f"shared memory: {record.shared_bytes} bytes, {target.name} has {target.shared_bytes}"
    elif record.spill_bytes > case.spill_bytes:
        record.error = f"spills {record.spill_bytes} bytes, {case.spill_bytes} are written down"
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
    """Compile every n-th case of a target from the i-th, for shard (i, n), in a subprocess.

    An abort of the compiler costs one case, not the run.
    """
    first, step = shard
    todo = cases(target, operations)[first::step]
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
            operation, implementation, case = todo[done]
            error = f"the compiler ended with {process.returncode}"
            yield Record(target.name, operation, implementation, case.name, error=error)
            done += 1


def jobs_here() -> int:
    """How many processes compile at once: one for each core that this process may use, up to 32."""
    return min(32, len(os.sched_getaffinity(0)))


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

    With `share` n each target compiles every n-th configuration, starting at another one than the target before it, so
    that n targets together compile every configuration.
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
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th case from I")
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON record a line")
    args = parser.parse_args(argv)
    target = TARGETS[args.target]
    failures = 0
    first, step = args.shard
    for operation, implementation, case in cases(target, args.operation or OPERATIONS)[first::step][args.skip :]:
        if args.case not in case.name:
            continue
        record = compile_case(operation, implementation, case, target)
        failures += bool(record.error)
        if args.json:
            print(json.dumps(dataclasses.asdict(record)), flush=True)
        else:
            print(
                f"{record.target} {operation}/{implementation} {case.name}: {record.registers} registers, "
                f"{record.shared_bytes} bytes shared, {record.spill_bytes} spilled, {record.seconds} s {record.error}",
                flush=True,
            )
    return int(failures > 0 and not args.json)


if __name__ == "__main__":
    sys.exit(main())
