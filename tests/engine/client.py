"""A small client of a served model: prompts as token ids in, tokens and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import torch

TIMEOUT_S = 300


@dataclass(frozen=True)
class Completion:
    tokens: list[int]
    logprobs: list[float]
    cached_tokens: int


def random_prompt(length: int, seed: int) -> list[int]:
    """BOS and `length - 1` ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [0, *torch.randint(3, 128000, (length - 1,), generator=generator).tolist()]


def complete(url: str, prompt: Sequence[int], steps: int, **options: Any) -> Completion:
    """Greedy: exactly `steps` tokens after the prompt."""
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": steps,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        **options,
    }
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert response.status_code == httpx.codes.OK, response.text
    answer = response.json()
    choice = answer["choices"][0]
    details = answer["usage"].get("prompt_tokens_details") or {}
    return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], details.get("cached_tokens", 0))


def complete_together(url: str, prompts: Sequence[Sequence[int]], steps: int, **options: Any) -> list[Completion]:
    """All prompts at once, so that the engine batches them."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: complete(url, prompt, steps, **options), prompts))


def prompt_logprobs(url: str, prompt: Sequence[int]) -> list[float]:
    """Teacher forced: the log-probability of each token of the prompt but the first."""
    body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert response.status_code == httpx.codes.OK, response.text
    steps = response.json()["choices"][0]["prompt_logprobs"][1:]
    return [step[str(token)]["logprob"] for token, step in zip(prompt[1:], steps, strict=True)]


def metric(url: str, name: str) -> float:
    """The sum over labels of one of the server's Prometheus counters."""
    lines = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text.splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]
    assert values, f"the server has no metric {name}"
    return sum(values)
