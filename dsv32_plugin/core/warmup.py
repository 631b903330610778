"""Before a server is ready: compile every kernel of the attention, in parallel and beside other work, and run each.

An engine's own trial runs meet few of the sizes that have kernels of their own. Batches made up here have all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dsv32_plugin.core.attention import DsaAttention, Indexer, Projections
from dsv32_plugin.core.planner import gathered_keys
from dsv32_plugin.core.step import MAX_GATHERED_KEYS, LayerCaches, Step, mixed_batch, uniform_decodes
from dsv32_plugin.kernels import cache_layout
from dsv32_plugin.kernels.runtime.ahead import Launches

Samples = Sequence[tuple[DsaAttention, LayerCaches]]
"""A layer of each kind, with caches into which nothing is written."""


class WarmUp:
    """Compiles beside what an engine does between the two calls, such as loading the weights."""

    def __init__(
        self,
        layers: Samples,
        steps: Callable[[], Iterable[Step]],
        hidden_th: torch.Tensor,
        slots_tk: torch.Tensor,
        *,
        compiles: bool,
    ) -> None:
        """Find what the attention of `layers` launches in `steps`, and begin to compile it.

        Args:
            hidden_th: [T, hidden size], as many tokens as the largest step has; what is in it does not matter.
            slots_tk: [T, K] int32, overwritten.
            compiles: whether this process is the one of its machine that compiles; the others find its results on the
                disk.
        """
        self._started = time.perf_counter()
        self._launches, self._steps = Launches(), steps
        with self._launches.record():
            _run_all(layers, steps, hidden_th, slots_tk)
        self._found = time.perf_counter()
        self._compilation = self._launches.compile() if compiles else None

    def load(self, barrier: Callable[[], None]) -> None:
        """Wait until all is compiled, in all processes, and load it."""
        self._begun = time.perf_counter()
        if self._compilation is not None:
            self._compilation.wait()
        barrier()
        self._compiled = time.perf_counter()
        self._count = len(self._launches)
        self._launches.load()

    def run(self, layers: Samples, hidden_th: torch.Tensor, slots_tk: torch.Tensor) -> str:
        """Launch what was loaded; returns what to log. The arguments are as before."""
        loaded = time.perf_counter()
        _run_all(layers, self._steps, hidden_th, slots_tk)
        return summary(
            self._count,
            found_s=self._found - self._started,
            beside_s=self._begun - self._found,
            alone_s=self._compiled - self._begun,
            loaded_s=loaded - self._compiled,
            run_s=time.perf_counter() - loaded,
        )


def summary(count: int, *, found_s: float, beside_s: float, alone_s: float, loaded_s: float, run_s: float) -> str:
    """What is logged of a start; all but the time beside other work prolongs it."""
    return (
        f"{count} kernels: found in {found_s:.1f} s, compiled for {beside_s:.1f} s beside other work and for "
        f"{alone_s:.1f} s alone, loaded in {loaded_s:.1f} s, run in {run_s:.1f} s"
    )


def _run_all(
    layers: Samples, steps: Callable[[], Iterable[Step]], hidden_th: torch.Tensor, slots_tk: torch.Tensor
) -> None:
    for attention, caches in layers:
        for step in steps():
            run_one(attention, caches, step, hidden_th, slots_tk, Unprojected(attention))
    torch.accelerator.synchronize()


def run_one(
    attention: DsaAttention,
    caches: LayerCaches,
    step: Step,
    hidden_th: torch.Tensor,
    slots_tk: torch.Tensor,
    projections: Projections | None = None,
) -> torch.Tensor:
    """One layer's attention in `step`, every token at position 0."""
    tokens = slice(0, step.slots_t.shape[0])
    positions_t = torch.zeros_like(step.slots_t)
    return attention.attend(step, positions_t, hidden_th[tokens], slots_tk[tokens], caches, projections)


class Unprojected:
    """The projections of a layer, without the products: the engine's kernels for them are not ours to warm up."""

    def __init__(self, attention: DsaAttention) -> None:
        self._attention = attention

    def index_weights(self, hidden_th: torch.Tensor) -> torch.Tensor:
        return hidden_th.new_empty(hidden_th.shape[0], self._indexer.heads)

    def project(self, hidden_th: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        width = sum(self._attention.a_widths)
        return self._attention.split(hidden_th.new_empty(hidden_th.shape[0], width))

    def index_query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        return q_a_tl.new_empty(q_a_tl.shape[0], self._indexer.heads * self._indexer.dim)

    def query(self, q_a_tl: torch.Tensor) -> torch.Tensor:
        of = self._attention
        return q_a_tl.new_empty(q_a_tl.shape[0], of.num_heads * (of.nope + of.rope))

    def output(self, values_tv: torch.Tensor) -> torch.Tensor:
        return values_tv

    @property
    def _indexer(self) -> Indexer:
        assert self._attention.indexer is not None
        return self._attention.indexer


@dataclass(frozen=True)
class MadeUp:
    """Batches that write nothing and whose pages are all the first one."""

    max_len: int
    topk: int
    device: torch.device

    def largest(self, most: int) -> Iterator[Step]:
        """Those that take the most memory, of long sequences, of short ones, and of some between."""
        short = min(self.topk, self.max_len)
        yield self.prefill(most, self.max_len, max(1, MAX_GATHERED_KEYS // self.max_len))
        yield self.prefill(most, short, most // short)
        middle = min(8 * self.topk, self.max_len)
        yield self.prefill(most, middle, most // middle)

    def batches(self, most: int, most_decodes: int, queries: int) -> Iterator[Step]:
        """Every size that has kernels of its own. Near its end a sequence has room for fewer drafted tokens."""
        short = min(self.topk, self.max_len)
        # Longer ones also a token past a power of two: a mask that pays there need not pay at the next.
        past = [length + 1 for length in _powers(self.max_len) if length >= short]
        longer = [length for length in _powers(self.max_len) if length > short]
        lengths = [*_powers(short), *sorted({*past, *longer, self.max_len})]
        # What is gathered of many long sequences is longer than any: with prefix hits few tokens are enough for that.
        together = [*_powers(MAX_GATHERED_KEYS // self.max_len + 1)]
        for tokens in (*_powers(most), most):
            for length in lengths:
                yield self.prefill(tokens, length, tokens // length)
            for num_seqs in together:
                if 1 < num_seqs <= tokens:
                    yield self.prefill(tokens, self.max_len, num_seqs)
            for n in range(1, queries + 1):
                if n <= tokens <= most_decodes:
                    for length in {*_powers(short), short, self.max_len}:
                        yield self.decode(tokens // n, length, n)

    def prefill(self, tokens: int, length: int, num_seqs: int) -> Step:
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
            max_gathered_keys=gathered_keys(length, self.topk),
        )

    def decode(self, num_seqs: int, length: int, queries: int) -> Step:
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
