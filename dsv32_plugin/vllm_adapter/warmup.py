"""Before the server is ready: compile every kernel, and let vLLM's memory measurement see the attention at its peak.

vLLM measures memory before there are caches, by one run of the model. The attention joins that run with batches made up
for it: some as large as any can be, and small ones of every size that has kernels of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase

from dsv32_plugin import cache_layout, dsa
from dsv32_plugin.batch import MAX_GATHERED_KEYS, DsaBatch, mixed_batch, uniform_decodes
from dsv32_plugin.kernels.ahead import Launches
from dsv32_plugin.vllm_adapter.attention import DsaAttention

logger = init_logger("vllm.dsv32_plugin")


def run(
    layers: list[DsaAttention],
    positions_t: torch.Tensor,
    hidden_th: torch.Tensor,
    slots_tk: torch.Tensor,
    vllm_config: VllmConfig,
) -> None:
    """Run each of `layers` on made-up batches of up to as many tokens as `hidden_th` has."""
    positions_t = torch.zeros_like(positions_t)
    made_up = MadeUp(vllm_config.model_config.max_model_len, slots_tk.shape[1], hidden_th.device)
    queries = 1 + vllm_config.num_speculative_tokens
    most_decodes = vllm_config.scheduler_config.max_num_seqs * queries

    def run_one(layer: DsaAttention, batch: DsaBatch) -> None:
        tokens = slice(0, batch.slots_t.shape[0])
        layer.run(batch, positions_t[tokens], hidden_th[tokens], slots_tk[tokens])

    def run_all() -> None:
        for layer in layers:
            with made_up_caches(layer), without_projections(layer):
                for batch in made_up.batches(hidden_th.shape[0], most_decodes, range(1, queries + 1)):
                    run_one(layer, batch)
        torch.accelerator.synchronize()

    started = time.perf_counter()
    launches = Launches()
    with launches.record():
        run_all()
    recorded, count = time.perf_counter(), len(launches)
    # One process of a machine compiles, the others then find its results on the disk.
    group = get_world_group()
    if group.local_rank == 0:
        launches.compile()
    group.barrier()
    launches.load()
    compiled = time.perf_counter()
    for layer in layers:
        with made_up_caches(layer):
            for batch in made_up.largest(hidden_th.shape[0]):
                run_one(layer, batch)
    run_all()
    logger.info(
        "dsv32: %d kernels: found in %.1f s, compiled in %.1f s, run in %.1f s",
        count, recorded - started, compiled - recorded, time.perf_counter() - compiled,
    )  # fmt: skip


@contextmanager
def made_up_caches(layer: DsaAttention) -> Iterator[None]:
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


@contextmanager
def without_projections(layer: DsaAttention) -> Iterator[None]:
    """Matrix products leave their results as they are: the engine's kernels for them are not ours to warm up."""
    projections = [module for module in layer.modules() if isinstance(module, LinearBase)]
    try:
        for projection in projections:
            width = getattr(projection, "output_size_per_partition", projection.output_size)
            projection.forward = lambda x, width=width: (x.new_empty(*x.shape[:-1], width), None)
        yield
    finally:
        for projection in projections:
            del projection.forward


@dataclass(frozen=True)
class MadeUp:
    """Batches that write nothing and whose pages are all the first one."""

    max_len: int
    topk: int
    device: torch.device

    def largest(self, most: int) -> Iterator[DsaBatch]:
        """Those that take the most memory, of long sequences and of short ones."""
        short = min(self.topk, self.max_len)
        yield self.prefill(most, self.max_len, max(1, MAX_GATHERED_KEYS // self.max_len))
        yield self.prefill(most, short, most // short)

    def batches(self, most: int, most_decodes: int, queries: Iterable[int]) -> Iterator[DsaBatch]:
        """Every size that has kernels of its own; a request's last step may have fewer drafted tokens than others."""
        short = min(self.topk, self.max_len)
        lengths = [*_powers(short), *(length for length in _powers(self.max_len) if length > short), self.max_len]
        for tokens in (*_powers(most), most):
            for length in lengths:
                yield self.prefill(tokens, length, tokens // length)
            for n in queries:
                if n <= tokens <= most_decodes:
                    for length in {*_powers(short), short, self.max_len}:
                        yield self.decode(tokens // n, length, n)

    def prefill(self, tokens: int, length: int, num_seqs: int) -> DsaBatch:
        """About `tokens`, the last ones of sequences of this length."""
        num_seqs = min(max(1, num_seqs), tokens)
        share = min(tokens // num_seqs, length)
        query_start_b1 = torch.arange(num_seqs + 1, dtype=torch.int32) * share
        seq_lens_b = torch.full((num_seqs,), length, dtype=torch.int32)
        return mixed_batch(
            slots_t=torch.full((share * num_seqs,), -1, device=self.device),
            block_table_bp=self._table(num_seqs),
            seq_lens_b=seq_lens_b.to(self.device),
            query_start_b1=query_start_b1.to(self.device),
            seq_lens_cpu_b=seq_lens_b,
            query_start_cpu_b1=query_start_b1,
            max_visible=length,
            num_decodes=0,
            longest=self.max_len,
            max_gathered_keys=dsa.gathered_keys(length, self.topk),
        )

    def decode(self, num_seqs: int, length: int, queries: int) -> DsaBatch:
        tokens = num_seqs * queries
        return uniform_decodes(
            slots_t=torch.full((tokens,), -1, device=self.device),
            block_table_bp=self._table(num_seqs),
            seq_t=torch.arange(tokens, dtype=torch.int32, device=self.device) // queries,
            visible_t=torch.full((tokens,), length, dtype=torch.int32, device=self.device),
            max_visible=length,
            queries=queries,
            longest=self.max_len,
        )

    def _table(self, num_seqs: int) -> torch.Tensor:
        pages = -(-self.max_len // cache_layout.PAGE_SIZE)
        return torch.zeros(num_seqs, pages, dtype=torch.int32, device=self.device)


def _powers(limit: int) -> list[int]:
    """1, 2, 4 .. below the limit."""
    return [1 << n for n in range(limit.bit_length()) if 1 << n < limit]
