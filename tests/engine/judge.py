"""How far an engine is from Hugging Face's float32, in units of how far Hugging Face's own bfloat16 run is.

Both are teacher forced. A prompt counts by its mean error over its tokens, whatever its length. The tokens of an answer
are the engine's choice, and a rounding error that makes a token likelier makes it chosen: the run that the engine is
measured by is judged on its own choice, too, at every step of the engine's answer.

With DSV32_PARITY_REPORT=FILE the tests write down what they find; `python tests/engine/judge.py FILE` prints a table.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from client import Completion
from oracle import hf_distributions
from rounding import Rounding

TOKENS_AT_ONCE = 4096
RESAMPLES = 400


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors of log-probabilities, prompt by prompt."""

    lengths: list[int]
    served: list[float]
    own: list[float]

    @property
    def ratio(self) -> float:
        return sum(self.served) / sum(self.own)

    @property
    def spread(self) -> float:
        """Standard deviation of the ratio, by drawing the prompts again and again with replacement."""
        pairs, choose = list(zip(self.served, self.own, strict=True)), random.Random(0)
        drawn = (list(zip(*choose.choices(pairs, k=len(pairs)), strict=True)) for _ in range(RESAMPLES))
        return statistics.stdev(sum(served) / sum(own) for served, own in drawn)

    def report(self) -> dict[str, object]:
        rows = sorted(zip(self.lengths, self.served, self.own, strict=True))
        by_length = {
            length: [statistics.mean(row[column] for row in group) for column in (1, 2)]
            for length, group in ((length, list(group)) for length, group in groupby(rows, key=lambda row: row[0]))
        }
        return {"ratio": self.ratio, "spread": self.spread, "served, own by length": by_length}


def assert_near(found: Mapping[str, Errors], margin: float, **what: str) -> None:
    """Raise AssertionError if a ratio exceeds the margin."""
    if report := os.environ.get("DSV32_PARITY_REPORT"):
        with Path(report).open("a") as out:
            for way, errors in found.items():
                out.write(json.dumps({**what, "way": way, "margin": margin, **errors.report()}) + "\n")
    ratios = {way: errors.ratio for way, errors in found.items()}
    assert max(ratios.values()) <= margin, ratios


class Judge:
    """Knows Hugging Face's float32 and bfloat16 answers for one checkpoint and one set of prompts."""

    def __init__(self, model: Path, prompts: Sequence[Sequence[int]], rounding: Rounding, device: str = "cuda") -> None:
        self.model, self.prompts, self.rounding, self.device = model, prompts, rounding, device

    def errors_of_prompts(self, served: Sequence[Sequence[float]]) -> Errors:
        """Of the log-probabilities of every prompt's tokens but the first."""
        found = []
        for prompt, logprobs, (exact_nv, own_nv) in zip(self.prompts, served, self._both(self.prompts), strict=True):
            given_n = torch.tensor(list(prompt[1:]), device=self.device)
            found.append(self._errors(logprobs, given_n, given_n, exact_nv, own_nv))
        return self._all(found)

    def errors_of_answers(self, answers: Sequence[Completion]) -> Errors:
        sequences = [[*prompt, *answer.tokens] for prompt, answer in zip(self.prompts, answers, strict=True)]
        found = []
        for answer, (exact_nv, own_nv) in zip(answers, self._both(sequences, len(answers[0].tokens)), strict=True):
            chosen_n = torch.tensor(answer.tokens, device=self.device)
            found.append(self._errors(answer.logprobs, chosen_n, own_nv.argmax(-1), exact_nv, own_nv))
        return self._all(found)

    def _errors(
        self,
        served: Sequence[float],
        tokens_n: torch.Tensor,
        own_tokens_n: torch.Tensor,
        exact_nv: torch.Tensor,
        own_nv: torch.Tensor,
    ) -> tuple[float, float]:
        served_n = torch.tensor(list(served), device=self.device)
        served_error = (served_n - _at(exact_nv, tokens_n)).abs().mean().item()
        own_error = (_at(own_nv, own_tokens_n) - _at(exact_nv, own_tokens_n)).abs().mean().item()
        return served_error, own_error

    def _all(self, found: Sequence[tuple[float, float]]) -> Errors:
        served, own = zip(*found, strict=True)
        return Errors([len(prompt) for prompt in self.prompts], list(served), list(own))

    def _both(
        self, sequences: Sequence[Sequence[int]], count: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each sequence's last `count` tokens, or all but the first: float32's log-probabilities, and bfloat16's."""
        for length, group in groupby(sequences, key=len):
            alike = list(group)
            step = max(1, TOKENS_AT_ONCE // length)
            for i in range(0, len(alike), step):
                exact, own = (
                    hf_distributions(self.model, alike[i : i + step], count or length - 1, device=self.device, **run)
                    for run in ({}, {"dtype": torch.bfloat16, "rounding": self.rounding})
                )
                yield from zip(exact, own, strict=True)


def _at(logprobs_nv: torch.Tensor, tokens_n: torch.Tensor) -> torch.Tensor:
    return logprobs_nv.gather(1, tokens_n[:, None])[:, 0]


def _table(report: Path) -> Iterator[str]:
    """Rows of ratio and spread, a variant each."""
    found: dict[str, dict[str, str]] = {}
    for line in report.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["variant"], {})[entry["way"]] = f"{entry['ratio']:.3g} ± {entry['spread']:.1g}"
    ways = list(dict.fromkeys(way for row in found.values() for way in row))
    yield " | ".join(["| variant", *ways]) + " |"
    yield " | ".join(["| ---", *("---" for _ in ways)]) + " |"
    for variant in sorted(found):
        yield " | ".join([f"| {variant}", *(found[variant].get(way, "") for way in ways)]) + " |"


if __name__ == "__main__":
    print(*_table(Path(sys.argv[1])), sep="\n")
