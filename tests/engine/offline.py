"""vLLM's offline engine for tests: token ids in, tokens and log-probabilities out, and the engine gone at the end."""

from __future__ import annotations

import gc
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from client import Completion

from dsv32_plugin import kernels

BATCH_INVARIANT = {"DSV32_BATCH_INVARIANT": "1", "VLLM_BATCH_INVARIANT": "1"}
"""Environment in which an answer may not depend on what else is in the batch."""
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "seed": 0,
    # Small, so that several engines fit on one GPU. vLLM wants so much of the memory to be free when it starts.
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 30,
    "max_model_len": 5120,
    "max_num_seqs": 16,
    "disable_log_stats": False,
}


class OfflineEngine:
    """What tests ask of vLLM's `LLM`."""

    def __init__(self, model: Path, options: Mapping[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(model=str(model), **{**OPTIONS, **options})

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> list[Completion]:
        """Greedy: exactly `steps` tokens after each prompt, all prompts sent at once."""
        outputs = self._run(prompts, max_tokens=steps, min_tokens=steps, logprobs=0)
        answers = []
        for output in outputs:
            answer = output.outputs[0]
            tokens = list(answer.token_ids)
            logprobs = [step[token].logprob for token, step in zip(tokens, answer.logprobs, strict=True)]
            assert all(map(math.isfinite, logprobs)), f"a log-probability is not finite: {logprobs}"
            answers.append(Completion(tokens, logprobs, output.num_cached_tokens or 0))
        return answers

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher forced: of each prompt the log-probability of every token but the first."""
        outputs = self._run(prompts, max_tokens=1, prompt_logprobs=0)
        return [
            [step[token].logprob for token, step in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def metric(self, name: str, **labels: str) -> float:
        """One of the engine's counters or gauges, summed over the labels that are not given."""
        metrics = [metric for metric in self.llm.get_metrics() if metric.name == name]
        values = [metric.value for metric in metrics if labels.items() <= metric.labels.items()]
        assert values, f"the engine has no metric {name} {labels}"
        return sum(values)

    def forget_prefixes(self) -> None:
        """Empty the GPU's prefix cache, once nothing (a copy to the CPU, for one) holds its pages any more."""
        for _ in range(50):
            if self.llm.reset_prefix_cache():
                return
            time.sleep(0.1)
        raise AssertionError("the prefix cache is still in use")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _run(self, prompts: Sequence[Sequence[int]], **params: Any) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **params)
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(given, sampling, use_tqdm=False)


ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # This process may have used CUDA, which a fork of it then cannot.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # `python -m` in a checkout would import the checkout's folder, not the installed package.
    "PYTHONSAFEPATH": "1",
    # FlashInfer's sampler is compiled at the first start, longer than a test takes. Greedy requests do not use it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Of DeepGEMM's fp8 products only those that are used: all there are take more than seven minutes to compile.
    "VLLM_DEEP_GEMM_WARMUP": "skip",
}


def compiled_late(log: str) -> set[str]:
    """Our kernels that an engine's log says were compiled after it was ready. vLLM compiles some of its own then."""
    sources = (path.read_text() for path in Path(kernels.__file__).parent.rglob("*.py"))
    a_kernel = re.compile(r"^@(?:triton|gluon)\.jit\b.*?^def (\w+)", re.M | re.S)
    ours = {name for source in sources for name in a_kernel.findall(source)}
    assert ours, "no kernel was found in the sources"
    return ours & set(re.findall(r"during inference: (\w+)", log))


@contextmanager
def offline_engine(model: Path, *, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[OfflineEngine]:
    """An engine that runs in a process of its own and ends with the block."""
    with patch.dict(os.environ, {**ENVIRONMENT, **(env or {})}):
        engine = OfflineEngine(model, options)
        try:
            yield engine
        finally:
            engine.close()
            del engine
            gc.collect()
