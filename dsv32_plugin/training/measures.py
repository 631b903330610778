"""What the tiny model can do: needles by context and selection, attention mass in the selection, tools, sums, MTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from random import Random

import torch

from dsv32_plugin.kernels.formulas import quantize, rotate
from dsv32_plugin.training import tasks
from dsv32_plugin.training.data import Rows, answer_mask
from dsv32_plugin.training.losses import attention_target
from dsv32_plugin.training.model import DsaModel, IndexInputs, Select, causal, top_k
from dsv32_plugin.training.steps import probes
from dsv32_plugin.training.tokenizer import PAD_ID, encode

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


def exact(model: DsaModel, questions: Sequence[tuple[str, str]], select: Select | None) -> list[bool]:
    """Whether greedy decoding of each prompt gives its answer exactly, the EOS included."""
    return greedy_gives(model, [(encode(prompt), encode(answer)) for prompt, answer in questions], select)


@torch.no_grad()
def greedy_gives(model: DsaModel, pairs: Sequence[tuple[list[int], list[int]]], select: Select | None) -> list[bool]:
    """Whether greedy decoding of each prompt begins with these tokens.

    It does when each of them is the best one after the prompt and those before it: one pass, no generation.
    """
    results: list[bool] = []
    size = max(1, BATCH_TOKENS // max(len(prompt) + len(answer) for prompt, answer in pairs))
    for begin in range(0, len(pairs), size):
        part = pairs[begin : begin + size]
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


def _sample(seed: str, length: int, needle_share: float, count: int) -> torch.Tensor:
    return torch.cat(list(islice(Rows(seed, 4, length, needle_share), count // 4)))


@torch.no_grad()
def attention_mass(model: DsaModel, length: int, rows: int = 16, queries: int = 128) -> list[float]:
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
