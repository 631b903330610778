"""The pictures of a training run: loss curves, and how much attention the selection holds after each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

PANELS = (
    ("answer_loss", "loss on answers (nats a token)", "log"),
    ("mtp_loss", "MTP loss on answers (nats a token)", "log"),
    ("lookup_accuracy", "first token after '=' right", "linear"),
    ("indexer_kl", "indexer KL (nats a query)", "log"),
)


def curves(log: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Every logged quantity over the steps of the whole run, the stages shaded."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
    stages = list(dict.fromkeys(line["stage"] for line in log))
    for axis, (name, title, scale) in zip(axes.flat, PANELS, strict=True):
        for i, stage in enumerate(stages):
            steps = [line["run_step"] for line in log if line["stage"] == stage]
            lines = [line for line in log if line["stage"] == stage and name in line]
            axis.plot([line["run_step"] for line in lines], [line[name] for line in lines], color=f"C{i}", label=stage)
            axis.axvspan(steps[0], steps[-1], color=f"C{i}", alpha=0.07)
        axis.set_title(title, fontsize=10)
        axis.set_yscale(scale)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def attention_mass(shares: Mapping[str, Sequence[float]], k: int, out: Path) -> None:
    """Bars for each layer, one for each model: the share of dense attention in the indexer's best `k` keys."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(shares)
    for i, (name, values) in enumerate(shares.items()):
        axis.bar([layer + i * width for layer in range(len(values))], values, width, label=name)
    layers = len(next(iter(shares.values())))
    names = [f"layer {layer}" for layer in range(layers - 1)] + ["MTP"]
    axis.set_xticks([layer + 0.4 - width / 2 for layer in range(layers)], names)
    axis.set_ylim(0, 1)
    axis.set_ylabel(f"dense attention in the selected {k}")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)
