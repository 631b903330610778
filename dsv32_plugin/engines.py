"""One record for each engine: its releases, how it is started, and what must be registered in it.

An engine release is added here and in its adapter's `upstream`. Nothing here imports an engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTEXT = "8192"
"""Of the demonstration."""
WITHOUT_GPU = "tested without a GPU only"


@dataclass(frozen=True)
class Release:
    """A release, or a line of them, that the adapter was written for."""

    numbers: tuple[int, ...]
    """Those that its name begins with."""
    name: str
    remark: str = "tested"
    """How far it is tested."""
    broken: str = ""
    """Why it cannot serve, where that is known."""
    broken_on_cpu: str = ""
    """The same, without a GPU."""

    def fault(self, device: str) -> str:
        """Why it cannot serve on a type of device, or nothing."""
        return self.broken or (self.broken_on_cpu if device == "cpu" else "")


@dataclass(frozen=True)
class Engine:
    """What differs between the engines, and is known without asking them."""

    name: str
    distribution: str
    """On PyPI; also its package."""
    adapter: str
    """Our package for it: its `names` say what must be registered, its `probe` says what is."""
    install: str
    """The release to install: every test runs against it, those for a GPU included."""
    releases: tuple[Release, ...]
    """Those that the adapter is written for, the oldest first."""
    entry_points: tuple[str, ...]
    allowed_plugins: str
    """The variable that names the plugins to load."""
    backend: str
    """What our attention backend is registered as."""
    command: str
    """How people call its server."""
    module: str
    """What `python -m` runs; the console scripts need not be on the PATH."""
    model_arguments: tuple[str, ...]
    """The arguments before the model's path."""
    port_variables: tuple[str, ...]
    """Ports besides the server's, which it else takes by a rule of its own."""
    demo_options: tuple[str, ...]
    on_gpus: str
    """The command that serves a checkpoint."""

    def release(self, version: str) -> Release | None:
        """The release of ours that a version is one of."""
        numbers = _numbers(version) or ()
        return next((known for known in self.releases if numbers[: len(known.numbers)] == known.numbers), None)

    @property
    def range(self) -> str:
        """In words."""
        oldest, newest = self.releases[0].name, self.releases[-1].name
        return oldest if oldest == newest else f"{oldest} to {newest}"

    def start(self, model: str, ranks: int, options: str) -> str:
        """The command that serves a checkpoint on so many GPUs."""
        return f"{self.on_gpus.format(model=model, ranks=ranks)} {options}".rstrip()

    def version_problem(self, version: str, device: str) -> str | None:
        """Say why `version` cannot serve on a type of device, whatever it has; None also for one not known yet."""
        numbers, release = _numbers(version), self.release(version)
        if numbers is None:
            return f"{self.distribution}: expected a release number such as {self.install}, got {version!r}"
        if release is None and numbers < self.releases[0].numbers:
            ways_out = self.ways_out(f"{self.distribution}=={self.install}")
            return f"{self.distribution}: dsv32-plugin is written for {self.range} and on, found {version}; {ways_out}"
        if release is not None and release.fault(device):
            ways_out = self.ways_out(self._nearest(release, device))
            return f"{self.distribution} {version}: {release.fault(device)}; {ways_out}"
        return None

    def ways_out(self, good: str) -> str:
        """What to do about a release that is refused."""
        return (
            f"install {good}, or set DSV32_PLUGIN=0 to run {self.name}'s own code, "
            f"or set DSV32_ALLOW_UNTESTED_ENGINE=1 to try anyway"
        )

    def check_place(self, place: str, found: str | None, ours: str) -> None:
        """Raise RuntimeError unless what is registered as `place`, an architecture or a backend, is our own code."""
        if found != ours:
            raise RuntimeError(
                f"{place}: expected {ours} to be registered in {self.name}, found {found}; uninstall the plugin "
                f"of that, or leave it out with {self.allowed_plugins}=dsv32; 'dsv32 doctor' names it"
            )

    def _nearest(self, broken: Release, device: str) -> str:
        """The good releases on both sides of a broken one."""
        at = self.releases.index(broken)
        sides = (reversed(self.releases[:at]), self.releases[at + 1 :])
        found = (next((release for release in side if not release.fault(device)), None) for side in sides)
        return " or ".join(f"{self.distribution}=={release.name}" for release in found if release is not None)


def _numbers(version: str) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return None if match is None else tuple(int(part or 0) for part in match.groups())


VLLM = Engine(
    name="vLLM",
    distribution="vllm",
    adapter="dsv32_plugin.vllm_adapter",
    install="0.26.0",
    releases=(
        Release((0, 26), "0.26.0"),
        Release((0, 27), "0.27.1", WITHOUT_GPU),
        Release((0, 28), "0.28.0", WITHOUT_GPU),
        Release((0, 29), "0.29.0", WITHOUT_GPU),
        Release((0, 30), "0.30.0", WITHOUT_GPU),
        Release((0, 31), "0.31.0", WITHOUT_GPU),
        Release(
            (0, 32),
            "0.32.0",
            "read, not run",
            broken_on_cpu="its own fallbacks for a CPU pass a block_size that its kernels no longer take",
        ),
        Release((0, 33), "0.33.0", WITHOUT_GPU),
    ),
    entry_points=("vllm.general_plugins", "vllm.platform_plugins"),
    allowed_plugins="VLLM_PLUGINS",
    backend="CUSTOM",
    command="vllm serve",
    module="vllm.entrypoints.cli.main",
    model_arguments=("serve",),
    port_variables=(),
    demo_options=(
        *("--max-model-len", CONTEXT),
        *("--kv-cache-memory-bytes", str(256 * 2**20)),
        "--enforce-eager",
        "--enable-auto-tool-choice",
    ),
    on_gpus="vllm serve {model} --tensor-parallel-size {ranks} --enable-auto-tool-choice",
)
SGLANG = Engine(
    name="SGLang",
    distribution="sglang",
    adapter="dsv32_plugin.sglang_adapter",
    install="0.5.15.post1",
    releases=(
        Release((0, 5, 15), "0.5.15.post1"),
        *(Release((0, 5, patch), f"0.5.{patch}", "tested without a GPU only") for patch in range(16, 24)),
    ),
    entry_points=("sglang.srt.plugins", "sglang.srt.platforms"),
    allowed_plugins="SGLANG_PLUGINS",
    backend="dsv32",
    command="sglang.launch_server",
    module="sglang.launch_server",
    model_arguments=("--model-path",),
    # By default a port that is 10000 higher than the server's, which need not exist.
    port_variables=("SGLANG_GRPC_PORT",),
    demo_options=("--context-length", CONTEXT, "--max-total-tokens", "16384"),
    on_gpus="python -m sglang.launch_server --model-path {model} --tp-size {ranks}",
)
ENGINES = {engine.distribution: engine for engine in (VLLM, SGLANG)}
