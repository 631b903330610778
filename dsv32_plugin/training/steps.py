"""One training step of each stage: which parameters move, at what rate, and against which losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from dsv32_plugin.training.data import answer_mask
from dsv32_plugin.training.losses import attention_target, indexer_kl
from dsv32_plugin.training.model import DsaModel, Output, top_k
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
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
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
        later = answers[:, 2:]
        parts["mtp_loss"] = (losses.detach() * later).sum() / later.sum()
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
