"""Look at every release of each engine, one after the other in an environment that is thrown away.

    python tools/releases.py [vllm|sglang|vllm==0.29.0 ...] [--tests]

A line for each says whether it has what the plugin uses, whether `dsv32 demo` answers right and, with `--tests`, what
the tests say that start no server. The exit status is 1 where one failed. Each release is some gigabytes of downloads,
which uv keeps.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
UV = ROOT / ".tools" / "bin" / "uv"
VENV = ROOT / ".venv-release"
PYTHON = VENV / "bin" / "python"
INSTALL = (UV, "pip", "install", "--quiet", "--python", PYTHON)
DEVICE = "cuda" if Path("/dev/nvidia0").exists() else "cpu"
OVERRIDE = 'cuda-tile ; python_version < "3"'
"""SGLang 0.5.18 to 0.5.22 ask for a stub that fetches its wheel from another index; without a GPU nothing needs it."""


def engines() -> dict[str, Any]:
    """The plugin's records, read without installing it."""
    sys.path.insert(0, str(ROOT))
    from dsv32_plugin.engines import ENGINES

    return dict(ENGINES)


def chosen(wanted: list[str]) -> Iterator[tuple[Any, Any]]:
    """An engine and a release of it, of all that are wanted."""
    for text in wanted:
        name, _, only = text.partition("==")
        engine = engines()[name]
        found = [(engine, release) for release in engine.releases if only in ("", release.name)]
        if not found:
            raise SystemExit(f"{text}: expected a release of {', '.join(r.name for r in engine.releases)}")
        yield from found


def look(engine: Any, release: str, with_tests: bool) -> Iterator[tuple[str, bool, str]]:
    """Each thing that was looked at, whether it is right, and what was said last or the seconds it took."""
    shutil.rmtree(VENV, ignore_errors=True)
    name = engine.distribution
    steps: dict[str, list[str | Path]] = {
        "environment": [UV, "venv", "--quiet", "--python", sys.executable, VENV],
        "installed": [*INSTALL, "-e", f".[{name},dev]", f"{name}=={release}"],
        "surface": [PYTHON, "-m", f"{engine.adapter}.upstream", "--check"],
        "demo": [VENV / "bin" / "dsv32", "demo", "--engine", name],
    }
    if DEVICE == "cpu":
        override = VENV.with_suffix(".txt")
        override.write_text(OVERRIDE)
        steps["installed"] += ["--override", override]
    if with_tests:
        tests = [*sorted(ROOT.glob(f"tests/test_{name}_*.py")), "tests/test_upstream.py"]
        steps["tests"] = [PYTHON, "-m", "pytest", "-q", "-m", "engine or upstream", *tests]
    try:
        for step, command in steps.items():
            began = time.monotonic()
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            said = done.stdout.strip().splitlines()[-1] if step == "tests" else f"{time.monotonic() - began:.0f} s"
            yield step, done.returncode == 0, done.stdout if done.returncode else said
            if done.returncode and step == "installed":
                return
    finally:
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.with_suffix(".txt").unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", default=list(engines()), metavar="ENGINE[==RELEASE]")
    parser.add_argument("--tests", action="store_true", help="run the tests that start no server, too")
    arguments = parser.parse_args(argv)
    failed = 0
    for engine, release in chosen(arguments.wanted):
        print(f"{engine.distribution} {release.name}:", end="", flush=True)
        if fault := release.fault(DEVICE):
            print(f" broken: {fault}")
            continue
        for step, is_right, said in look(engine, release.name, arguments.tests):
            print(f" {step} {said};" if is_right else f" {step} FAILED\n{said}\n", end="", flush=True)
            failed += not is_right
        print()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
