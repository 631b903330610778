"""An inference server as a child process: started on a free loopback port, watched, and always stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import httpx

from dsv32_plugin.engines import SGLANG, VLLM, Engine

HOST = "127.0.0.1"
_STOP_SECONDS = 20.0
_TAIL_LINES = 30


class ServerError(RuntimeError):
    """The server did not start, or ended by itself; the message ends with the end of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """An engine's server, to be used in a with statement.

        with VllmServer("tiny", ["--dtype", "float32"], log_path=Path("server.log")) as server:
            server.wait_until_ready(300)
            httpx.get(f"{server.url}/v1/models")

    Leaving the block stops the server and every process it started, also after an exception or Ctrl-C.
    """

    engine: Engine

    def __init__(
        self, model: str | Path, options: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log_path = log_path
        self.command = [sys.executable, "-m", self.engine.module, *self.engine.model_arguments, str(model)]
        self.command += ["--host", HOST, "--port", str(self.port), *options]
        ports = {variable: str(free_port()) for variable in self.engine.port_variables}
        self._env = {**os.environ, **ports, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self, timeout_s: float, on_wait: Callable[[float], None] = lambda elapsed_s: None) -> float:
        """Wait for /health and return the seconds since the call; `on_wait` is called with them about once a second.

        Raises:
            ServerError: the server ended, or did not answer within `timeout_s`.
        """
        started = time.monotonic()
        while (elapsed_s := time.monotonic() - started) < timeout_s:
            self.check_running()
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == httpx.codes.OK:
                    return elapsed_s
            on_wait(elapsed_s)
            time.sleep(0.5)
        raise ServerError(f"the server was not ready after {timeout_s:.0f} s\n{self.log_tail()}")

    def check_running(self) -> None:
        """Raise ServerError if the server has ended."""
        assert self._process is not None, "use the server in a with statement"
        if self._process.poll() is not None:
            raise ServerError(f"the server ended with status {self._process.returncode}\n{self.log_tail()}")

    def log(self) -> str:
        """Everything the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        """The last lines of the log, with its path."""
        lines = self.log().splitlines()[-_TAIL_LINES:]
        return "\n".join([f"--- end of {self.log_path}", *lines])

    def stop(self) -> None:
        """Ask the server to end, wait, then end whatever is left of its process group."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
        finally:  # also when a second Ctrl-C cuts the waiting short
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Make SIGTERM leave the block like Ctrl-C does, so that the servers in it are stopped."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class VllmServer(Server):
    """`vllm serve MODEL OPTIONS`."""

    engine = VLLM


class SglangServer(Server):
    """`python -m sglang.launch_server --model-path MODEL OPTIONS`."""

    engine = SGLANG


SERVERS: dict[str, type[Server]] = {server.engine.distribution: server for server in (VllmServer, SglangServer)}
