"""Before the server is ready: compile every kernel, and let vLLM's memory measurement see the attention at its peak.

Kernels are found by batches made up for it, of every size that has kernels of its own, whose launches are noted and not
made. vLLM measures memory before there are caches, by one run of the model: the attention joins that run with the same
batches, and some as large as any can be.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.utils.torch_utils import set_default_torch_dtype

from dsv32_plugin import cache_layout, dsa
from dsv32_plugin.batch import MAX_GATHERED_KEYS, DsaBatch, mixed_batch, uniform_decodes
from dsv32_plugin.kernels.ahead import Launches
from dsv32_plugin.vllm_adapter.attention import DsaAttention

logger = init_logger("vllm.dsv32_plugin")


class WarmUp:
    """Compiles while the weights are loaded: begun when the model is built, finished in the first run of it."""

    def __init__(self, layers: list[DsaAttention], slots_tk: torch.Tensor, vllm_config: VllmConfig) -> None:
        """Of each kind of layer one, and the buffer of selections."""
        started = time.perf_counter()
        self._layers, self._slots_tk = layers, slots_tk
        self._queries = 1 + vllm_config.num_speculative_tokens
        self._most_decodes = vllm_config.scheduler_config.max_num_seqs * self._queries
        self._made_up = MadeUp(vllm_config.model_config.max_model_len, slots_tk.shape[1], slots_tk.device)
        hidden_size = vllm_config.model_config.get_hidden_size()
        # As in a run of the model, which is not being built then.
        dtype = torch.get_default_dtype()
        hidden_th = torch.zeros(slots_tk.shape[0], hidden_size, dtype=dtype, device=slots_tk.device)
        launches = Launches()
        with torch.inference_mode(), torch.device("cpu"), set_default_torch_dtype(torch.float32), launches.record():
            self._run_all(hidden_th)
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        self._launches, self._found_s = launches, time.perf_counter() - started
        # One process of a machine compiles, the others then find its results on the disk.
        self._compilation = launches.compile() if get_world_group().local_rank == 0 else None
        self._started = time.perf_counter()

    def finish(self, hidden_th: torch.Tensor) -> None:
        """Run the layers on made-up batches of up to as many tokens as `hidden_th` has."""
        begun, count = time.perf_counter(), len(self._launches)
        if self._compilation is not None:
            self._compilation.wait()
        get_world_group().barrier()
        waited = time.perf_counter()
        self._launches.load()
        loaded = time.perf_counter()
        for layer in self._layers:
            with made_up_caches(layer):
                for batch in self._made_up.largest(hidden_th.shape[0]):
                    _run_one(layer, batch, hidden_th, self._slots_tk)
        self._run_all(hidden_th)
        torch.accelerator.synchronize()
        times = self._found_s, begun - self._started, waited - begun, loaded - waited, time.perf_counter() - loaded
        logger.info(
            "dsv32: %d kernels: found in %.1f s, compiled in %.1f s beside vLLM's own work and %.1f s after it, "
            "loaded in %.1f s, run in %.1f s", count, *times,
        )  # fmt: skip

    def _run_all(self, hidden_th: torch.Tensor) -> None:
        for layer in self._layers:
            with made_up_caches(layer), without_projections(layer):
                for batch in self._made_up.batches(hidden_th.shape[0], self._most_decodes, self._queries):
                    _run_one(layer, batch, hidden_th, self._slots_tk)


def _run_one(layer: DsaAttention, batch: DsaBatch, hidden_th: torch.Tensor, slots_tk: torch.Tensor) -> None:
    tokens = slice(0, batch.slots_t.shape[0])
    positions_t = torch.zeros_like(batch.slots_t)
    layer.run(batch, positions_t, hidden_th[tokens], slots_tk[tokens])


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

    def batches(self, most: int, most_decodes: int, queries: int) -> Iterator[DsaBatch]:
        """Every size that has kernels of its own. Near its end a sequence has room for fewer drafted tokens."""
        short = min(self.topk, self.max_len)
        lengths = [*_powers(short), *(length for length in _powers(self.max_len) if length > short), self.max_len]
        for tokens in (*_powers(most), most):
            for length in lengths:
                yield self.prefill(tokens, length, tokens // length)
            for n in range(1, queries + 1):
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
