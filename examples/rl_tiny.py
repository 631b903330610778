"""GRPO on the small trained model, with SGLang and this plugin as the rollout engine, on a CPU.

    python examples/rl_tiny.py --steps 20 --out rl

Every step samples groups of answers, rewards the right ones, takes a gradient step with the paper's loss (equations 5
to 9), and gives the server the new weights. It prints the reward, and how far the trainer's log-probabilities are from
those that the tokens were sampled with: with nothing, or with what the rollout kept: the sampling mask, the experts
(routing), the selected keys. `rl.json` and `rl.png` have the same.

The sampling mask needs SGLang 0.5.23; with an older release sampling is from all tokens (--top-p 1).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import httpx
import torch

from dsv32_plugin.engines import SGLANG
from dsv32_plugin.tools.demo import ENVIRONMENT, TRAINED
from dsv32_plugin.tools.serving import SglangServer
from dsv32_plugin.training import checkpoint, tasks
from dsv32_plugin.training.losses import group_advantages, grpo_loss
from dsv32_plugin.training.model import DsaModel, top_k
from dsv32_plugin.training.replay import Replay, from_answers
from dsv32_plugin.training.tokenizer import PAD_ID, encode, tokenizer

CONTEXT_TOKENS = 200
"""Of a question: more than the 64 keys that a token selects."""
ANSWER_TOKENS = 12
TOP_K = 64
"""With top-p below 1: SGLang returns masks of a bounded number of tokens only."""
KEPT = {"nothing": (), "mask": ("mask",), "mask, routing": ("mask", "routing"),
        "mask, routing, selection": ("mask", "routing", "selection")}  # fmt: skip
"""What the trainer takes from the rollout."""


@dataclass(frozen=True)
class Rollout:
    """One sampled answer."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    """Of the answer's tokens, under the distribution that they were sampled from."""
    masks: list[list[int]] | None
    """The tokens that each could have been, where sampling was not from all."""
    selection: str
    experts: str
    reward: float
    version: str
    """Of the weights that sampled it."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float

    def ask(self, url: str, seed: int, question: tuple[str, str]) -> Rollout:
        prompt, right = question
        sampling = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            **({"top_k": TOP_K} if self.top_p < 1 else {}),
            "max_new_tokens": ANSWER_TOKENS,
            "sampling_seed": seed,
        }
        body = {
            "input_ids": encode(prompt),
            "sampling_params": sampling,
            "return_logprob": True,
            "return_routed_experts": True,
            "return_indexer_topk": True,
            **({"return_sampling_mask": True} if self.top_p < 1 else {}),
        }
        response = httpx.post(f"{url}/generate", json=body, timeout=600)
        if response.status_code != httpx.codes.OK:
            raise SystemExit(f"{url}/generate: status {response.status_code}: {response.text}")
        meta = response.json()["meta_info"]
        logprobs, answer, _ = map(list, zip(*meta["output_token_logprobs"], strict=True))
        return Rollout(
            prompt=body["input_ids"],
            answer=answer,
            # Those of `output_token_logprobs` are over all tokens.
            logprobs=meta.get("output_token_sampling_logprobs", logprobs),
            masks=meta.get("output_token_sampling_mask"),
            selection=meta["indexer_topk"],
            experts=meta["routed_experts"],
            reward=float(tokenizer().decode(answer, skip_special_tokens=False) == right),
            version=meta["weight_version"],
        )


def questions(random: Random, groups: int) -> list[tuple[str, str]]:
    """(prompt, right answer): a code in a list."""
    return [tasks.needles_of(random, CONTEXT_TOKENS, 1, thinking=0).cut(0) for _ in range(groups)]


def sample(url: str, asked: Sequence[tuple[str, str]], size: int, sampling: Sampling, seeds: Any) -> list[Rollout]:
    """`size` answers to each question, all at once."""
    cases = [(next(seeds), question) for question in asked for _ in range(size)]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda case: sampling.ask(url, *case), cases))


def replayed(model: DsaModel, rollouts: Sequence[Rollout], kept: Sequence[str]) -> Replay:
    return from_answers(
        model.config,
        [len(rollout.tokens) for rollout in rollouts],
        selections=[rollout.selection for rollout in rollouts] if "selection" in kept else None,
        routed_experts=[rollout.experts for rollout in rollouts] if "routing" in kept else None,
    )


def log_probabilities(
    model: DsaModel, rollouts: Sequence[Rollout], sampling: Sampling, kept: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, A] the trainer's, of the answers' tokens, and which of these there are."""
    longest = max(len(rollout.tokens) for rollout in rollouts)
    tokens = torch.tensor([r.tokens + [PAD_ID] * (longest - len(r.tokens)) for r in rollouts])
    select = partial(top_k, k=model.config.index_topk)
    hidden = model(tokens, select=select, replay=replayed(model, rollouts, kept)).hidden
    logp = torch.zeros(len(rollouts), ANSWER_TOKENS)
    there = torch.zeros(len(rollouts), ANSWER_TOKENS, dtype=torch.bool)
    rows = []
    for row, rollout in enumerate(rollouts):
        first, size = len(rollout.prompt) - 1, len(rollout.answer)
        logits = model.head(hidden[row, first : first + size]) / sampling.temperature
        if "mask" in kept and rollout.masks is not None:
            others = torch.ones_like(logits, dtype=torch.bool)
            for other_v, mask in zip(others, rollout.masks, strict=True):
                other_v[torch.tensor(mask)] = False
            logits = logits.masked_fill(others, float("-inf"))
        found = logits.log_softmax(-1).gather(1, torch.tensor(rollout.answer)[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(found, (0, ANSWER_TOKENS - size)))
        there[row, :size] = True
    return logp + torch.stack(rows), there


def sampled_with(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """[N, A] the rollout's log-probabilities."""
    return torch.tensor([r.logprobs + [0.0] * (ANSWER_TOKENS - len(r.logprobs)) for r in rollouts])


@torch.no_grad()
def divergences(model: DsaModel, rollouts: Sequence[Rollout], sampling: Sampling) -> dict[str, list[float]]:
    """How far trainer and rollout are apart, on average and at most, by what is kept; and two runs of the trainer."""
    found, old = {}, sampled_with(rollouts)
    for name, kept in KEPT.items():
        logp, there = log_probabilities(model, rollouts, sampling, kept)
        gaps = (logp - old)[there].abs()
        found[name] = [float(gaps.mean()), float(gaps.max())]
    alone = torch.cat([log_probabilities(model, [rollout], sampling, kept)[0] for rollout in rollouts])
    gaps = (logp - alone)[there].abs()
    found["trainer, another micro-batch"] = [float(gaps.mean()), float(gaps.max())]
    return found


def improve(
    model: DsaModel, optimizer: torch.optim.Optimizer, rollouts: Sequence[Rollout], size: int, sampling: Sampling
) -> float:
    """One gradient step over groups of `size`; returns the loss."""
    old = sampled_with(rollouts)
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    optimizer.zero_grad()
    total = 0.0
    for first in range(0, len(rollouts), size):
        group = slice(first, first + size)
        advantages = group_advantages(rewards[group])
        if not advantages.any():
            continue
        logp, there = log_probabilities(model, rollouts[group], sampling, KEPT["mask, routing, selection"])
        loss = grpo_loss(logp, old[group], old[group], advantages, there, threshold=0.5) * size / len(rollouts)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def give_weights(url: str, model: DsaModel, folder: Path, version: str, dtype: torch.dtype) -> None:
    """The server takes them in while it runs, and forgets the caches that the old ones wrote."""
    checkpoint.save(model, json.loads((TRAINED / "config.json").read_text()), folder, dtype)
    body = {"model_path": str(folder), "weight_version": version}
    response = httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=600)
    if response.status_code != httpx.codes.OK:
        raise SystemExit(f"{url}/update_weights_from_disk: {response.text}")


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["reward"] for line in lines], marker="o", markersize=3)
    left.set_title("share of right answers")
    for name in lines[0]["divergence"]:
        right.plot(steps, [line["divergence"][name][1] for line in lines], label=name)
    right.set_title("largest gap of log-probabilities, trainer to rollout")
    right.set_yscale("log")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def train(url: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    model = checkpoint.load(TRAINED)
    sampling = Sampling(arguments.temperature, arguments.top_p)
    optimizer = torch.optim.AdamW(model.parameters(), arguments.lr, weight_decay=0.0)
    random, seeds, lines = Random(0), count(), []
    give_weights(url, model, arguments.out / "weights", "0", getattr(torch, arguments.dtype))
    for step in range(arguments.steps):
        rollouts = sample(url, questions(random, arguments.groups), arguments.size, sampling, seeds)
        if {rollout.version for rollout in rollouts} != {str(step)}:
            raise SystemExit(f"step {step}: sampled with weights {sorted({rollout.version for rollout in rollouts})}")
        gaps = divergences(model, rollouts[: 2 * arguments.size], sampling)
        reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
        loss = improve(model, optimizer, rollouts, arguments.size, sampling)
        give_weights(url, model, arguments.out / "weights", str(step + 1), getattr(torch, arguments.dtype))
        lines.append({"step": step, "reward": reward, "loss": loss, "divergence": gaps})
        shown = "  ".join(f"{name} {mean:.1e} {most:.1e}" for name, (mean, most) in gaps.items())
        print(f"step {step}: reward {reward:.3f}  loss {loss:+.4f}  gaps (mean, most): {shown}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=8, help="questions a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=8, help="answers to each (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=2.5)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the server")
    parser.add_argument("--out", type=Path, default=Path("rl"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = [*("--dtype", arguments.dtype), *SGLANG.demo_options, "--skip-server-warmup", "--sleep-on-idle"]
    options += ["--enable-return-indexer-topk", "--enable-return-routed-experts", "--max-running-requests", "16"]
    with SglangServer(TRAINED, options, log_path=arguments.out / "server.log", env=ENVIRONMENT) as server:
        server.wait_until_ready(600)
        lines = train(server.url, arguments)
    (arguments.out / "rl.json").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plot(lines, arguments.out / "rl.png")


if __name__ == "__main__":
    main()
