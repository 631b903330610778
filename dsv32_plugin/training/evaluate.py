"""`python -m dsv32_plugin.training.evaluate`: all that docs/notes/training.md says about a trained checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from dsv32_plugin.console import stderr
from dsv32_plugin.training import checkpoint, measures
from dsv32_plugin.training.model import DsaModel, Select
from dsv32_plugin.training.recipe import TRAINED_LENGTH
from dsv32_plugin.training.trainer import STAGES

LENGTHS = (512, 1024, 2048, 4096, 8192)

Record = dict[str, Any]
Subject = tuple[DsaModel, Select | None]
"""A model, and how it chooses its keys."""


def evaluate(
    folder: Path,
    devices: Sequence[str],
    lengths: Sequence[int],
    count: int,
    write: Callable[[Record], None],
    compared: Mapping[str, Path],
) -> None:
    """Measure the checkpoint in `folder`, those after its stages, and others to compare; `write` gets the record."""
    stages = {path.name: checkpoint.load(path, devices[0]) for path in sorted((folder / STAGES).glob("*"))}
    model = checkpoint.load(folder, devices[0])
    longest = min(TRAINED_LENGTH, model.config.max_position_embeddings)
    masses = {name: measures.attention_mass(stage, longest) for name, stage in (stages or {"final": model}).items()}
    record: Record = {
        "questions": count,
        "selected": model.config.index_topk,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "chat": measures.chat_accuracy(model, count),
        "mtp_acceptance": measures.mtp_acceptance(model),
        "attention_mass": masses,
    }
    write(record)
    subjects = [_subjects(folder, compared, device) for device in devices]
    record["needles"] = {name: {str(length): None for length in sorted(lengths)} for name in subjects[0]}
    ask_needles(record, subjects, list(subjects[0]), lengths, write)


def ask_needles(
    record: Record,
    subjects: Sequence[Mapping[str, Subject]],
    names: Sequence[str],
    lengths: Sequence[int],
    write: Callable[[Record], None],
) -> None:
    """Fill these cells of the record's table of needles; `subjects` are the same on every device."""
    questions = {length: measures.needle_questions(length, record["questions"]) for length in lengths}
    free: SimpleQueue[int] = SimpleQueue()
    for number in range(len(subjects)):
        free.put(number)

    def ask(case: tuple[int, str]) -> float:
        length, name = case
        number = free.get()
        try:
            model, select = subjects[number][name]
            return measures.share(measures.exact(model, questions[length], select))
        finally:
            free.put(number)

    cases = list(product(lengths, names))
    with ThreadPoolExecutor(len(subjects)) as pool:
        for (length, name), found in zip(cases, pool.map(ask, cases), strict=True):
            record["needles"][name][str(length)] = found
            write(record)


def add_needles(
    folder: Path,
    devices: Sequence[str],
    names: Sequence[str],
    lengths: Sequence[int],
    write: Callable[[Record], None],
    compared: Mapping[str, Path],
    record: Record,
) -> None:
    """Measure these cells alone, for a record of the same checkpoint that has the rest."""
    subjects = [_subjects(folder, compared, device) for device in devices]
    if unknown := set(names) - set(subjects[0]):
        raise ValueError(f"--only: expected names of {', '.join(subjects[0])}; got {', '.join(sorted(unknown))}")
    ask_needles(record, subjects, names, lengths, write)


def _subjects(folder: Path, compared: Mapping[str, Path], device: str) -> dict[str, Subject]:
    """Every line of the table of needles."""
    model = checkpoint.load(folder, device)
    subjects: dict[str, Subject] = {name: (model, select) for name, select in measures.selections(model).items()}
    others = {f"sparse, after stage {path.name}": path for path in sorted((folder / STAGES).glob("*"))[:-1]}
    for name, path in {**others, **compared}.items():
        other = checkpoint.load(path, device)
        subjects[name] = (other, measures.selections(other)["sparse"])
    return subjects


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsv32_plugin.training.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder that train-tiny wrote")
    parser.add_argument("--out", type=Path, default=Path("training.json"), help="record to write (JSON)")
    parser.add_argument("--plot", type=Path, help="picture of the attention mass to draw (PNG)")
    parser.add_argument("--questions", type=int, default=500, help="of each kind and length (default: 500)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="contexts, in tokens, first to last"
    )
    parser.add_argument("--compare", nargs="*", default=[], metavar="NAME=FOLDER", help="more checkpoints, sparse only")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="measure only these lines of the needles, for --out as it is",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--devices", nargs="+", default=[default], help="share the work, such as cuda:0 cuda:1")
    arguments = parser.parse_args()
    if longest := [length for length in arguments.lengths if length > TRAINED_LENGTH]:
        stderr.print(f"warning: contexts of {longest} tokens exceed the {TRAINED_LENGTH} of the training")
    first = arguments.devices[0]
    about = {
        "device": torch.cuda.get_device_name(first) if first.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "dtype": "float32",
    }

    def write(record: Record) -> None:
        arguments.out.write_text(json.dumps({**about, **record}, indent=1) + "\n", encoding="utf-8")

    compared = {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in arguments.compare)}
    try:
        if arguments.only:
            record = json.loads(arguments.out.read_text(encoding="utf-8"))
            if differing := {key for key in about if record[key] != about[key]}:
                raise ValueError(f"--only: {arguments.out} was measured with another {', '.join(sorted(differing))}")
            add_needles(
                arguments.checkpoint, arguments.devices, arguments.only, arguments.lengths, write, compared, record
            )
        else:
            evaluate(arguments.checkpoint, arguments.devices, arguments.lengths, arguments.questions, write, compared)
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    record = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.plot:
        from dsv32_plugin.training import plots

        plots.attention_mass(record["attention_mass"], record["selected"], arguments.plot)
    print(markdown(record))
    return 0


def markdown(record: Record) -> str:
    """The tables of docs/notes/training.md."""
    lengths = list(next(iter(record["needles"].values())))
    lines = ["| selection | " + " | ".join(lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    for name, shares in record["needles"].items():
        lines.append(f"| {name} | " + " | ".join(_percent(shares[length]) for length in lengths) + " |")
    layers = len(next(iter(record["attention_mass"].values())))
    names = [*(f"layer {layer}" for layer in range(layers - 1)), "MTP"]
    lines += ["", "| after stage | " + " | ".join(names) + " |", "| --- |" + " ---: |" * layers]
    for name, shares in record["attention_mass"].items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * value:.1f} %" for value in shares) + " |")
    lines += ["", "| task | exact |", "| --- | ---: |"]
    lines += [f"| {name} | {100 * value:.1f} % |" for name, value in record["chat"].items()]
    lines.append(f"| MTP drafts accepted | {100 * record['mtp_acceptance']:.1f} % |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    """None where the evaluation was stopped before."""
    return "not measured" if value is None else f"{100 * value:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
