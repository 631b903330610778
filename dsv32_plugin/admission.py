"""Whether the installed release of an engine may serve.

One that `engines` lists may. A new one may where its files have every name and parameter that the adapter uses of one
that is listed, which is looked at when the plugin is registered, and where a small model answers right through it,
which is tried by `dsv32 doctor` or when the first of our checkpoints is served: names do not show meaning. Both are
remembered for this release with this plugin, torch and Triton.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path

from dsv32_plugin import __version__, installation, settings, surface
from dsv32_plugin.engines import Engine

OVERRIDE = "DSV32_ALLOW_UNTESTED_ENGINE"
PARITY = "dsv32_plugin.tools.parity"
"""`python -m` this with an engine's name serves a small model with it, and ends with 0 where its answers are right."""
_CLUSTER = re.compile(r"(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|VLLM_DP_\w+")
"""What a process is told of its peers; the small model's server is alone."""


@dataclass(frozen=True)
class Installed:
    """A release of an engine, on a type of device ("cuda", "cpu")."""

    engine: Engine
    version: str
    device: str

    @property
    def name(self) -> str:
        return f"{self.engine.distribution} {self.version}"

    @property
    def is_new(self) -> bool:
        """No release that `engines` knows."""
        return self.engine.release(self.version) is None

    def refusal(self) -> str | None:
        """Why it cannot serve, by its number and its files, or None."""
        problem = self.engine.version_problem(self.version, self.device)
        if problem is not None or not self.is_new:
            return problem
        return self._unless_passed("surface", self._lacks)

    def failure(self) -> str | None:
        """Why a small model does not answer right through it, or None; about a minute, once."""
        return self._unless_passed("parity", self._answers_wrong) if self.is_new else None

    def remark(self) -> str:
        """How far one is tested that is neither refused nor failed."""
        known = self.engine.release(self.version)
        return known.remark if known is not None else f"newer than what the plugin is tested with ({self.engine.range})"

    def check(self, kind: str) -> str:
        """What a check that has passed is remembered as."""
        versions = {self.engine.distribution: self.version, "dsv32-plugin": __version__}
        versions |= {name: _version(name) for name in ("torch", "triton")}
        return "_".join([*map("-".join, versions.items()), self.device]) + f".{kind}"

    def _lacks(self) -> str | None:
        if find_spec(self.engine.distribution) is None:
            return "nothing but its metadata is here"
        upstream = import_module(f"{self.engine.adapter}.upstream")
        folder = Path(str(upstream.__file__)).parent
        used = surface.members_used(folder)
        found = surface.Release(surface.installed(self.engine.distribution)).surface(upstream.surface_names(), used)
        lacks = {name: surface.missing(before, found, used) for name, before in surface.stored(folder).items()}
        nearest = min(reversed(lacks), key=lambda name: len(lacks[name]))
        if not lacks[nearest]:
            return None
        return "\n  ".join([f"it differs from {nearest} in what the plugin uses:", *lacks[nearest]])

    def _answers_wrong(self) -> str | None:
        print(f"dsv32: {self.name} is new; trying a small model with it, once", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", PARITY, self.engine.distribution]
        environment = {name: value for name, value in os.environ.items() if not _CLUSTER.fullmatch(name)}
        # The server of the trial must not begin with a trial of its own.
        environment[OVERRIDE] = "1"
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return f"a small model failed with it:\n{done.stdout.strip()}" if done.returncode else None

    def _unless_passed(self, kind: str, find: Callable[[], str | None]) -> str | None:
        """What a check finds, unless it has found nothing before; of two processes at once, one makes it."""
        check = self.check(kind)
        passed = settings.cache_folder() / "admitted" / check
        if check in settings.admitted() or passed.exists():
            return None
        with _alone(passed.with_suffix(".lock")) as can_write:
            found = None if passed.exists() else find()
            if found is None:
                settings.admit(check)
                if can_write:
                    passed.touch()
                return None
        ways_out = self.engine.ways_out(f"{self.engine.distribution}=={self.engine.install}")
        return f"{self.name}: dsv32-plugin is written for {self.engine.range}, and {found}\n{ways_out}"


def admit(found: Installed) -> None:
    """Raise RuntimeError for a release that cannot serve; called in every process, before anything is registered."""
    is_first = parent_process() is None
    if is_first:
        for wrong in installation.problems(found.engine):
            warnings.warn(str(wrong), RuntimeWarning, stacklevel=2)
    if settings.allow_untested_engine():
        problem = found.engine.version_problem(found.version, found.device)
        if is_first and (problem is not None or found.is_new):
            warnings.warn(problem or f"{found.name}: {found.remark()}", RuntimeWarning, stacklevel=2)
    elif (problem := found.refusal()) is not None:
        raise RuntimeError(problem)


def prove(found: Installed) -> None:
    """Raise RuntimeError for a new release through which a small model answers wrong; called before ours is served."""
    if not found.is_new or settings.allow_untested_engine() or found.check("proved") in settings.admitted():
        return
    if (problem := found.failure()) is not None:
        raise RuntimeError(problem)
    settings.admit(found.check("proved"))  # said once a start
    warnings.warn(
        f"{found.name}: {found.remark()}; it has what the plugin uses, and a small model answered right",
        RuntimeWarning,
        stacklevel=2,
    )


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Only one process at a time is inside; yields whether the folder can be written, without which all may be."""
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(
                f"dsv32: what is found of the engine's release cannot be kept ({error}) and is looked for at each "
                f"start; set XDG_CACHE_HOME to a folder that can be written",
                RuntimeWarning,
                stacklevel=4,
            )
            yield False
        else:
            yield True


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
