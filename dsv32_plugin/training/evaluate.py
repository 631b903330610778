"""What the tiny model can do: needles by context and selection, attention mass in the selection, tools, sums, MTP."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from dsv32_plugin.console import stderr
from dsv32_plugin.kernels.formulas import quantize, rotate
from dsv32_plugin.training import checkpoint, tasks
from dsv32_plugin.training.data import Rows, answer_mask
from dsv32_plugin.training.losses import attention_target
from dsv32_plugin.training.model import DsaModel, IndexInputs, Select, causal, top_k
from dsv32_plugin.training.recipe import TRAINED_LENGTH
from dsv32_plugin.training.steps import probes
from dsv32_plugin.training.tokenizer import PAD_ID, encode
from dsv32_plugin.training.trainer import STAGES

LENGTHS = (512, 1024, 2048, 4096, 8192)
SEED = "evaluation"
BATCH_TOKENS = 65536

Record = dict[str, Any]


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


def evaluate(folder: Path, device: str, lengths: Sequence[int], count: int, write: Callable[[Record], None]) -> None:
    """Measure the checkpoint in `folder`, and those after its stages; `write` gets the record as it grows."""
    stages = {path.name: checkpoint.load(path, device) for path in sorted((folder / STAGES).glob("*"))}
    model = checkpoint.load(folder, device)
    record: Record = {"questions": count, "selected": model.config.index_topk, "parameters": parameters(model)}
    length = min(TRAINED_LENGTH, model.config.max_position_embeddings)
    record["chat"] = chat_accuracy(model, count)
    record["mtp_acceptance"] = mtp_acceptance(model)
    record["attention_mass"] = {
        name: attention_mass(stage, length) for name, stage in (stages or {"final": model}).items()
    }
    write(record)
    known: dict[str, tuple[DsaModel, Select | None]] = {
        name: (model, select) for name, select in selections(model).items()
    }
    for name, stage in stages.items():
        if name != max(stages):
            known[f"sparse, after stage {name}"] = (stage, selections(stage)["sparse"])
    record["needles"] = {name: {} for name in known}
    for length in lengths:
        asked = needle_questions(length, count)
        for name, (asked_model, select) in known.items():
            record["needles"][name][str(length)] = share(exact(asked_model, asked, select))
            write(record)


def parameters(model: DsaModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsv32_plugin.training.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder that train-tiny wrote")
    parser.add_argument("--out", type=Path, default=Path("training.json"), help="record to write (JSON)")
    parser.add_argument("--plot", type=Path, help="picture of the attention mass to draw (PNG)")
    parser.add_argument("--questions", type=int, default=500, help="of each kind and length (default: 500)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="contexts, in tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if longest := [length for length in arguments.lengths if length > TRAINED_LENGTH]:
        stderr.print(f"warning: contexts of {longest} tokens exceed the {TRAINED_LENGTH} of the training")
    where = torch.cuda.get_device_name(arguments.device) if arguments.device.startswith("cuda") else "CPU"
    about = {
        "command": " ".join(["python -m dsv32_plugin.training.evaluate", *sys.argv[1:]]),
        "device": where,
        "torch": torch.__version__,
    }

    def write(record: Record) -> None:
        arguments.out.write_text(json.dumps({**about, **record}, indent=1) + "\n", encoding="utf-8")

    try:
        evaluate(arguments.checkpoint, arguments.device, arguments.lengths, arguments.questions, write)
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
    """The tables of docs/training.md."""
    lengths = list(next(iter(record["needles"].values())))
    lines = ["| selection | " + " | ".join(lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    for name, shares in record["needles"].items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * shares[length]:.1f} %" for length in lengths) + " |")
    layers = len(next(iter(record["attention_mass"].values())))
    names = [*(f"layer {layer}" for layer in range(layers - 1)), "MTP"]
    lines += ["", "| after stage | " + " | ".join(names) + " |", "| --- |" + " ---: |" * layers]
    for name, shares in record["attention_mass"].items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * value:.1f} %" for value in shares) + " |")
    lines += ["", "| task | exact |", "| --- | ---: |"]
    lines += [f"| {name} | {100 * value:.1f} % |" for name, value in record["chat"].items()]
    lines.append(f"| MTP drafts accepted | {100 * record['mtp_acceptance']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
