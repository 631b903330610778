"""What the tiny model can do: needles by context and selection, attention mass in the selection, tools, sums, MTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from random import Random
from typing import Any

import torch

from dsv32_plugin.kernels.formulas import quantize, rotate
from dsv32_plugin.training import tasks
from dsv32_plugin.training.data import Rows, answer_mask
from dsv32_plugin.training.losses import attention_target
from dsv32_plugin.training.model import DsaModel, IndexInputs, Select, causal, top_k
from dsv32_plugin.training.recipe import TRAINED_LENGTH
from dsv32_plugin.training.steps import probes
from dsv32_plugin.training.tokenizer import PAD_ID, encode

LENGTHS = (512, 1024, 2048, 4096, 8192)
SEED = "evaluation"
BATCH_TOKENS = 65536


def fp8_top_k(index: IndexInputs, k: int, *, rotated: bool) -> torch.Tensor:
    """The selection of an fp8 indexer: e4m3 queries and keys with power-of-two scales, as served on GPUs."""
    turn: Callable[[torch.Tensor], torch.Tensor] = rotate if rotated else lambda x: x
    dim = index.k_bsd.shape[-1]
    q, q_scale = quantize(turn(index.q_btid.float()), dim)
    key, k_scale = quantize(turn(index.k_bsd.float()), dim)
    return top_k(IndexInputs(q.float() * q_scale, key.float() * k_scale, index.w_bti), k)


def random_k(index: IndexInputs, k: int, generator: torch.Generator) -> torch.Tensor:
    """As many keys as `top_k` takes, any of the earlier ones."""
    batch, tokens = index.k_bsd.shape[:2]
    device = index.k_bsd.device
    allowed = causal(tokens, device)
    noise = torch.rand(batch, tokens, tokens, device=device, generator=generator).masked_fill_(~allowed, -1)
    best = noise.topk(min(k, tokens), -1).indices
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, best, True) & allowed


def selections(model: DsaModel) -> dict[str, Select | None]:
    """Every way to choose keys that the evaluation compares, by name."""
    k = model.config.index_topk
    generator = torch.Generator(model.rope.device).manual_seed(0)
    return {
        "dense": None,
        "sparse": partial(top_k, k=k),
        "sparse, fp8 rotated": partial(fp8_top_k, k=k, rotated=True),
        "sparse, fp8": partial(fp8_top_k, k=k, rotated=False),
        "random": partial(random_k, k=k, generator=generator),
    }


def needle_questions(length: int, count: int) -> list[tuple[str, str]]:
    """(prompt, answer) of `count` held-out questions, each about one code in a context of about `length` tokens."""
    random = Random(f"{SEED}/needles/{length}")
    return [tasks.needles_of(random, length, 1).cut(0) for _ in range(count)]


@torch.no_grad()
def exact(model: DsaModel, questions: Sequence[tuple[str, str]], select: Select | None) -> list[bool]:
    """Whether greedy decoding gives the answer exactly, its EOS included.

    Every token of the true answer is the best one after those before it: that is when greedy decoding yields it.
    """
    encoded = [(encode(prompt), encode(answer)) for prompt, answer in questions]
    results: list[bool] = []
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    size = max(1, BATCH_TOKENS // longest)
    for begin in range(0, len(encoded), size):
        part = encoded[begin : begin + size]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        tokens = torch.full((len(part), width), PAD_ID)
        asked = torch.zeros(len(part), width, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(part):
            tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            asked[i, len(prompt) : len(prompt) + len(answer)] = True
        tokens, asked = tokens.to(model.rope.device), asked.to(model.rope.device)
        best = model.head(model(tokens, select=select).hidden[:, :-1]).argmax(-1)
        results += ((best == tokens[:, 1:]) | ~asked[:, 1:]).all(1).tolist()
    return results


def share(results: Sequence[bool]) -> float:
    return sum(results) / len(results)


def needle_table(
    model: DsaModel, names: Iterable[str], lengths: Iterable[int], count: int
) -> dict[str, dict[str, float]]:
    """selection -> context length -> share of exact answers."""
    known = selections(model)
    questions = {length: needle_questions(length, count) for length in lengths}
    return {
        name: {str(length): share(exact(model, asked, known[name])) for length, asked in questions.items()}
        for name in names
    }


def _sample(seed: str, length: int, needle_share: float, count: int) -> torch.Tensor:
    return torch.cat(list(islice(Rows(seed, 4, length, needle_share), count // 4)))


@torch.no_grad()
def attention_mass(model: DsaModel, length: int = TRAINED_LENGTH, rows: int = 16, queries: int = 128) -> list[float]:
    """For each layer the share of dense attention that the indexer's best keys hold, MTP last; where K < position."""
    device = model.rope.device
    totals = torch.zeros(model.config.num_layers + 1)
    generator = torch.Generator(device).manual_seed(0)
    batches = _sample(f"{SEED}/mass", length, 0.6, rows).split(4)
    for tokens in batches:
        tokens = tokens.to(device)
        probed = probes(tokens, queries, generator).clamp(min=2 * model.config.index_topk)
        for layer, probe in enumerate(model(tokens, probed_bq=probed, mtp=True).probes):
            scores = probe.scores_bqs.masked_fill(~probe.visible_bqs, float("-inf"))
            best = scores.topk(model.config.index_topk, -1).indices
            totals[layer] += attention_target(probe.attention_bhqs).gather(-1, best).sum(-1).mean().cpu()
    return [round(x, 4) for x in (totals / len(batches)).tolist()]


@torch.no_grad()
def mtp_acceptance(model: DsaModel, length: int = 1024, rows: int = 64) -> float:
    """How often the MTP layer's draft of the token after next is the one that the model then says, in answers."""
    select = selections(model)["sparse"]
    accepted = drafted = 0.0
    for tokens in _sample(f"{SEED}/mtp", length, 0.5, rows).split(16):
        tokens = tokens.to(model.rope.device)
        output = model(tokens, select=select, mtp=True)
        assert output.mtp_hidden is not None
        draft = model.head(output.mtp_hidden[:, :-1]).argmax(-1)
        said = model.head(output.hidden[:, 1:-1]).argmax(-1)
        counted = answer_mask(tokens)[:, 2:]
        accepted += ((draft == said) & counted).sum().item()
        drafted += counted.sum().item()
    return accepted / drafted


def chat_accuracy(model: DsaModel, count: int) -> dict[str, float]:
    """Exact answers with the served selection: calls, answers from results, sums that training held out, copies."""
    random = Random(f"{SEED}/chat")
    uses = [tasks.tool_use(random, 1) for _ in range(count)]
    questions = {
        "tool call": [use.cut(0) for use in uses],
        "answer from the result": [use.cut(1) for use in uses],
        "addition": [tasks.addition(random, evaluation=True).cut(0) for _ in range(count)],
        "copy": [tasks.copying(random).cut(-1) for _ in range(count)],
    }
    select = selections(model)["sparse"]
    return {name: share(exact(model, asked, select)) for name, asked in questions.items()}


def summary(model: DsaModel, lengths: Iterable[int], count: int, names: Iterable[str] | None = None) -> dict[str, Any]:
    """All of the above; `count` questions of each kind."""
    was_training = model.training
    model.eval()
    record = {
        "needles": needle_table(model, names or selections(model), lengths, count),
        "attention_mass": attention_mass(model),
        "chat": chat_accuracy(model, count),
        "mtp_acceptance": mtp_acceptance(model),
    }
    model.train(was_training)
    return record
