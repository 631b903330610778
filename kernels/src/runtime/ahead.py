"""Compile in parallel what a run will launch, before it runs: the first requests of a server then compile nothing."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import Logger
from typing import Any, NamedTuple

PACKAGE = __name__.removesuffix(".runtime.ahead")
NUMBER_BYTES = 2
SLOW = (".ops.select_topk.", ".ops.sparse_mla.", ".ops.dense_mla.")


def jobs_here() -> int:
    """How many processes compile at once: one for each core that this process may use, up to 32."""
    return min(32, len(os.sched_getaffinity(0)))


class Launch(NamedTuple):
    """One variant of one kernel, as Triton describes it to its hooks."""

    function: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    device: Any
    specialization: str

    def takes_long(self) -> bool:
        """Whether it takes several seconds to compile; most take one."""
        return self.function.module.removeprefix(PACKAGE).startswith(SLOW)

    @property
    def kernel(self) -> str:
        """The kernel's name, as a reader says it."""
        return str(self.function.__name__).removeprefix("_").removesuffix("_kernel")

    @property
    def named_constants(self) -> dict[str, Any]:
        names = self.function.arg_names
        return {names[at[0]]: value for at, value in self.constants.items()}

    def source(self) -> Any:
        return self.function.ASTSource(self.function, self.signature, self.constants, self.attributes)

    def options(self) -> dict[str, Any]:
        """Of the compiler: warps, stages, the limit of registers and so on."""
        given = json.loads(self.specialization)["options"]
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}

    def compile(self) -> None:
        """Into Triton's disk cache; touches no device."""
        from triton.runtime import driver

        _, _, target, backend, _ = self.function.device_caches[self.device]
        options = backend.parse_options(self.options())
        kernel = self.function.compile(self.source(), target=target, options=options.__dict__)
        # What launches it is compiled as well, by the C compiler.
        driver.active.launcher_cls(kernel.src, kernel.metadata)


class Launches:
    """The kernels of this package that a run wanted to launch and that were not compiled."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[Any, str], Launch] = {}

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[Launch]:
        return iter(self._wanted.values())

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside the block such kernels are noted instead of launched, and what they would write stays as it is."""
        from triton import knobs

        before = knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = self._note
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before

    def _note(self, *, fn: Any, key: str, compile: dict[str, Any], **_: Any) -> bool:
        if not fn.module.startswith(PACKAGE):
            return False
        self._wanted[fn.jit_function, key] = Launch(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            compile["device"],
            compile["specialization_data"],
        )
        return True

    def compile(self, jobs: int | None = None) -> Compilation:
        """Compile them all into Triton's disk cache, with `jobs` processes (default: `jobs_here`), beside other work.

        Processes, because a fifth of a compilation is Python. They are forked, so that they begin at once, and leave
        the GPU alone. What fails in one of them fails again, and says why, in `load` or at the launch.
        """
        # The longest first: a process that is done takes the next, so that all end at about the same time.
        launches = sorted(self._wanted.values(), key=Launch.takes_long, reverse=True)
        return Compilation(launches, min(jobs or jobs_here(), len(launches)))

    def load(self) -> None:
        """From Triton's disk cache into this process; what is not there is compiled."""
        wanted, self._wanted = self._wanted, {}
        for launch in wanted.values():
            launch.function.preload(launch.specialization)


def report_late(logger: Logger) -> None:
    """From now on warn of every kernel of this package that was not ready: a request waits for it."""
    from triton import knobs

    def report(*, fn: Any, **_: Any) -> None:
        if fn.module.startswith(PACKAGE):
            logger.warning("dsv32: kernel %s was not ready", fn.name)

    knobs.runtime.jit_post_compile_hook = report


class Compilation:
    """Processes that compile."""

    def __init__(self, launches: list[Launch], jobs: int) -> None:
        # Numbers of launches, which the processes take out one by one; the pipe holds 64 KiB.
        numbers, given = os.pipe()
        os.write(given, b"".join(number.to_bytes(NUMBER_BYTES, "little") for number in range(len(launches))))
        os.close(given)
        self._children = [_fork(launches, numbers) for _ in range(jobs)]
        os.close(numbers)

    def wait(self) -> None:
        """Until all have ended."""
        while self._children:
            os.waitpid(self._children.pop(), 0)


def _fork(launches: list[Launch], numbers: int) -> int:
    """A child process that compiles and ends."""
    child = os.fork()
    if child == 0:
        try:
            gc.disable()  # what belongs to the parent is not freed here
            while number := os.read(numbers, NUMBER_BYTES):
                with suppress(Exception):
                    launches[int.from_bytes(number, "little")].compile()
        finally:
            os._exit(0)
    return child
