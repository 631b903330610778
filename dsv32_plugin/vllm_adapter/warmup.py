"""Before the server is ready: compile every kernel, and let vLLM's memory measurement see the attention at its peak.

vLLM measures memory before there are caches, by one run of the model. The attention joins that run with batches made up
for it: first one as large as any can be, then small ones of every size that has kernels of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger

from dsv32_plugin import cache_layout
from dsv32_plugin.batch import MAX_GATHERED_KEYS, DsaBatch, mixed_batch, uniform_decodes
from dsv32_plugin.kernels import aot
from dsv32_plugin.vllm_adapter.attention import DsaAttention

logger = init_logger("vllm.dsv32_plugin")


class Precompilation:
    """Triton's disk cache, filled by processes beside the loading of the weights; once on each machine."""

    def __init__(self, device: torch.device) -> None:
        self._thread: threading.Thread | None = None
        self._seconds = 0.0
        if get_world_group().local_rank == 0:
            index = torch.cuda.current_device() if device.index is None else device.index
            target = aot.target_of_device(index)
            if target.name in aot.TARGETS:
                self._thread = threading.Thread(target=self._run, args=(target,), name="dsv32-precompile", daemon=True)
                self._thread.start()

    def _run(self, target: aot.Target) -> None:
        started = time.perf_counter()
        failed = [record for record in aot.precompile(target) if record.error]
        self._seconds = time.perf_counter() - started
        for record in failed:
            # Not needed by every model: what this one needs is compiled, and fails, in the first launch.
            logger.warning("dsv32: %s %s does not compile: %s", record.operation, record.case, record.error)

    def wait(self) -> None:
        """Until the machine's cache is full."""
        if self._thread is not None:
            self._thread.join()
            logger.info("dsv32: kernels compiled in %.1f s, beside the loading of the weights", self._seconds)
        get_world_group().barrier()


def run(
    layers: list[DsaAttention], positions_t: torch.Tensor, hidden_th: torch.Tensor, slots_tk: torch.Tensor,
    vllm_config: VllmConfig,
) -> None:  # fmt: skip
    """Run each of `layers` on made-up batches of up to as many tokens as `hidden_th` has."""
    started = time.perf_counter()
    max_len, topk = vllm_config.model_config.max_model_len, slots_tk.shape[1]
    most, device = hidden_th.shape[0], hidden_th.device
    drafted = vllm_config.num_speculative_tokens
    positions_t = torch.zeros_like(positions_t)
    most_decodes = vllm_config.scheduler_config.max_num_seqs * (1 + drafted)
    lengths = [*_powers(min(topk, max_len)), *(n for n in _powers(max_len) if n > topk), max_len]
    count = 0
    for layer in layers:
        with _made_up_caches(layer):
            for batch in _batches(most, most_decodes, lengths, drafted, device):
                tokens = slice(0, batch.slots_t.shape[0])
                layer.run(batch, positions_t[tokens], hidden_th[tokens], slots_tk[tokens])
                count += 1
    torch.accelerator.synchronize()
    logger.info("dsv32: warmed up with %d batches in %.1f s", count, time.perf_counter() - started)


@contextmanager
def _made_up_caches(layer: DsaAttention) -> Iterator[None]:
    """One page of zeros stands for all."""
    caches = [layer.latents, *([layer.indexer.k_cache] if layer.indexer is not None else [])]
    real = [cache.kv_cache for cache in caches]
    device = layer.rope_table_pr.device
    try:
        for cache in caches:
            cache.kv_cache = torch.zeros(1, cache_layout.PAGE_SIZE, cache.width, dtype=cache.dtype, device=device)
        yield
    finally:
        for cache, kv_cache in zip(caches, real, strict=True):
            cache.kv_cache = kv_cache


def _batches(
    most: int, most_decodes: int, lengths: list[int], drafted: int, device: torch.device
) -> Iterator[DsaBatch]:
    """The largest batch first, since what it frees serves all others."""
    max_len = lengths[-1]
    yield _prefill(most, max_len, min(most, max(1, MAX_GATHERED_KEYS // max_len)), max_len, device)
    for tokens in (*_powers(most), most):
        for length in lengths:
            yield _prefill(tokens, length, 1, max_len, device)
            for queries in {1, 1 + drafted}:
                if tokens % queries == 0 and tokens <= most_decodes:
                    yield _decode(tokens, length, queries, max_len, device)


def _prefill(tokens: int, length: int, num_seqs: int, max_len: int, device: torch.device) -> DsaBatch:
    """`tokens` shared by sequences that are `length` long after them (or longer, if they are more)."""
    share = tokens // num_seqs
    query_start_b1 = torch.arange(num_seqs + 1, dtype=torch.int32) * share
    seq_lens_b = torch.full((num_seqs,), max(length, share), dtype=torch.int32)
    return mixed_batch(
        slots_t=torch.full((share * num_seqs,), -1, device=device),
        block_table_bp=_table(num_seqs, max_len, device),
        seq_lens_b=seq_lens_b.to(device),
        query_start_b1=query_start_b1.to(device),
        seq_lens_cpu_b=seq_lens_b,
        query_start_cpu_b1=query_start_b1,
        max_visible=int(seq_lens_b[0]),
        num_decodes=0,
    )


def _decode(tokens: int, length: int, queries: int, max_len: int, device: torch.device) -> DsaBatch:
    return uniform_decodes(
        slots_t=torch.full((tokens,), -1, device=device),
        block_table_bp=_table(tokens // queries, max_len, device),
        seq_t=torch.arange(tokens, dtype=torch.int32, device=device) // queries,
        visible_t=torch.full((tokens,), length, dtype=torch.int32, device=device),
        max_visible=length,
        queries=queries,
    )


def _table(num_seqs: int, max_len: int, device: torch.device) -> torch.Tensor:
    pages = -(-max_len // cache_layout.PAGE_SIZE)
    return torch.zeros(num_seqs, pages, dtype=torch.int32, device=device)


def _powers(limit: int) -> list[int]:
    """1, 2, 4 .. below the limit."""
    return [1 << n for n in range(limit.bit_length()) if 1 << n < limit]
