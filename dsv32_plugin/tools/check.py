"""`dsv32 check MODEL`: what serves a checkpoint, from its config, index of tensors and tokenizer alone.

MODEL is a folder or a name on the Hugging Face hub, of which only these files are fetched. It asks the code that a
start asks. Exit status 0 means that nothing of the checkpoint stands in the way, 1 that something does.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv32_plugin.console import CommandError, stderr
from dsv32_plugin.core import chat_format, checkpoint
from dsv32_plugin.core.chat_format import ChatFormat
from dsv32_plugin.core.config import ConfigError, DsaConfig
from dsv32_plugin.core.quantisation import BlockFp8
from dsv32_plugin.engines import ENGINES, Engine
from dsv32_plugin.tools.findings import Finding, show

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"
TOKENIZER = "tokenizer.json"
READ = (CONFIG, MODELOPT, checkpoint.INDEX, TOKENIZER, chat_format.TOKENIZER_CONFIG, chat_format.TEMPLATE)
TESTED_CHIPS = ("sm90",)
"""Those that the tests have run on; the kernels are compiled for all others."""
RANKS = (1, 2, 4, 8, 16)
H200_GIB, H200_SHARE = 139, 0.85
"""Memory of one, and how much of it weights may take if a cache is to be left."""
_SHOWN = 3


@dataclass(frozen=True)
class Place:
    """A checkpoint's files, here or on the hub."""

    name: str
    """As the user calls it."""
    folder: Path
    files: Collection[str]
    """All that the checkpoint has."""
    is_local: bool


def examine(model: str, revision: str | None = None) -> list[Finding]:
    """All rows; raises CommandError where there is nothing to look at."""
    place = _locate(model, revision)
    config = _config(place)
    if isinstance(config, Finding):
        return [config]
    return [*_model(config), *_weights(place, config), *_chats(place, config)]


def config_of(model: str) -> DsaConfig:
    """The checkpoint's; raises CommandError where there is none that can be served."""
    found = _config(_locate(model, None))
    if isinstance(found, Finding):
        raise CommandError(f"{found.name}: {found.found}; {found.advice}")
    return found


def _locate(model: str, revision: str | None) -> Place:
    folder = Path(model)
    if folder.is_dir():
        return Place(model, folder, {path.name for path in folder.iterdir()}, is_local=True)
    if model.count("/") != 1 or model.startswith((".", "/")) or folder.exists():
        raise CommandError(f"MODEL: expected a checkpoint's folder or OWNER/NAME on the hub, got {model}")
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install huggingface_hub, or give a folder") from error
    try:
        with stderr.status(f"fetching {', '.join(READ)} of {model}"):
            files = set(HfApi().list_repo_files(model, revision=revision))
            found = snapshot_download(model, revision=revision, allow_patterns=list(READ))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandError(
            f"{model}: the hub gave no files: {reason}; download the checkpoint and give its folder"
        ) from error
    return Place(model, Path(found), files, is_local=False)


def _config(place: Place) -> DsaConfig | Finding:
    path = place.folder / CONFIG
    section = "config"
    if not path.exists():
        return Finding(section, CONFIG, f"none in {place.name}", "wrong", "copy the checkpoint's config.json there")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("it holds no object")
        if not stored.get("quantization_config") and (place.folder / MODELOPT).exists():
            stored["quantization_config"] = json.loads((place.folder / MODELOPT).read_text(encoding="utf-8"))
        return DsaConfig.from_hf(stored)
    except ConfigError as error:
        return Finding(section, str(path), "refused", "wrong", str(error))
    except ValueError as error:
        return Finding(section, str(path), f"no JSON: {error}", "wrong", "copy the file again")


def _model(config: DsaConfig) -> Iterator[Finding]:
    section = "model"
    selecting = config.indexer_types.count("full")
    yield Finding(section, "architecture", config.architecture, "ok")
    layers = f"{config.num_layers}, of which {selecting} select and {config.num_layers - selecting} share a selection"
    yield Finding(section, "layers", layers)
    yield Finding(
        section, "heads", f"{config.num_heads} of {config.qk_head_dim}, {config.index_n_heads} of the indexer"
    )
    yield Finding(section, "keys a query", f"{config.index_topk} of at most {config.max_position_embeddings}")
    drafts = config.num_nextn_predict_layers
    yield Finding(section, "draft layers", str(drafts), advice="" if drafts else "without speculative decoding")
    stored = "as they are" if config.quantisation is None else config.quantisation.name
    yield Finding(section, "matrices", stored, "ok")
    try:
        checkpoint.check_alike(config)
    except ConfigError as error:
        yield Finding(section, "matrices", "refused", "wrong", str(error))


def _weights(place: Place, config: DsaConfig) -> Iterator[Finding]:
    section = "weights"
    yield Finding(
        section, "size", f"{_gib(config):.0f} GiB", advice=f"{checkpoint.parameters(config) / 1e9:.0f} billion numbers"
    )
    try:
        names = _tensors(place)
    except ValueError as error:
        yield Finding(section, "tensors", "cannot be read", "wrong", str(error))
        return
    if names is None:
        advice = f"of the tensors nothing is said; a start needs {checkpoint.INDEX} and its shards"
        yield Finding(section, "tensors", f"no {checkpoint.INDEX}", "warning", advice)
        return
    yield from _shards(place)
    if strange := checkpoint.unknown(config, names):
        found, advice = _some(strange), f"{config.architecture} by this config.json has none of that name"
        yield Finding(section, "unknown tensors", found, "wrong", advice)
    if lost := checkpoint.lacking(config, names, drafts=False):
        yield Finding(section, "missing tensors", _some(lost), "wrong", f"is {checkpoint.INDEX} the checkpoint's own?")
    if config.num_nextn_predict_layers and (lost := checkpoint.lacking(config, names, drafts=True)):
        advice = "leave speculative decoding out"
        yield Finding(section, "missing tensors of the draft layer", _some(lost), "warning", advice)
    if not strange and not lost:
        yield Finding(section, "tensors", f"{len(names)}, as the config says", "ok")


def _tensors(place: Place) -> Collection[str] | None:
    """Their names; raises ValueError."""
    where = checkpoint.read_index(place.folder)
    if where is not None:
        return where.keys()
    return checkpoint.headers(place.folder) if place.is_local else None


def _shards(place: Place) -> Iterator[Finding]:
    shards = set((checkpoint.read_index(place.folder) or {}).values())
    here = shards & set(place.files)
    if not shards:
        return
    if place.is_local and not here:
        advice = f"a start needs them in {place.folder}"
        yield Finding("weights", "shards", f"none of {len(shards)} is here", "warning", advice)
    elif len(here) < len(shards):
        advice = f"{checkpoint.INDEX} names them; copy them to {place.name}"
        yield Finding("weights", "missing shards", _some(sorted(shards - here)), "wrong", advice)
    else:
        yield Finding("weights", "shards", str(len(shards)), "ok")


def _chats(place: Place, config: DsaConfig) -> Iterator[Finding]:
    section = "chats"
    if TOKENIZER not in place.files:
        yield Finding(section, TOKENIZER, f"none in {place.name}", "wrong", "copy the checkpoint's tokenizer there")
    try:
        spoken, why = chat_format.of(config.architecture, chat_format.template_of(place.folder))
    except ValueError as error:
        path = place.folder / chat_format.TOKENIZER_CONFIG
        yield Finding(section, str(path), f"no JSON: {error}", "wrong", "copy the file again")
        return
    level = "warning" if spoken is None else "ok"
    yield Finding(section, "encoding", "its own" if spoken is None else spoken.name, level, why)
    for engine in ENGINES.values():
        yield from _engine(place, config, engine, spoken)


def _engine(place: Place, config: DsaConfig, engine: Engine, spoken: ChatFormat | None) -> Iterator[Finding]:
    section = engine.name
    releases = [release for release in engine.releases if not release.broken]
    advice = f"{engine.install} is tested most"
    if broken := [release.name for release in engine.releases if release.broken or release.broken_on_cpu]:
        advice += f"; {', '.join(broken)} is refused where it fails by itself"
    yield Finding(section, "releases", f"{releases[0].name} to {releases[-1].name}", "ok", advice)
    yield from _gpus(config, engine)
    options = ""
    if spoken is not None:
        tool, reasoning = spoken.parsers[engine.distribution]
        options = f"--tool-call-parser {tool} --reasoning-parser {reasoning}"
        yield Finding(section, "parsers", options, "ok", f"they read {spoken.name} answers")
    yield Finding(section, "start", engine.start(place.name, _ranks(config), options))


def _gpus(config: DsaConfig, engine: Engine) -> Iterator[Finding]:
    section, name = engine.name, "GPUs"
    try:
        config.check_kernels()
    except ConfigError as error:
        yield Finding(section, name, "none", "warning", str(error))
        return
    chips = chips_of(config, engine.distribution)
    if not chips:
        assert config.quantisation is not None
        advice = f"{engine.name} has no path on GPUs for {config.quantisation.name}; without one it is dequantised"
        yield Finding(section, name, "none", "warning", advice)
        return
    tried = config.quantisation is None or all(isinstance(scheme, BlockFp8) for scheme in config.quantisation.schemes)
    tested = [chip for chip in chips if tried and chip in TESTED_CHIPS]
    rest = [chip for chip in chips if chip not in tested]
    found = f"{', '.join(tested) or 'not run with this format'}; by its weights {_ranks(config)} x H200 or more"
    advice = f"also {', '.join(rest)}: compiled for, not run" if rest else ""
    yield Finding(section, name, found, "ok" if tested else "warning", advice)


def chips_of(config: DsaConfig, engine: str) -> list[str]:
    """The chips that the kernels are compiled for and on which an engine multiplies this checkpoint's matrices."""
    from dsv32_plugin.kernels.runtime.target import TARGETS

    schemes = [] if config.quantisation is None else config.quantisation.schemes
    if engine == "sglang" and not all(isinstance(scheme, BlockFp8) for scheme in schemes):
        return []
    return [
        name
        for name, target in TARGETS.items()
        if all(target.is_cuda and _runs(int(target.arch), scheme) for scheme in schemes)
    ]


def _runs(capability: int, scheme: Any) -> bool:
    return bool(capability == scheme.only_chip if scheme.only_chip else capability >= scheme.first_chip)


def _ranks(config: DsaConfig) -> int:
    """The fewest of the usual numbers of GPUs that hold the weights, and over which the heads can be cut."""
    enough = math.ceil(_gib(config) / (H200_GIB * H200_SHARE))
    fitting = [ranks for ranks in RANKS if config.num_heads % ranks == 0]
    return next((ranks for ranks in fitting if ranks >= enough), fitting[-1])


def _gib(config: DsaConfig) -> float:
    """Of the tensors that are not quantised in bfloat16."""
    split, total = checkpoint.matrices(config), 0
    for tensor in checkpoint.tensors(config):
        module = tensor.name.removesuffix(".weight")
        if tensor.unused:
            continue
        if module in split and not tensor.plain and len(tensor.shape) == 2:
            total += sum(part.bytes for part in split[module].parts(module).values())
        else:
            total += 2 * math.prod(tensor.shape)
    return total / 2**30


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return f"{len(names)}: {', '.join(shown)}{', …' if len(names) > _SHOWN else ''}"


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check", help="say what serves a checkpoint, and what it lacks", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, or OWNER/NAME on the hub")
    parser.add_argument("--revision", help="of the checkpoint on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    try:
        findings = examine(arguments.model, arguments.revision)
    except CommandError as error:
        findings = [Finding("files", arguments.model, "not found", "wrong", str(error))]
    return show("dsv32 check", findings, verdict=f"{arguments.model} can be served", as_json=arguments.json)
