"""Many concurrent requests of mixed lengths, a part of them aborted: no error, no leak, no NaN, and the same answers.

DSV32_STRESS_SECONDS sets how long (180 for the full form).
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import client
import httpx
from client import random_prompt
from offline import BATCH_INVARIANT, ENVIRONMENT, compiled_late

from dsv32_plugin.tools.serving import VllmServer
from dsv32_plugin.tools.tiny import TinySpec

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

SECONDS = float(os.environ.get("DSV32_STRESS_SECONDS", "30"))
CONCURRENT = 200
ABORTED = 0.3
"""Part of the requests whose client leaves, most of them while the answer is on its way."""
# Prompt and answer lengths; each is answered alone first.
REQUESTS = [
    *((1, 40), (5, 3), (63, 30), (64, 5), (65, 64), (129, 20), (300, 90)),
    *((500, 8), (900, 33), (1500, 16), (2100, 50), (2600, 4), (4000, 25)),
]
OPTIONS = [
    *("--served-model-name", "tiny"),
    *("--dtype", "bfloat16"),
    *("--kv-cache-dtype", "fp8"),
    *("--max-model-len", "4352"),
    *("--max-num-seqs", "128"),
    *("--max-num-batched-tokens", "2048"),
    *("--gpu-memory-utilization", "0.1"),
    # The prompts are 200 pages together, and each of 128 sequences has last pages of its own: they preempt each other.
    *("--num-gpu-blocks-override", "300"),
    *("--kv-cache-memory-bytes", str(1 << 30)),
]
START_TIMEOUT_S = 300


class Client:
    """Sends requests until the time is over, and counts what came of them."""

    def __init__(self, url: str, prompts: list[list[int]], expected: list[client.Completion]) -> None:
        self.url, self.prompts, self.expected = url, prompts, expected
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, seconds: float) -> None:
        # A connection for each request: one that is kept may be closed by the server as the next request is sent.
        limits = httpx.Limits(max_connections=CONCURRENT, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=client.TIMEOUT_S, limits=limits) as http:
            end = time.monotonic() + seconds
            await asyncio.gather(*(self._worker(http, random.Random(seed), end) for seed in range(CONCURRENT)))

    async def _worker(self, http: httpx.AsyncClient, choose: random.Random, end: float) -> None:
        while time.monotonic() < end:
            which = choose.randrange(len(REQUESTS))
            try:
                if choose.random() < ABORTED:
                    await self._leave(http, which, choose.uniform(0.0, 2.0))
                else:
                    await self._compare(http, which)
            except httpx.TransportError as error:
                self.wrong.append(f"prompt of {REQUESTS[which][0]} tokens: {error!r}")

    def _body(self, which: int, **more: Any) -> dict[str, Any]:
        return {
            "model": "tiny", "prompt": self.prompts[which], "max_tokens": REQUESTS[which][1], "temperature": 0,
            "ignore_eos": True, "logprobs": 0, "return_token_ids": True, **more,
        }  # fmt: skip

    async def _compare(self, http: httpx.AsyncClient, which: int) -> None:
        response = await http.post(f"{self.url}/v1/completions", json=self._body(which))
        if response.status_code != httpx.codes.OK:
            self.wrong.append(response.text[:500])
            return
        self.counts["answered"] += 1
        choice, expected = response.json()["choices"][0], self.expected[which]
        found = (choice["token_ids"], choice["logprobs"]["token_logprobs"])
        if found != (expected.tokens, expected.logprobs):
            steps = zip(*found, expected.tokens, expected.logprobs, strict=True)
            step, differing = next((i, step) for i, step in enumerate(steps) if step[:2] != step[2:])
            self.wrong.append(
                f"after a prompt of {REQUESTS[which][0]} tokens other than alone, step {step}: {differing}"
            )

    async def _leave(self, http: httpx.AsyncClient, which: int, seconds: float) -> None:
        """Open a stream and drop the connection after some time, even before the first token."""
        try:
            await asyncio.wait_for(self._stream(http, which), seconds)
            self.counts["ended before leaving"] += 1
        except asyncio.TimeoutError:
            self.counts["left"] += 1

    async def _stream(self, http: httpx.AsyncClient, which: int) -> None:
        async with http.stream("POST", f"{self.url}/v1/completions", json=self._body(which, stream=True)) as response:
            async for _ in response.aiter_bytes():
                pass


def test_concurrent_requests_with_aborts(checkpoint: Callable[[TinySpec], Path], tmp_path: Path) -> None:
    model = checkpoint(TinySpec())
    prompts = [random_prompt(length, seed=length) for length, _ in REQUESTS]
    env = {**ENVIRONMENT, **BATCH_INVARIANT, "VLLM_COMPUTE_NANS_IN_LOGITS": "1"}
    with VllmServer(model, OPTIONS, log_path=tmp_path / "server.log", env=env) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        expected = [client.complete(server.url, p, steps) for p, (_, steps) in zip(prompts, REQUESTS, strict=True)]
        crowd = Client(server.url, prompts, expected)
        asyncio.run(crowd.run(SECONDS))
        print(dict(crowd.counts), f"{len(crowd.wrong)} wrong, such as {crowd.wrong[:5]}")
        server.check_running()
        _wait_until_idle(server.url)
        metrics = {
            name: client.metric(server.url, f"vllm:{name}")
            for name in ("num_preemptions_total", "kv_cache_usage_perc", "corrupted_requests_total")
        }
        log = server.log()
    print(metrics)
    assert not crowd.wrong, f"{len(crowd.wrong)} of {crowd.counts['answered']}, such as {crowd.wrong[:5]}"
    assert not compiled_late(log)
    assert crowd.counts["answered"] >= CONCURRENT
    assert crowd.counts["left"] >= CONCURRENT / 10
    assert metrics["num_preemptions_total"] > 0, "the cache was to be too small"
    assert metrics["kv_cache_usage_perc"] == 0, "blocks of the cache were not given back"
    assert metrics["corrupted_requests_total"] == 0, "NaN in logits"


def _wait_until_idle(url: str) -> None:
    """Wait for the requests whose clients left; they must end as well."""
    for _ in range(100):
        if not any(client.metric(url, f"vllm:num_requests_{state}") for state in ("running", "waiting")):
            return
        time.sleep(0.2)
    raise AssertionError("requests are still running 20 s after the last client left")
