"""`dsv32 train-tiny`: a tiny model that means something, trained with the paper's recipe."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv32_plugin.console import CommandError, stderr, stdout

SHOWN = ("answer_loss", "lookup_accuracy", "indexer_kl")


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train-tiny",
        help="train the tiny checkpoint that the demo serves",
        description="Train a small DeepSeek-V3.2 on generated tasks: dense, then the indexer against the attention, "
        "then sparse. OUT becomes a Hugging Face checkpoint, with the loss curves beside it.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data (default: 0)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    parser.add_argument("--workers", type=int, default=8, help="processes that generate data (default: 8)")
    parser.add_argument("--skip-warmup", action="store_true", help="leave out the indexer's warm-up, to compare")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    choice.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.exists() and not (arguments.resume or arguments.force):
        raise CommandError(f"{out} exists; choose another folder, go on with --resume, or replace it with --force")
    try:
        import torch

        from dsv32_plugin.training import plots
        from dsv32_plugin.training.recipe import Recipe
        from dsv32_plugin.training.trainer import Trainer
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'dsv32-plugin[train]'") from error
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device: expected a device of this machine, got {device}, and torch sees no GPU")
    if out.exists() and arguments.force:
        shutil.rmtree(out)
    recipe = replace(Recipe(), seed=arguments.seed)
    if arguments.skip_warmup:
        recipe = replace(recipe, stages=tuple(stage for stage in recipe.stages if stage.kind != "warmup"))
    with _Progress(sum(stage.steps for stage in recipe.stages)) as progress:
        trainer = Trainer(
            recipe, out, device=device, workers=arguments.workers, resume=arguments.resume, report=progress.show
        )
        trainer.run()
    (out / "curves.json").write_text("[\n" + ",\n".join(map(json.dumps, trainer.log)) + "\n]\n", encoding="utf-8")
    plots.curves(trainer.log, out / "curves.png")
    stdout.print(f"{out}: a checkpoint, curves.json and curves.png; evaluate it with", soft_wrap=True, markup=False)
    stdout.print(f"python -m dsv32_plugin.training.evaluate {out}", soft_wrap=True, markup=False)
    return 0


class _Progress:
    """A bar on a terminal, a line per report elsewhere."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
        self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, line: dict[str, Any]) -> None:
        numbers = " ".join(f"{name} {line[name]:.3f}" for name in SHOWN if name in line)
        speed = f"{line['tokens_per_second'] / 1000:.0f}k tokens/s"
        text = f"{line['stage']} {line['step']} at {line['length']} tokens, {speed} {numbers}"
        self._bar.update(self._task, completed=line["run_step"], description=text)
        if not stderr.is_terminal:
            stderr.print(text, soft_wrap=True, markup=False)
