"""What is wrong with the packages around an engine: half of it is there, or a torch that it was not built for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec

from packaging.requirements import Requirement

from dsv32_plugin.engines import ENGINES, Engine

_BUILT_FOR = ("torch", "triton")
"""Packages of which an engine's compiled parts, and our kernels, need a certain release."""


@dataclass(frozen=True)
class Problem:
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


def problems(engine: Engine) -> list[Problem]:
    """Of an engine that is here."""
    return [*_halves(engine), *_requirements(engine.distribution), *_both(engine)]


def _halves(engine: Engine) -> Iterator[Problem]:
    name, found = engine.distribution, _distribution(engine.distribution)
    if found is None:
        advice = f"pip install --force-reinstall --no-deps {name}=={engine.install}"
        yield Problem(f"{name} is a folder that no package manager knows", advice)
        return
    code = [path for path in found.files or () if path.suffix in (".py", ".so") and path.parts[0] == name]
    gone = [path for path in code if not found.locate_file(path).exists()]  # type: ignore[attr-defined]
    if gone or find_spec(name) is None:
        what = f"{name} {found.version} lacks {len(gone)} of its {len(code)} files, such as {gone[0]}" if gone else name
        yield Problem(what, f"pip install --force-reinstall --no-deps {name}=={found.version}")


def _requirements(name: str) -> Iterator[Problem]:
    """What a package says that it needs, and what is here; of those that were built for each other the version, too."""
    package = _distribution(name)
    if package is None:
        return
    for line in package.requires or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _distribution(needed.name)
        wanted = f"{needed.name}{needed.specifier}"
        if found is None:
            what = f"{name} {package.version} needs {wanted}, which is not installed"
            yield Problem(what, f"pip install '{wanted}'")
        elif needed.name in _BUILT_FOR:
            if not needed.specifier.contains(found.version, prereleases=True):
                what = f"{name} {package.version} was built for {wanted}, found {found.version}"
                yield Problem(what, f"pip install '{wanted}'")
            yield from _requirements(needed.name)


def _both(engine: Engine) -> Iterator[Problem]:
    others = [other for other in ENGINES.values() if other is not engine and _distribution(other.distribution)]
    for other in others:
        what = f"{engine.distribution} and {other.distribution} are in one environment, and their requirements clash"
        yield Problem(what, f"pip uninstall {other.distribution}, and install it in a venv of its own")


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
