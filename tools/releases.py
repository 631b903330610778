"""Run `dsv32 demo` with every release of each engine, one after the other in an environment that is thrown away.

    python tools/releases.py [vllm|sglang ...]    # prints a line for each, and ends with 1 where one failed

Each downloads some gigabytes. uv keeps what it has downloaded.
"""

from __future__ import annotations

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
DEVICE = "cuda" if Path("/dev/nvidia0").exists() else "cpu"


def engines() -> dict[str, Any]:
    """The plugin's records, read without installing it."""
    sys.path.insert(0, str(ROOT))
    from dsv32_plugin.engines import ENGINES

    return dict(ENGINES)


def outcomes(names: list[str]) -> Iterator[tuple[str, str]]:
    """A release, and how its demo went."""
    for name in names:
        engine = engines()[name]
        for release in engine.releases:
            title = f"{engine.distribution} {release.name}"
            fault = release.fault(DEVICE)
            yield title, f"broken: {fault}" if fault else demo(name, release.name)


def demo(engine: str, release: str) -> str:
    """ "ok" and the seconds that it took, or what was printed last."""
    shutil.rmtree(VENV, ignore_errors=True)
    install = [
        str(UV),
        "pip",
        "install",
        "--quiet",
        "--python",
        str(PYTHON),
        "-e",
        f".[{engine}]",
        f"{engine}=={release}",
    ]
    try:
        for command in ([str(UV), "venv", "--quiet", "--python", sys.executable, str(VENV)], install):
            subprocess.run(command, cwd=ROOT, check=True)
        began = time.monotonic()
        done = subprocess.run(
            [str(VENV / "bin" / "dsv32"), "demo", "--engine", engine],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        return f"FAILED: {' '.join(map(str, error.cmd))}"
    finally:
        shutil.rmtree(VENV, ignore_errors=True)
    return "FAILED\n" + done.stdout if done.returncode else f"ok, {time.monotonic() - began:.0f} s"


def main(argv: list[str]) -> int:
    failed = 0
    for title, outcome in outcomes(argv or list(engines())):
        print(f"{title}: {outcome}", flush=True)
        failed += outcome.startswith("FAILED")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
