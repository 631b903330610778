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

import pytest

from dsv32_plugin import surface
from dsv32_plugin.engines import ENGINES
from dsv32_plugin.sglang_adapter import upstream as sglang_upstream
from dsv32_plugin.vllm_adapter import upstream as vllm_upstream

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


@engines
def test_no_name_is_a_module(engine: str) -> None:
    """Of which all could be used and nothing be said."""
    release = surface.Release(installed(engine))
    assert not [name for name in UPSTREAM[engine].NAMES.values() if release.is_module(name)]


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


SHIMS: dict[str, tuple[str, str | None]] = {
    "declares_options": ("sglang.srt.arg_groups.resolution_hooks:register_resolution_hook", None),
    "knows_cut_answers": ("sglang.srt.function_call.base_format_detector:BaseFormatDetector", "finish"),
    "keeps_special_tokens": ("sglang.srt.entrypoints.openai.protocol:MessageProcessingResult", "skip_special_tokens"),
    "gives_reasoning": (
        "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat",
        "supports_native_reasoning_history",
    ),
    "asks_the_platform": ("sglang.srt.platforms.interface:SRTPlatform", "capabilities"),
    "reckons_fp8_latents": ("sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator", None),
    "wraps_index_keys": ("sglang.srt.mem_cache.index_key_cache:IndexKeyCache", None),
    "masks_itself": ("sglang.srt.constrained.base_grammar_backend:GrammarMask", None),
}
"""What SGLang's newest release has and its oldest that is served has not; `serves_responses` asks for a package."""
PROBES = {"serves_responses", "installed_version", "first_of", "without_dsa", "surface_names"}


def test_every_probe_is_one_that_is_looked_at() -> None:
    own = {name for name, value in vars(sglang_upstream).items() if callable(value) and defined_in(value)}
    assert {name for name in own if not name.startswith("_")} == set(SHIMS) | PROBES


def defined_in(value: object, module: ModuleType = sglang_upstream) -> bool:
    return getattr(value, "__module__", None) == module.__name__


@pytest.mark.parametrize("probe", SHIMS)
def test_a_probe_is_still_needed(probe: str) -> None:
    """Once the oldest release has what it asks for, the probe can go, and what is done where the answer is no."""
    oldest, *_, newest = surface.stored(PRODUCT / "sglang_adapter").values()
    name, member = SHIMS[probe]
    assert newest[name] is not None, "what it asks for has another name by now"
    if member is None:
        assert oldest[name] is None
    else:
        assert member in newest[name]
        assert member not in oldest[name]


def test_a_place_that_has_moved_is_still_needed_where_it_was() -> None:
    oldest, *_, newest = surface.stored(PRODUCT / "sglang_adapter").values()
    for place, (targets, _) in sglang_upstream.PLACES.items():
        if len(targets) > 1:
            assert oldest[targets[0]] is None, f"{place}: the oldest release has the newer path"
            assert newest[targets[0]] is not None, f"{place}: the newest release has it elsewhere"
