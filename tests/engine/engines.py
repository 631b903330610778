"""The engine that is installed here, vLLM or SGLang, as a test that is the same for both asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import client
import pytest
from client import Completion

from dsv32_plugin.tools.serving import Server, SglangServer, VllmServer

START_TIMEOUT_S = 600


@dataclass(frozen=True)
class Engine:
    """How to start a server on a CPU, in float32, and what its own names for things are."""

    name: str
    server: type[Server]
    options: tuple[str, ...]
    """Contexts of 1024 tokens, 16 sequences; prompts of more than 128 tokens come in chunks, beside others' decodes."""
    complete: Callable[..., Completion]
    prompt_logprobs: Callable[..., list[float]]
    two_ranks: tuple[str, ...]
    fp8_caches: tuple[str, ...]
    few_pages: tuple[str, ...]
    """Room for 40 pages of 64 tokens, and no caution: concurrent requests make each other wait."""
    preemptions: Callable[[str, list[Completion]], float]
    """How many sequences the server has taken back, when these are the latest answers."""

    @contextmanager
    def serve(self, model: Path, log_path: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
        """The server's address; it is proven to run the plugin's model."""
        with self.server(model, [*self.options, *options], log_path=log_path, env=env) as server:
            server.wait_until_ready(START_TIMEOUT_S)
            assert "dsv32: serving" in server.log()
            yield server.url
            server.check_running()


VLLM = Engine(
    name="vllm",
    server=VllmServer,
    options=(
        *("--served-model-name", "tiny"),
        *("--dtype", "float32"),
        *("--max-model-len", "1024"),
        *("--max-num-batched-tokens", "128"),
        *("--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(1 << 28)),
        "--enable-prompt-tokens-details",
    ),
    complete=client.complete,
    prompt_logprobs=client.prompt_logprobs,
    two_ranks=("--tensor-parallel-size", "2"),
    fp8_caches=("--kv-cache-dtype", "fp8"),
    few_pages=("--num-gpu-blocks-override", "40"),
    preemptions=lambda url, answers: client.metric(url, "vllm:num_preemptions_total"),
)
SGLANG = Engine(
    name="sglang",
    server=SglangServer,
    options=(
        *("--dtype", "float32"),
        *("--context-length", "1024"),
        *("--chunked-prefill-size", "128"),
        "--enable-mixed-chunk",
        *("--max-running-requests", "16"),
        "--skip-server-warmup",
        # An idle server takes no core from the tests that follow.
        "--sleep-on-idle",
    ),
    complete=client.generate,
    prompt_logprobs=client.input_logprobs,
    two_ranks=("--tp-size", "2"),
    fp8_caches=("--kv-cache-dtype", "fp8_e4m3", "--page-size", "16"),
    few_pages=("--max-total-tokens", "2560", "--schedule-conservativeness", "0.01"),
    preemptions=lambda url, answers: sum(answer.retractions for answer in answers),
)


def installed() -> Engine:
    """Skips the test file where there is none; the two do not fit into one environment."""
    for engine in (VLLM, SGLANG):
        if find_spec(engine.name) is not None:
            return engine
    pytest.skip("needs vLLM or SGLang", allow_module_level=True)
