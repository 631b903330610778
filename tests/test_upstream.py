"""An adapter meets its engine in one file, which says all that it uses of it, and can be compared with a release."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsv32_plugin import surface
from dsv32_plugin.engines import ENGINES
from dsv32_plugin.sglang_adapter import upstream as sglang_upstream
from dsv32_plugin.vllm_adapter import upstream as vllm_upstream
from dsv32_plugin.vllm_adapter.hooks import fits

PRODUCT = Path(__file__).parent.parent / "dsv32_plugin"
UPSTREAM = {"vllm": vllm_upstream, "sglang": sglang_upstream}
LOGGER = "vllm.dsv32_plugin"
"""No module: vLLM shows what its own loggers say."""
engines = pytest.mark.parametrize("engine", UPSTREAM)


def files(engine: str) -> dict[str, ast.Module]:
    """Of an adapter, all but its `upstream`."""
    folder = PRODUCT / f"{engine}_adapter"
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}
    return {name: ast.parse(path.read_text("utf-8")) for name, path in paths.items() if name != "upstream.py"}


@engines
def test_no_other_file_imports_the_engine(engine: str) -> None:
    for name, tree in files(engine).items():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [module for module in modules if module.split(".")[0] == engine], f"{name}: line {node.lineno}"


@engines
def test_no_other_file_spells_a_module_of_the_engine(engine: str) -> None:
    module = re.compile(rf"\b{engine}(\.\w+)+")
    for name, tree in files(engine).items():
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                found = module.search(node.value)
                assert found is None or found[0] == LOGGER, f"{name}: line {node.lineno}: {node.value}"


@pytest.mark.upstream
@engines
def test_no_name_is_a_module(engine: str) -> None:
    """Of which all could be used and nothing be said."""
    release = surface.Release(installed(engine))
    targets = [target for targets in UPSTREAM[engine].NAMES.values() for target in targets]
    assert not [target for target in targets if release.is_module(target)]


@engines
def test_names_and_places_are_those_that_are_used(engine: str) -> None:
    upstream, used, spelled = UPSTREAM[engine], set(), set()
    for tree in [*files(engine).values(), ast.parse(Path(str(upstream.__file__)).read_text("utf-8"))]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(f"{engine}_adapter.upstream"):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "upstream":
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                spelled.add(node.value)
    defined = {name for name in vars(upstream) if not name.startswith("_")}
    assert used <= defined | set(upstream.NAMES), "what is asked for is listed"
    assert not set(upstream.NAMES) - used - spelled, "what is listed is asked for"
    # In a loop only the last part is spelled.
    assert not [place for place in upstream.PLACES if not {place, place.rpartition(".")[2]} & spelled]


def installed(engine: str) -> Path:
    spec = find_spec(engine)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{engine} is not installed here")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.mark.upstream
@engines
def test_the_stored_surface_is_that_of_the_release(engine: str) -> None:
    release = surface.Release(installed(engine))
    folder = PRODUCT / f"{engine}_adapter"
    found = release.surface(UPSTREAM[engine].surface_names(), surface.members_used(folder))
    before = surface.stored(folder)
    how = f"`python -m dsv32_plugin.{engine}_adapter.upstream --write` keeps what the adapter uses now"
    assert release.version in before, how
    assert not surface.differences(before[release.version], found), how


@engines
def test_every_release_has_a_stored_surface(engine: str) -> None:
    stored = surface.stored(PRODUCT / f"{engine}_adapter")
    for release in ENGINES[engine].releases:
        assert any(name.startswith(".".join(map(str, release.numbers))) for name in stored), release.name


@pytest.mark.upstream
@engines
def test_a_release_is_compared_in_seconds_and_without_torch(engine: str) -> None:
    root = installed(engine)
    module = f"dsv32_plugin.{engine}_adapter.upstream"
    program = (
        f"import runpy, sys; sys.argv = ['', '--check', {str(root)!r}]\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"except SystemExit as end: print(end.code, 'torch' in sys.modules, {engine!r} in sys.modules)"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 False False"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 20


def test_what_is_otherwise_is_named(tmp_path: Path) -> None:
    package = tmp_path / "engine"
    package.mkdir()
    (package / "__init__.py").write_text("from .parts import Old as New, run\n")
    parts = package / "parts.py"
    parts.write_text(
        "class Base:\n    def go(self, a): ...\nclass Old(Base):\n    size: int = 0\ndef run(a, b=1): ...\n"
    )
    names, used = ["engine:New", "engine:run", "engine.parts.Old.go", "engine:gone"], {"go", "size"}
    before = surface.Release(package).surface(names, used)
    assert before == {
        "engine:New": {"go": "(self, a)", "size": "value"},
        "engine:run": "(a, b=)",
        "engine.parts.Old.go": "(self, a)",
        "engine:gone": None,
    }
    parts.write_text(
        "class Base:\n    def go(self, a, b): ...\nclass Old(Base): ...\nasync def run(a, *, b=1, **c): ...\n"
    )
    assert surface.differences(before, surface.Release(package).surface(names, used)) == [
        "engine.parts.Old.go: (self, a) -> (self, a, b)",
        "engine.New.go: (self, a) -> (self, a, b)",
        "engine.New.size: gone",
        "engine.run: (a, b=) -> (a, *, b=, **c)",
    ]


SHIMS: dict[str, dict[str, tuple[str, str | None]]] = {
    "vllm": {
        "says_who_routes": ("vllm.model_executor.layers.fused_moe:MoERunner", "is_internal_router"),
        "packs_experts": ("vllm.model_executor.layers.fused_moe.cpu_fused_moe:CPUFusedMOE", None),
        "writes_packed_products": ("vllm._custom_ops:weight_packed_linear_cpu", None),
        "assembles_chats": ("vllm.entrypoints.openai.chat_completion.stream_processor.ChatStreamProcessor.step", None),
    },
    "sglang": {
        "declares_options": ("sglang.srt.arg_groups.overrides:declare_resolution", None),
        "knows_cut_answers": (
            "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses",
            "_build_response",
        ),
        "tells_detectors": ("sglang.srt.function_call.base_format_detector:BaseFormatDetector", "finish"),
        "keeps_special_tokens": (
            "sglang.srt.entrypoints.openai.protocol:MessageProcessingResult",
            "skip_special_tokens",
        ),
        "defers_grammars_of_responses": (
            "sglang.srt.entrypoints.openai.protocol:MessageProcessingResult",
            "require_reasoning",
        ),
        "gives_reasoning": (
            "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat",
            "supports_native_reasoning_history",
        ),
        "asks_the_platform": ("sglang.srt.platforms.interface:SRTPlatform", "capabilities"),
        "binds_experts": ("sglang.srt.layers.moe.topk:TopK", "bind_runner_backend"),
        "wraps_index_keys": ("sglang.srt.mem_cache.index_key_cache:IndexKeyCache", None),
        "binds_every_rank": ("sglang.srt.utils.numa_utils:init_threads_binding", "numa_index"),
        "names_groups": ("sglang.srt.layers.linear:LinearParallelGroup", None),
        "masks_itself": ("sglang.srt.constrained.base_grammar_backend:GrammarMask", None),
    },
}
"""What one of an engine's newest release and its oldest that is served has, and the other has not."""
PROBES = {
    "vllm": {"surface_names"},
    "sglang": {"serves_responses", "installed_version", "reckons_fp8_latents", "without_dsa", "surface_names"},
}
"""What else is asked there: `serves_responses` asks for a package, `reckons_fp8_latents` for what a function calls."""


@engines
def test_every_probe_is_one_that_is_looked_at(engine: str) -> None:
    module = UPSTREAM[engine]
    own = {name for name, value in vars(module).items() if callable(value) and defined_in(value, module)}
    assert {name for name in own if not name.startswith("_")} == set(SHIMS[engine]) | PROBES[engine]


def defined_in(value: object, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


@pytest.mark.parametrize(("engine", "probe"), [(engine, probe) for engine, probes in SHIMS.items() for probe in probes])
def test_a_probe_is_still_needed(engine: str, probe: str) -> None:
    """Once the oldest release answers as the newest does, the probe can go, and what is done for the other answer."""
    oldest, *_, newest = surface.stored(PRODUCT / f"{engine}_adapter").values()
    name, member = SHIMS[engine][probe]
    assert has(oldest[name], member) != has(newest[name], member)


def has(described: Any, member: str | None) -> bool:
    return described is not None and (member is None or member in described)


@engines
def test_what_has_moved_is_still_needed_where_it_was(engine: str) -> None:
    oldest, *_, newest = surface.stored(PRODUCT / f"{engine}_adapter").values()
    places = {place: targets for place, (targets, _) in UPSTREAM[engine].PLACES.items()}
    for name, targets in (UPSTREAM[engine].NAMES | places).items():
        if len(targets) > 1:
            assert oldest[targets[0]] is None, f"{name}: the oldest release has the newer path"
            assert newest[targets[0]] is not None, f"{name}: the newest release has it elsewhere"


@pytest.mark.parametrize("release", surface.stored(PRODUCT / "vllm_adapter"))
def test_every_release_has_the_places_that_its_hooks_take(release: str) -> None:
    """With the parameters that our code counts on. Of a chat's labels it has the one place or the other."""
    found = surface.stored(PRODUCT / "vllm_adapter")[release]
    missing = set()
    for name, (targets, parameters) in vllm_upstream.PLACES.items():
        signatures = [found[target] for target in targets if found[target] is not None]
        if not signatures:
            missing.add(name)
            continue
        taken = [part.rstrip("=") for part in re.split(r",\s*", signatures[0].strip("()")) if part != "cls"]
        assert fits(taken, parameters), name
    assembled = {"ChatStreamProcessor.step"}
    assert missing in (assembled, {"maybe_filter_parallel_tool_calls"})
    assert (missing == assembled) == (tuple(map(int, release.split("."))) < (0, 33))
