"""A tool that runs Python: in a process of its own, within limits of time, memory, files and output.

The limits keep a mistake from taking the host down. They are no sandbox: the code may read what you may read.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from toolbox import Tool, parameters

MIB = 1 << 20
MARK = "SEARCH_AGENT_PROCESS"
"""Of the environment: by it all processes that the code has started are found."""
LOOK_S = 0.2
"""So often is looked at what the system does not limit: files together, and processes of root's."""


@dataclass(frozen=True)
class Limits:
    wall_s: float = 20.0
    cpu_s: int = 20
    memory_mib: int = 512
    file_mib: int = 16
    files_mib: int = 256
    """Of all files in its folder."""
    output_chars: int = 20_000
    processes: int = 256
    """Of the whole user."""


def python_tool(limits: Limits = Limits()) -> Tool:
    return Tool(
        "python",
        f"Run a Python program and return what it prints. It has {limits.wall_s:g} s and {limits.memory_mib} MiB; "
        "nothing is kept from one call to the next.",
        parameters(code="The program."),
        lambda code: run(code, limits),
    )


def run(code: str, limits: Limits) -> str:
    """What a program prints, and how it ended if it did not end well."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="search-agent-") as folder:
        env = {"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", MARK: mark}
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: _limit(limits),
        )
        try:
            output, why = _read(process, limits, lambda: _excess(folder, mark, limits))
        finally:
            _kill(process, mark)
    text = output.decode(errors="replace")
    if why is None and process.returncode:
        status = process.returncode
        why = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    return text if why is None else f"{text}\n[{why}]".lstrip()


def _limit(limits: Limits) -> None:
    """In the new process, before the program."""
    for what, most in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_AS, limits.memory_mib * MIB),
        (resource.RLIMIT_FSIZE, limits.file_mib * MIB),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _read(
    process: subprocess.Popen[bytes], limits: Limits, excess: Callable[[], str | None]
) -> tuple[bytes, str | None]:
    """What it prints, up to a limit of bytes and of time; and which limit it met."""
    assert process.stdout is not None
    begun = looked = time.monotonic()
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (now := time.monotonic()) < begun + limits.wall_s:
            if now > looked + LOOK_S:
                if why := excess():
                    return output, why
                looked = time.monotonic()
            if not selector.get_map():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
                    return output, None
            elif selector.select(LOOK_S):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                output += piece
                if len(output) > limits.output_chars:
                    most = limits.output_chars
                    return output[:most], f"stopped: it printed more than {most} characters"
                if not piece:
                    selector.unregister(process.stdout)
    return output, f"stopped after {limits.wall_s:g} seconds"


def _excess(folder: str, mark: str, limits: Limits) -> str | None:
    if len(_with_mark(mark)) > limits.processes:
        return f"stopped: it started more than {limits.processes} processes"
    written = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):
            written += path.lstat().st_size
    return f"stopped: it wrote more than {limits.files_mib} MiB" if written > limits.files_mib * MIB else None


def _kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """The process and all that it has started, also in sessions of their own."""
    for _ in range(100):
        if process.poll() is None:
            # All of its group at once: those that start others fast outrun a search.
            _signal(os.killpg, process.pid)
            process.kill()
        found = _with_mark(mark) - {process.pid}
        for pid in found:
            _signal(os.kill, pid)
        if not found and process.poll() is not None:
            break
        time.sleep(0.01)
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


def _with_mark(mark: str) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def _signal(send: Callable[[int, int], None], pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        send(pid, signal.SIGKILL)
