"""Runs a recipe: the stages of the paper one after the other, its state on disk, so that a run can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsv32_plugin.console import CommandError
from dsv32_plugin.training import checkpoint
from dsv32_plugin.training.data import Rows, batches
from dsv32_plugin.training.model import DsaModel, Experts, initialise
from dsv32_plugin.training.recipe import Recipe, Stage
from dsv32_plugin.training.steps import batch_losses, learning_rate_factor, optimizers

STATE = "state.pt"
STAGES = "stages"
REPORT_STEPS = 10
SAVE_SECONDS = 120.0

Report = Callable[[dict[str, Any]], None]
"""Gets the mean of the last steps' losses, with where the run is."""


class Trainer:
    """One run in the folder `out`, which holds `state.pt`, a checkpoint after each stage, and at the end the model.

    Raises CommandError if `resume` finds no state, or that of another recipe.
    """

    def __init__(
        self, recipe: Recipe, out: Path, *, device: str, workers: int, resume: bool = False, report: Report = print
    ) -> None:
        self.recipe, self.out, self.workers, self.report = recipe, out, workers, report
        self.device = torch.device(device)
        self.model = DsaModel(recipe.config)
        initialise(self.model, recipe.seed)
        self.model.to(self.device)
        self.stage, self.step = 0, 0
        self.log: list[dict[str, Any]] = []
        self._pending: dict[str, Any] | None = None
        if resume:
            self._restore()
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Train what is left, and write the checkpoint."""
        while self.stage < len(self.recipe.stages):
            stage = self.recipe.stages[self.stage]
            self._run_stage(stage)
            folder = self.out / STAGES / f"{self.stage + 1}-{stage.kind}"
            checkpoint.save(self.model, self.recipe.model, folder)
            self.stage, self.step = self.stage + 1, 0
            self._save([])
        checkpoint.save(self.model, self.recipe.model, self.out)

    def _run_stage(self, stage: Stage) -> None:
        recipe = self.recipe
        self.model.train()
        chosen = optimizers(self.model, stage)
        generator = torch.Generator(self.device).manual_seed(recipe.seed + 1000 * self.stage)
        if self._pending is not None:
            for optimizer, state in zip(chosen, self._pending["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            generator.set_state(self._pending["generator"])
            self._pending = None
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        experts = [module for module in self.model.modules() if isinstance(module, Experts)]
        window: list[dict[str, torch.Tensor]] = []
        saved = since = time.monotonic()
        for tokens in self._batches(stage):
            tokens = tokens.to(self.device, non_blocking=True)
            losses = batch_losses(self.model, tokens, stage, recipe, generator)
            losses.total.backward()
            norm = nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            factor = learning_rate_factor(self.step, stage)
            for optimizer in chosen:
                for group in optimizer.param_groups:
                    group["lr"] = group["full_lr"] * factor
                optimizer.step()
                optimizer.zero_grad()
            for module in experts:
                module.balance(0.0 if stage.kind == "warmup" else recipe.balance_speed)
            self.step += 1
            window.append({**losses.parts, "gradient_norm": norm})
            if self.step % REPORT_STEPS == 0 or self.step == stage.steps:
                self._report(stage, tokens, window, time.monotonic() - since)
                window, since = [], time.monotonic()
                if since - saved > SAVE_SECONDS:
                    self._save(chosen, generator)
                    saved = since

    def _batches(self, stage: Stage) -> Iterator[torch.Tensor]:
        """The stage's batches from the current step on."""
        begin = 0
        for part, (length, steps) in enumerate(stage.lengths):
            first = max(0, self.step - begin)
            if first < steps:
                seed = f"{self.recipe.seed}/{self.stage}/{part}"
                rows = Rows(seed, max(1, stage.tokens_per_step // length), length, self.recipe.needle_share, first)
                made = batches(rows, self.workers)
                for _ in range(first, steps):
                    yield next(made)
            begin += steps

    def _report(
        self, stage: Stage, tokens: torch.Tensor, window: list[dict[str, torch.Tensor]], seconds: float
    ) -> None:
        means = {name: torch.stack([part[name] for part in window]).mean().item() for name in window[0]}
        line = {
            "stage": stage.kind,
            "step": self.step,
            "run_step": self.step + sum(before.steps for before in self.recipe.stages[: self.stage]),
            "length": tokens.shape[1],
            "tokens_per_second": round(tokens.numel() * len(window) / seconds),
            **{name: round(value, 5) for name, value in means.items()},
        }
        self.log.append(line)
        self.report(line)

    def _save(self, chosen: list[torch.optim.Optimizer], generator: torch.Generator | None = None) -> None:
        state = {
            "recipe": self.recipe.as_dict(),
            "stage": self.stage,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in chosen],
            "generator": generator.get_state() if generator else None,
            "log": self.log,
        }
        partial = self.out / f"{STATE}.partial"
        torch.save(state, partial)
        partial.rename(self.out / STATE)

    def _restore(self) -> None:
        path = self.out / STATE
        if not path.exists():
            raise CommandError(f"{path}: expected the state of an earlier run, found none; leave --resume out")
        state = torch.load(path, map_location=self.device, weights_only=True)
        if differences := differing(state["recipe"], self.recipe.as_dict()):
            raise CommandError(
                f"{path}: this run has another recipe than the one to resume: {'; '.join(differences)}; "
                "give the same options, or begin anew in another folder"
            )
        self.model.load_state_dict(state["model"])
        self.stage, self.step, self.log = state["stage"], state["step"], state["log"]
        if state["optimizers"]:
            state["generator"] = state["generator"].cpu()
            self._pending = state


def differing(before: Any, now: Any, name: str = "") -> list[str]:
    """Each value in which two nested dicts and lists differ, as `name: before, now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line for key in keys for line in differing(before.get(key), now.get(key), f"{name}.{key}".removeprefix("."))
        ]
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and len(before) == len(now):
        return [
            line for i, (b, n) in enumerate(zip(before, now, strict=True)) for line in differing(b, n, f"{name}[{i}]")
        ]
    return [] if before == now else [f"{name} was {before}, is {now}"]
