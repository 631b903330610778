"""An open-loop client: requests leave at their appointed times, whether or not the server keeps up; or each alone.

A closed loop waits for answers and so hides a slow server; here a queue that grows shows in the time to the first
token. One process reads every stream, which is enough for some thousand tokens a second.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

ORDINARY_TOKENS = (3, 128000)
"""Ids of the vocabulary that are neither special nor unused."""
PERCENTILES = {"low": 0.10, "median": 0.50, "high": 0.90, "p99": 0.99}


@dataclass(frozen=True)
class Workload:
    """How long prompts and answers are. Lengths are log-normal: a median, a spread (sigma of the logarithm), limits."""

    name: str
    prompt: tuple[int, float, int]
    """Median, spread, most."""
    answer: tuple[int, float, int]
    shared_prefix: int = 0
    """Tokens at the beginning that every prompt has: a system prompt with tools."""


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("chat", (800, 1.0, 8192), (250, 0.7, 1024)),
        Workload("document", (32768, 0.6, 122880), (200, 0.5, 512)),
        Workload("agent", (12288, 0.7, 65536), (120, 0.8, 1024), shared_prefix=4096),
    )
}


@dataclass(frozen=True)
class Request:
    at_s: float
    prompt: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Answer:
    """What one request saw; times are seconds since it was sent."""

    prompt_tokens: int = 0
    tokens: int = 0
    first_s: float = math.nan
    last_s: float = math.nan
    error: str = ""


def requests(workload: Workload, count: int, rate: float, seed: str, *, longest: int) -> list[Request]:
    """`count` requests with exponential gaps of mean 1/`rate` seconds (a Poisson process); the same for every server.

    A rate of 0 or infinity has no gaps. Prompts of different workloads or seeds share nothing. Where the longest prompt
    and answer together would pass `longest` tokens, all lengths shrink in proportion.
    """
    rng = random.Random(f"{workload.name} {seed}")
    scale = min(1.0, longest / (workload.prompt[2] + workload.answer[2]))
    prefix = tuple(rng.randrange(*ORDINARY_TOKENS) for _ in range(int(workload.shared_prefix * scale)))
    found, at_s = [], 0.0
    for _ in range(count):
        prompt, answer = (_length(rng, limits, scale) for limits in (workload.prompt, workload.answer))
        own = (rng.randrange(*ORDINARY_TOKENS) for _ in range(max(1, prompt - len(prefix))))
        found.append(Request(at_s, (*prefix, *own)[: longest - answer], answer))
        at_s += rng.expovariate(rate) if rate else 0.0
    return found


def _length(rng: random.Random, limits: tuple[int, float, int], scale: float) -> int:
    median, spread, most = limits
    drawn = rng.lognormvariate(math.log(median), spread) if spread else median
    return max(2, int(min(drawn, most) * scale))


def drive(
    url: str,
    model: str,
    plan: Sequence[Request],
    *,
    timeout_s: float,
    alone: bool = False,
    on_answer: Callable[[], None] = lambda: None,
) -> tuple[list[Answer], float]:
    """Send every request at its time to the OpenAI-compatible server; the answers, and seconds from first to last.

    `alone`: send each when the last is answered instead.
    """
    return asyncio.run(_drive(url, model, plan, timeout_s, alone, on_answer))


async def _drive(
    url: str, model: str, plan: Sequence[Request], timeout_s: float, alone: bool, on_answer: Callable[[], None]
) -> tuple[list[Answer], float]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits) as client:
        begin = time.perf_counter()

        async def send(request: Request) -> Answer:
            await asyncio.sleep(max(0.0, begin + request.at_s - time.perf_counter()))
            answer = await ask(client, model, request)
            on_answer()
            return answer

        if alone:
            answers = [await send(request) for request in plan]
        else:
            answers = await asyncio.gather(*(send(request) for request in plan))
        return answers, time.perf_counter() - begin


async def ask(client: httpx.AsyncClient, model: str, request: Request) -> Answer:
    """One streamed completion of exactly the wanted length."""
    body = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin, first_s, last_s, usage = time.perf_counter(), math.nan, math.nan, None
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                return Answer(error=f"status {response.status_code}: {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[len("data: ") :])
                if "error" in chunk:
                    return Answer(error=str(chunk["error"])[:200])
                if chunk.get("choices"):
                    last_s = time.perf_counter() - begin
                    first_s = last_s if math.isnan(first_s) else first_s
                usage = chunk.get("usage") or usage
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    if usage is None or math.isnan(first_s):
        return Answer(error="the stream ended without a token or without its usage")
    if usage["completion_tokens"] != request.answer_tokens:
        return Answer(error=f"{usage['completion_tokens']} tokens where {request.answer_tokens} were asked for")
    return Answer(usage["prompt_tokens"], usage["completion_tokens"], first_s, last_s)


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """The figures of one run. `ttft_ms`: to the first token. `tpot_ms`: between tokens after it, a mean a request."""
    good = [answer for answer in answers if not answer.error]
    found: dict[str, Any] = {
        "requests": len(answers),
        "completed": len(good),
        "seconds": round(seconds, 2),
        "errors": sorted({answer.error for answer in answers if answer.error}),
    }
    if not good:
        return {**found, "error": found["errors"][0] if found["errors"] else "no request"}
    gaps = [1e3 * (a.last_s - a.first_s) / (a.tokens - 1) for a in good if a.tokens > 1]
    read, written = (sum(getattr(answer, name) for answer in good) for name in ("prompt_tokens", "tokens"))
    rates = {"input_tokens_per_s": read, "output_tokens_per_s": written, "tokens_per_s": read + written}
    figures = {
        "ttft_ms": percentiles([1e3 * answer.first_s for answer in good]),
        "tpot_ms": percentiles(gaps or [0.0]),
        **{name: {"median": round(tokens / seconds, 1)} for name, tokens in rates.items()},
    }
    return {**found, "figures": figures}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    found = {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) for name, share in PERCENTILES.items()
    }
    return {**found, "mean": round(statistics.fmean(ordered), 3)}
