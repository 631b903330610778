"""How far an engine on a GPU is from Hugging Face in float32, measured by how far bfloat16 is.

Teacher forced: the judge is given the tokens that the engine was given or chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from client import Completion
from oracle import hf_logprobs
from rounding import Rounding, mean_error


class Judge:
    """Hugging Face's log-probabilities of given tokens, in float32 and in rounded bfloat16, remembered."""

    def __init__(self, model: Path, prompts: Sequence[Sequence[int]], rounding: Rounding) -> None:
        self.model, self.prompts, self.rounding = model, prompts, rounding
        self._known: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}

    def ask(self, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        if tuple(tokens) not in self._known:
            exact = hf_logprobs(self.model, tokens, device="cuda")
            plain = hf_logprobs(self.model, tokens, device="cuda", dtype=torch.bfloat16, rounding=self.rounding)
            self._known[tuple(tokens)] = (exact, plain)
        return self._known[tuple(tokens)]

    def errors_of_prompts(self, served: Sequence[Sequence[float]]) -> float:
        rows = [(logprobs, *self.ask(prompt)) for prompt, logprobs in zip(self.prompts, served, strict=True)]
        return self._ratio(rows)

    def errors_of_answers(self, answers: Sequence[Completion]) -> float:
        rows = []
        for prompt, answer in zip(self.prompts, answers, strict=True):
            exact, plain = self.ask([*prompt, *answer.tokens])
            rows.append((answer.logprobs, exact[len(prompt) - 1 :], plain[len(prompt) - 1 :]))
        return self._ratio(rows)

    @staticmethod
    def _ratio(rows: Sequence[tuple[Sequence[float], Sequence[float], Sequence[float]]]) -> float:
        """Mean error of what was served over the mean error of the bfloat16 run, over all tokens of all prompts."""
        served, exact, plain = ([x for row in rows for x in row[i]] for i in range(3))
        return mean_error(served, exact) / mean_error(plain, exact)
