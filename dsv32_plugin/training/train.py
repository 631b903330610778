"""The three stages of the paper: dense training, warm-up of the indexer against the attention, sparse training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsv32_plugin.training.data import answer_mask, batches
from dsv32_plugin.training.losses import attention_target, indexer_kl
from dsv32_plugin.training.model import DsaModel, Experts, Output, top_k
from dsv32_plugin.training.muon import Muon
from dsv32_plugin.training.recipe import Recipe, Stage
from dsv32_plugin.training.tokenizer import PAD_ID, encode

FLOOR = 0.1
"""Where the cosine ends, as a share of the highest learning rate."""
(EQUALS_ID,) = encode("=")


@dataclass
class Losses:
    """Scalars of one batch, still on the device."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


def learning_rate_factor(step: int, stage: Stage) -> float:
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def is_indexer(name: str) -> bool:
    return ".indexer." in name


def optimizers(model: DsaModel, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest; the warm-up moves the indexer only."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        trained = stage.kind == "sparse" or is_indexer(name) == (stage.kind == "warmup")
        parameter.requires_grad_(trained)
        parameter.grad = None
        if not trained:
            continue
        plain = parameter.dim() < 2 or is_indexer(name) or name.startswith(("embed", "head")) or "gate.weight" in name
        (others if plain else matrices).append(parameter)
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon(matrices, stage.matrix_lr))
    fused = others[0].is_cuda
    made.append(torch.optim.AdamW(others, stage.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return made


def probes(tokens: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """[B, count] query positions: half of them where the model answers, the others anywhere."""
    length = tokens.shape[1] - 2  # the last two have no MTP target
    answers = answer_mask(tokens)[:, 1 : length + 1].float()  # the query before each token of an answer
    near = torch.multinomial(answers + 1e-6, count // 2, generator=generator)
    anywhere = torch.randint(length, (len(tokens), count - count // 2), generator=generator, device=tokens.device)
    return torch.cat((near, anywhere), 1).sort(1).values


def language_losses(model: DsaModel, output: Output, tokens: torch.Tensor, recipe: Recipe) -> Losses:
    """Next-token loss, and that of the token after it, mostly on answers."""
    answers = answer_mask(tokens)
    weights = torch.where(answers, 1.0, recipe.context_weight).masked_fill(tokens == PAD_ID, 0)
    logits = model.head(output.hidden[:, :-1])
    losses = token_losses(logits, tokens[:, 1:])
    total = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
    with torch.no_grad():
        right = logits.argmax(-1) == tokens[:, 1:]
        asked = answers[:, 1:] & (tokens[:, :-1] == EQUALS_ID)
        spoken = answers[:, 1:]
        parts = {
            "answer_loss": (losses * spoken).sum() / spoken.sum(),
            "answer_accuracy": (right & spoken).sum() / spoken.sum(),
            "lookup_accuracy": (right & asked).sum() / asked.sum().clamp(min=1),
        }
    if output.mtp_hidden is not None:
        losses = token_losses(model.head(output.mtp_hidden[:, :-1]), tokens[:, 2:])
        mtp = (losses * weights[:, 2:]).sum() / weights[:, 2:].sum()
        parts["mtp_loss"] = mtp.detach()
        total = total + recipe.mtp_weight * mtp
    return Losses(total, parts)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def indexer_losses(output: Output) -> torch.Tensor:
    """[layers] the KL of every layer's indexer: equation 3 after dense attention, equation 4 after sparse."""
    return torch.stack(
        [indexer_kl(attention_target(p.attention_bhqs), p.scores_bqs, p.visible_bqs) for p in output.probes]
    )


def batch_losses(
    model: DsaModel, tokens: torch.Tensor, stage: Stage, recipe: Recipe, generator: torch.Generator
) -> Losses:
    probed = probes(tokens, stage.probes, generator) if stage.probes else None
    select = partial(top_k, k=recipe.config.index_topk) if stage.kind == "sparse" else None
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        output = model(tokens, select=select, probed_bq=probed, mtp=True)
        language = language_losses(model, output, tokens, recipe)
    if probed is None:
        return language
    divergences = indexer_losses(output)
    language.parts["indexer_kl"] = divergences.detach().mean()
    if stage.kind == "warmup":
        return Losses(divergences.sum(), language.parts)
    return Losses(language.total + recipe.indexer_weight * divergences.sum(), language.parts)


Report = Callable[[dict[str, Any]], None]


def run_stage(
    model: DsaModel,
    stage: Stage,
    recipe: Recipe,
    *,
    number: int,
    workers: int,
    report: Report,
    every: int = 20,
    losses: Callable[..., Losses] = batch_losses,
) -> None:
    """Train one stage from its beginning; `report` gets the means of every `every` steps."""
    device = model.rope.device
    model.train()
    chosen = optimizers(model, stage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator(device).manual_seed(recipe.seed + 1000 * number)
    window: list[dict[str, torch.Tensor]] = []
    started, since, tokens_done = time.monotonic(), time.monotonic(), 0
    for step, tokens in enumerate(_batches(stage, recipe, number, workers)):
        tokens = tokens.to(device, non_blocking=True)
        factor = learning_rate_factor(step, stage)
        result = losses(model, tokens, stage, recipe, generator)
        result.total.backward()
        norm = nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        if stage.kind != "warmup":
            for module in model.modules():
                if isinstance(module, Experts):
                    module.balance(recipe.balance_speed)
        window.append({**result.parts, "gradient_norm": norm})
        tokens_done += tokens.numel()
        if (step + 1) % every == 0 or step + 1 == stage.steps:
            means = {name: torch.stack([part[name] for part in window]).mean().item() for name in window[0]}
            now = time.monotonic()
            report(
                {
                    "stage": stage.kind,
                    "step": step + 1,
                    "length": tokens.shape[1],
                    "seconds": round(now - started, 2),
                    "tokens_per_second": round(tokens_done / (now - since)),
                    **{name: round(value, 5) for name, value in means.items()},
                }
            )
            window, since, tokens_done = [], now, 0


def _batches(stage: Stage, recipe: Recipe, number: int, workers: int) -> Iterator[torch.Tensor]:
    for part, (length, steps) in enumerate(stage.lengths):
        seed = recipe.seed * 10000 + number * 100 + part
        made = batches(seed, max(1, stage.tokens_per_step // length), length, recipe.needle_share, workers)
        for _ in range(steps):
            yield next(made)
