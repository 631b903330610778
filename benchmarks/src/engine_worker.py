"""One engine in its own process: start it, then time the cases that come on stdin; engine.py drives it.

    python -m dsv32_plugin.benchmarks.engine_worker '{"model": ..., "options": ..., "started": ...}'

A round of a case is a line of JSON on stdin; its result a line of JSON after MARK on stdout, where everything else is
the engine's. Needs vLLM, not the plugin: it also times vLLM's own code.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

MARK = "@@dsv32 "
VOCABULARY = (3, 128000)
"""Ordinary tokens of DeepSeek's vocabulary; the first is the beginning of a sentence, 0."""
PREFILL_TOKENS = 16384
"""A prefill case takes as many prompts as make about this many tokens, so that short ones fill the engine's batch."""
DECODE_STEPS = 64
DISCARDED_STEPS = 8
"""The first steps after a prefill are not counted."""
GRAPH_LAUNCH = "cudaGraphLaunch"


def emit(**fields: Any) -> None:
    print(MARK + json.dumps(fields), flush=True)


class Engine:
    """vLLM's LLM, driven step by step so that every step has its time."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self.engine = LLM(model=model, **options).llm_engine
        self._requests = 0

    def peak_gib(self) -> float:
        """The most memory that torch has held for the engine's tensors: weights, caches and what is computed."""
        return round(max(self.engine.collective_rpc(_peak_bytes)) / 2**30, 2)

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float, list[float]]:
        """Send all prompts at once and wait for `tokens` tokens of each.

        Returns: seconds until every request had its first token; the end; seconds of each later step in which every
        request gained a token.
        """
        params = self._params(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        started = time.perf_counter()
        lengths: dict[str, int] = {}
        for prompt in prompts:
            self._requests += 1
            lengths[str(self._requests)] = 0
            self.engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, params)
        first_s = 0.0
        steps: list[float] = []
        last = started
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                lengths[output.request_id] = len(output.outputs[0].token_ids)
            if first_s:
                if len(outputs) == len(lengths):
                    steps.append(now - last)
            elif all(lengths.values()):
                first_s = now - started
            last = now
        wrong = {name: length for name, length in lengths.items() if length != tokens}
        if wrong:
            raise RuntimeError(f"expected {tokens} tokens of every request, got {wrong}")
        return first_s, time.perf_counter() - started, steps


def _peak_bytes(worker: Any) -> int:
    return torch.cuda.max_memory_allocated(worker.device) if worker.device.type == "cuda" else 0


def prompt(stream: int, length: int) -> list[int]:
    """The first `length` tokens of an endless random stream: prompts of one stream share a prefix, others nothing."""
    generator = torch.Generator().manual_seed(stream)
    return [0, *torch.randint(*VOCABULARY, (length - 1,), generator=generator, dtype=torch.int32).tolist()]


def prefill(engine: Engine, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds from sending the prompts to the last one's first token; every prompt is new to the engine."""
    length = case["L"]
    batch = max(1, PREFILL_TOKENS // length)
    first = case["seed"] + case["round"] * batch
    seconds = engine.run([prompt(stream, length) for stream in range(first, first + batch)], 1)[0]
    return {"prompts": batch, "seconds": round(seconds, 4)}


def decode(engine: Engine, case: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each step while B sequences of about L tokens decode together.

    The prompts' pages stay in the prefix cache, so that a longer case extends a shorter one's. With fewer `distinct`
    prompts than sequences the others share pages, which flatters the caches of the GPU; the record says so.
    """
    return {"steps_ms": _steps_ms(engine, case)}


def graph(engine: Engine, case: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds from start to end of each step's CUDA graph on the GPU: a step without what the host adds."""
    engine.engine.collective_rpc(_start_profile)
    try:
        _steps_ms(engine, case)
    finally:
        (found,) = engine.engine.collective_rpc(_stop_profile)
    counted = DECODE_STEPS - 1 - DISCARDED_STEPS
    if len(found) < counted:
        raise RuntimeError(f"expected a CUDA graph for each step, of {counted} at least, got {len(found)}")
    # Those of the last steps, in which all sequences decode.
    return {"steps_ms": found[-counted:]}


def _steps_ms(engine: Engine, case: dict[str, Any]) -> list[float]:
    batch, length, distinct = case["B"], case["L"] - DECODE_STEPS, case["distinct"]
    prompts = [prompt(stream, length) for stream in range(distinct)]
    if case["round"] == 0:
        engine.run(prompts, 1)
    steps = engine.run([prompts[i % distinct] for i in range(batch)], DECODE_STEPS)[2][DISCARDED_STEPS:]
    if len(steps) < DECODE_STEPS // 2:
        raise RuntimeError(f"only {len(steps)} steps in which all {batch} sequences decoded: is the cache too small?")
    return [round(1e3 * seconds, 4) for seconds in steps]


def _start_profile(worker: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    worker.dsv32_profile = profile(activities=[ProfilerActivity.CUDA])
    worker.dsv32_profile.start()


def _stop_profile(worker: Any) -> list[float]:
    torch.cuda.synchronize(worker.device)
    worker.dsv32_profile.stop()
    found = graph_spans_ms(list(worker.dsv32_profile.profiler.kineto_results.events()))
    del worker.dsv32_profile
    return found


def graph_spans_ms(events: Sequence[Any]) -> list[float]:
    """Milliseconds that each CUDA graph took on the GPU, in order, by the profiler's events.

    What a graph launches has the number of its launch.
    """
    spans: dict[int, list[int]] = {e.correlation_id(): [] for e in events if e.name() == GRAPH_LAUNCH}
    for event in events:
        if event.correlation_id() in spans and event.device_type() == torch.autograd.DeviceType.CUDA:
            spans[event.correlation_id()] += event.start_ns(), event.start_ns() + event.duration_ns()
    whole = sorted((min(times), max(times)) for times in spans.values() if times)
    return [round((end - begin) / 1e6, 4) for begin, end in whole]


CASES: dict[str, Callable[[Engine, dict[str, Any]], dict[str, Any]]] = {
    "prefill": prefill,
    "decode": decode,
    "graph": graph,
}


def main() -> int:
    task = json.loads(sys.argv[1])
    engine = Engine(task["model"], task["options"])
    ready_s = time.time() - task["started"]
    engine.run([prompt(1 << 20, 16)], 1)
    emit(ready_s=round(ready_s, 1), first_token_s=round(time.time() - task["started"], 1))
    for line in sys.stdin:
        case = json.loads(line)
        try:
            emit(**CASES[case["kind"]](engine, case), peak_gib=engine.peak_gib())
        except Exception as error:
            emit(error=f"{type(error).__name__}: {str(error)[:500]}")
            if "EngineDead" in type(error).__name__:
                return 1
    return 0


if __name__ == "__main__":
    # The engine's worker processes re-import this module.
    sys.exit(main())
