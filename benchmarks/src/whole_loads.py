"""What `dsv32 bench whole` asks a server: prompts alone, batches that decode together, and requests at a fixed rate."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv32_plugin.benchmarks import serve, serve_client
from dsv32_plugin.benchmarks.records import Row
from dsv32_plugin.benchmarks.serve import MODEL
from dsv32_plugin.benchmarks.serve_client import ORDINARY_TOKENS, Answer, Request, Workload

TOGETHER = 0.9
"""Of the time of their answers, so much must all sequences of a batch have decoded together."""
LEAST, WARM_UPS = 4, 2
"""Requests at a rate, and before them."""
ANSWER_S = 600


@dataclass(frozen=True)
class Shape:
    """What a server is asked for."""

    lengths: dict[int, tuple[int, int]]
    """Tokens of a prompt -> those that are measured alone, and different ones in a batch."""
    batches: tuple[int, ...]
    answer: int
    rates: dict[str, tuple[int, int, tuple[float, ...]]]
    """Workload -> tokens of a prompt and of an answer, requests a second."""
    span_s: float
    """So long requests come at a rate."""
    context: int


REAL = Shape(
    lengths={2048: (5, 16), 32768: (2, 8), 131072: (1, 2)}, batches=(1, 16, 64, 256), answer=128, context=135168,
    rates={
        "chat": (1024, 1024, (1, 4, 16)),
        "document": (32768, 500, (0.1, 0.25, 0.5)),
        "agent": (12288, 300, (0.25, 1, 2)),
    },
    span_s=40,
)  # fmt: skip
REHEARSAL = Shape(
    lengths={128: (2, 2), 320: (1, 1)}, batches=(1, 2, 8), answer=64, context=1024,
    rates={"chat": (32, 16, (2, 4))}, span_s=2,
)  # fmt: skip


def ask(url: str, shape: Shape, case: dict[str, Any], shares: int) -> Row:
    """The figures of a case, or the error that is in their place; each of `shares` has caches of its own."""
    if "load" in case:
        found = rate(url, shape, case["workload"], case["load"])
    elif case["B"] == 1:
        found = one_by_one(url, shape, case["L"])
    else:
        found = batch(url, shape, case["L"], case["B"], max(1, shape.lengths[case["L"]][1] // shares))
    if found["completed"] < found["requests"]:
        # A figure of the others would be of a smaller load.
        return {"error": f"{found['completed']} of {found['requests']} answered: {found['errors'][0]}"}
    return found


def prompt(length: int, number: int) -> tuple[int, ...]:
    numbers = random.Random(f"whole {length} {number}")
    return tuple(numbers.randrange(*ORDINARY_TOKENS) for _ in range(length))


def send(url: str, requests: Sequence[Request], *, alone: bool = False) -> tuple[Row, list[Answer]]:
    answers, seconds = serve_client.drive(url, MODEL, requests, alone=alone, timeout_s=ANSWER_S)
    return serve_client.summary(answers, seconds), answers


def one_by_one(url: str, shape: Shape, length: int) -> Row:
    count, _ = shape.lengths[length]
    send(url, [Request(0.0, prompt(length, 0), 2)])
    answer = shape.answer
    found, _ = send(url, [Request(0.0, prompt(length, 1 + n), answer) for n in range(count)], alone=True)
    return chosen(found, "ttft_ms", "tpot_ms")


def batch(url: str, shape: Shape, length: int, size: int, distinct: int) -> Row:
    # One token more than whole pages: all that is not in the cache, so that the first step is short.
    prompts = [(*prompt(length, number % distinct), ORDINARY_TOKENS[0] + number) for number in range(size)]
    send(url, [Request(0.0, tokens, 2) for tokens in prompts])
    found, answers = send(url, [Request(0.0, tokens, shape.answer) for tokens in prompts])
    good = [answer for answer in answers if not answer.error]
    if len(good) == size:
        both = min(answer.last_s for answer in good) - max(answer.first_s for answer in good)
        longest = max(answer.last_s - answer.first_s for answer in good)
        if both < TOGETHER * longest:
            text = f"all {size} decoded together for {both:.2f} s of {longest:.2f}: not in the prefix cache"
            return {"requests": size, "completed": size, "errors": [], "error": text}
    return chosen(found, "tpot_ms") | {"distinct": distinct}


def rate(url: str, shape: Shape, workload: str, load: str) -> Row:
    asked, answer, rates = shape.rates[workload]
    a_second = next(value for value in rates if serve.load_name(value) == load)
    lengths = Workload(workload, (asked, 0.0, asked), (answer, 0.0, answer))
    count = max(LEAST, math.ceil(a_second * shape.span_s))
    send(url, serve_client.requests(lengths, WARM_UPS, math.inf, "warm", longest=shape.context))
    found, _ = send(url, serve_client.requests(lengths, count, a_second, load, longest=shape.context))
    return found


def chosen(found: Row, *names: str) -> Row:
    return found | {"figures": {name: found["figures"][name] for name in names}} if "figures" in found else found
