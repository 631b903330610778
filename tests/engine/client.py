"""A small client of a served model: prompts as token ids in, tokens and log-probabilities out.

`complete` and `prompt_logprobs` ask vLLM, `generate` and `input_logprobs` SGLang, whose OpenAI endpoint tells no ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import torch

TIMEOUT_S = 300
# One for all: to make one takes a tenth of a second, by which requests that are meant to be concurrent would be apart.
_HTTP = httpx.Client(timeout=TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass(frozen=True)
class Completion:
    tokens: list[int]
    logprobs: list[float]
    cached_tokens: int
    retractions: int = 0
    drafted: int = 0
    accepted: int = 0


def random_prompt(length: int, seed: int) -> list[int]:
    """BOS and `length - 1` ordinary tokens; of one seed, a shorter prompt is the beginning of a longer one."""
    generator = torch.Generator().manual_seed(seed)
    return [0, *torch.randint(3, 128000, (length - 1,), generator=generator).tolist()]


def complete(
    url: str, prompt: Sequence[int], steps: int, *, headers: Mapping[str, str] | None = None, **options: Any
) -> Completion:
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
    response = _HTTP.post(f"{url}/v1/completions", json=body, headers=headers)
    assert response.status_code == httpx.codes.OK, response.text
    answer = response.json()
    choice = answer["choices"][0]
    details = answer["usage"].get("prompt_tokens_details") or {}
    return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], details.get("cached_tokens", 0))


def generate(url: str, prompt: Sequence[int], steps: int, **options: Any) -> Completion:
    """`complete`, through SGLang's own endpoint."""
    sampling = {"max_new_tokens": steps, "temperature": 0, "ignore_eos": True, **options}
    meta = _generate(url, prompt, sampling)
    logprobs, tokens, _ = zip(*meta["output_token_logprobs"], strict=True)
    drafts = (meta.get("spec_num_proposed_drafts", 0), meta.get("spec_num_correct_drafts", 0))
    return Completion(list(tokens), list(logprobs), meta["cached_tokens"], meta["num_retractions"], *drafts)


def input_logprobs(url: str, prompt: Sequence[int]) -> list[float]:
    """`prompt_logprobs`, through SGLang's own endpoint."""
    meta = _generate(url, prompt, {"max_new_tokens": 1}, logprob_start_len=0)
    return [logprob for logprob, _, _ in meta["input_token_logprobs"][1:]]


def _generate(url: str, prompt: Sequence[int], sampling: dict[str, Any], **options: Any) -> dict[str, Any]:
    body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True, **options}
    response = _HTTP.post(f"{url}/generate", json=body)
    assert response.status_code == httpx.codes.OK, response.text
    meta: dict[str, Any] = response.json()["meta_info"]
    return meta


def complete_together(
    url: str,
    prompts: Sequence[Sequence[int]],
    steps: int,
    ask: Callable[..., Completion] = complete,
    **options: Any,
) -> list[Completion]:
    """All prompts at once, so that the engine batches them."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(url, prompt, steps, **options), prompts))


def prompt_logprobs(url: str, prompt: Sequence[int]) -> list[float]:
    """Teacher forced: the log-probability of each token of the prompt but the first."""
    body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0}
    response = _HTTP.post(f"{url}/v1/completions", json=body)
    assert response.status_code == httpx.codes.OK, response.text
    steps = response.json()["choices"][0]["prompt_logprobs"][1:]
    return [step[str(token)]["logprob"] for token, step in zip(prompt[1:], steps, strict=True)]


def metric(url: str, name: str) -> float:
    """The sum over labels of one of the server's Prometheus counters."""
    lines = _HTTP.get(f"{url}/metrics").text.splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]
    assert values, f"the server has no metric {name}"
    return sum(values)
