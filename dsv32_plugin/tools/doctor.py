"""`dsv32 doctor`: what will really serve a DeepSeek-V3.2 checkpoint here, and what stands in the way.

Exit status 0 means that the engine will use this plugin, 1 that it will not (wrong, or switched off on purpose).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from dsv32_plugin import __version__, admission, installation, settings
from dsv32_plugin.console import stderr
from dsv32_plugin.engines import ENGINES, Engine
from dsv32_plugin.tools.findings import Finding, show

PROBE_SECONDS = 180
DISTRIBUTION = "dsv32-plugin"


def examine() -> list[Finding]:
    """Everything the doctor knows to look at."""
    engines = [finding for engine in installed() for finding in _engine(engine)]
    return [*_versions(), *_devices(), *_settings(), *engines]


def installed() -> list[Engine]:
    """The engines that are here; an environment holds one of them, since their requirements clash."""
    return [engine for engine in ENGINES.values() if _version(engine.distribution) is not None]


def _versions() -> Iterator[Finding]:
    section = "versions"
    yield Finding(section, DISTRIBUTION, __version__)
    yield Finding(section, "Python", platform.python_version())
    for engine in installed():
        yield _release(admission.Installed(engine, _version(engine.distribution) or "", _device()))
        for problem in installation.problems(engine):
            yield Finding(section, engine.distribution, problem.what, "warning", problem.advice)
    if not installed():
        advice = f"pip install '{DISTRIBUTION}[vllm]' or '{DISTRIBUTION}[sglang]'"
        yield Finding(section, "vllm or sglang", "not installed", "wrong", advice)
    for name in ("torch", "triton", "transformers"):
        yield Finding(section, name, _version(name) or "not installed")
    yield Finding(section, "NVIDIA driver", _driver() or "none")


def _release(found: admission.Installed) -> Finding:
    """How a release stands; a new one is tried, as its first start would."""
    with stderr.status(f"looking at {found.name}"):
        allowed = settings.allow_untested_engine()
        problem = found.refusal() or (None if allowed else found.failure())
    level = "ok" if problem is None and not found.is_new else "warning" if problem is None or allowed else "wrong"
    return Finding("versions", found.engine.distribution, found.version, level, problem or found.remark())


def _device() -> str:
    """The type of device that an engine would find."""
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _devices() -> Iterator[Finding]:
    try:
        import torch

        from dsv32_plugin.kernels.runtime import dispatch
    except ImportError as error:
        yield Finding("devices", "torch", f"cannot be imported: {error}", "wrong", "it comes with vLLM and SGLang")
        return
    kinds: dict[str, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        kind = getattr(properties, "gcnArchName", None) or f"sm{properties.major}{properties.minor}"
        kinds.setdefault(kind, device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Finding("devices", str(device), f"{properties.name}, {kind}, {memory}")
    if not kinds:
        kinds["cpu"] = torch.device("cpu")
        yield Finding("devices", "cpu", f"{os.cpu_count()} cores, no GPU", advice="good for trying out, not for speed")
    for kind, device in kinds.items():
        try:
            for operation, choice in dispatch.choices(device).items():
                yield Finding(f"kernels on {kind}", operation, choice.name, "ok", choice.reason)
        except (ValueError, NotImplementedError) as error:
            yield Finding(f"kernels on {kind}", dispatch.VARIABLE, "refused", "wrong", str(error))


def _settings() -> Iterator[Finding]:
    chosen = settings.chosen()
    for name, value in chosen.items():
        problem = settings.problem(name)
        level = "note" if problem is None else "warning" if "no effect" in problem else "wrong"
        yield Finding("settings", name, value, level, problem or "")
    if not chosen:
        yield Finding("settings", "DSV32_*", "all defaults")


def _engine(engine: Engine) -> Iterator[Finding]:
    section = engine.name
    yield from _other_plugins(engine)
    try:
        enabled = settings.plugin_enabled()
    except ValueError:
        return  # already a finding among the settings
    if not enabled:
        found = f"DSV32_PLUGIN=0: {engine.name} runs its own code"
        yield Finding(section, "switch", found, "wrong", "unset it to use the plugin")
    else:
        yield Finding(section, "switch", "on", "ok", f"DSV32_PLUGIN=0 gives {engine.name}'s own code back")
    seen = _probe(engine)
    if isinstance(seen, str):
        yield Finding(section, "plugin loading", "failed", "wrong", seen)
        return
    yield _platform(engine, seen)
    adapter = import_module(f"{engine.adapter}.names")
    for architecture, path in adapter.MODELS.items():
        yield _compare(engine, architecture, seen["models"][architecture], path)
    yield _compare(engine, f"attention backend {engine.backend}", seen["backend"], adapter.BACKEND_PATH)
    if "missing_hooks" in seen and enabled:
        missing = seen["missing_hooks"]
        advice = "docs/patches.md says what each is for" if not missing else f"{engine.name}'s log says why"
        yield Finding(
            section,
            "hooks",
            f"not in place: {', '.join(missing)}" if missing else "all in place",
            "wrong" if missing else "ok",
            advice,
        )


def _other_plugins(engine: Engine) -> Iterator[Finding]:
    """Neighbours in the engine's entry-point groups, and whether the engine is told to load us."""
    section, variable = engine.name, engine.allowed_plugins
    allowed = os.environ.get(variable)
    for group in engine.entry_points:
        points = list(entry_points(group=group))
        if not any(_owner(point) == DISTRIBUTION for point in points):
            advice = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
            yield Finding(section, group, "the plugin is not installed", "wrong", advice)
        for point in points:
            if _owner(point) == DISTRIBUTION and allowed is not None and point.name not in allowed.split(","):
                advice = f"add {point.name} to it"
                yield Finding(section, group, f"{variable}={allowed} leaves the plugin out", "wrong", advice)
            elif _owner(point) not in (DISTRIBUTION, engine.distribution):
                found = f"{point.name} of {_owner(point)} is here too"
                yield Finding(
                    section, group, found, "warning", f"it may replace our code; {variable}=dsv32 leaves it out"
                )


def _owner(point: Any) -> str:
    return str(point.dist.name) if point.dist else ""


def _platform(engine: Engine, seen: dict[str, Any]) -> Finding:
    path, device = seen["platform"], seen["device_type"]
    if not device:
        advice = f"{engine.name} cannot start: no GPU, and no CPU platform without the plugin"
        return Finding(engine.name, "platform", path, "wrong", advice)
    if device == "cpu":
        return _compare(engine, "platform", path, import_module(f"{engine.adapter}.names").CPU_PLATFORM_PATH)
    if path.startswith(f"{engine.distribution}."):
        return Finding(engine.name, "platform", path, "ok", f"{engine.name}'s own, for this device")
    return Finding(engine.name, "platform", path, "warning", "another plugin's; not tested")


def _compare(engine: Engine, name: str, found: str | None, ours: str) -> Finding:
    if found == ours:
        return Finding(engine.name, name, found, "ok", "ours")
    if found is None:
        return Finding(engine.name, name, "nothing registered", "wrong", f"expected {ours}")
    whose = f"{engine.name}'s own code" if found.startswith(f"{engine.distribution}.") else "another plugin's code"
    return Finding(engine.name, name, found, "wrong", f"{whose} would run, not ours")


def _probe(engine: Engine) -> dict[str, Any] | str:
    """What is registered in a fresh process of the engine, or, in words, why that cannot be said."""
    command = [sys.executable, "-m", f"{engine.adapter}.probe"]
    with stderr.status(f"asking {engine.name} what it has loaded"):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"no answer within {PROBE_SECONDS} s from: {' '.join(command)}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+[.\d]*)\s", path.read_text()) if path.exists() else None
    return match.group(1) if match else None


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor", help="say what will serve here, and what is wrong", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    findings = examine()
    names = " and ".join(engine.name for engine in installed())
    return show("dsv32 doctor", findings, verdict=f"{names} will serve through the plugin", as_json=arguments.json)
