"""One scheduled step as the sparse attention sees it, whatever the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from dsv32_plugin.kernels.cache_layout import PAGE_SIZE

MAX_GATHERED_KEYS = 1 << 18
"""Index keys that one prefill chunk gathers at most, unless one sequence is longer: 256 Ki keys are 33 MiB in fp8."""


@dataclass(frozen=True)
class CopiedPages:
    """Where the latents of some sequences lie in a paged copy that holds nothing else, in pages of PAGE_SIZE tokens."""

    block_table_bp: torch.Tensor
    """[sequences, pages] int32: pages of the copy."""
    first_row_b1: torch.Tensor
    """[sequences + 1] int32: where each sequence begins, always at a page."""
    rows: int
    """At least first_row_b1[-1], and whole pages."""


@dataclass(frozen=True)
class PrefillChunk:
    """Whole sequences whose index keys are gathered together, and the query tokens that score them."""

    tokens: slice
    """Rows of the batch."""
    block_table_bp: torch.Tensor
    """[sequences, pages] int32, of this chunk's sequences."""
    cu_seqlens_b1: torch.Tensor
    """[sequences + 1] int32: where each sequence's keys begin in the gathered keys."""
    total_keys: int
    longest: int
    """Keys of its longest sequence."""
    seq_t: torch.Tensor
    """[tokens] int32: row of `block_table_bp`."""
    start_t: torch.Tensor
    end_t: torch.Tensor
    """[tokens] int32: the gathered keys that each token may see."""
    sizes: tuple[tuple[int, int], ...]
    """Keys and query tokens, the last ones, of each sequence."""

    @property
    def pairs(self) -> int:
        """Query tokens times keys, summed over the sequences."""
        return sum(keys * tokens for keys, tokens in self.sizes)

    def seen(self, most: int) -> int:
        """Keys that the query tokens see, summed over the tokens; at most so many count for each."""
        total = 0
        for keys, tokens in self.sizes:
            fewer = min(tokens, max(0, most - (keys - tokens)))  # tokens that see no more
            total += fewer * (keys - tokens) + fewer * (fewer + 1) // 2 + (tokens - fewer) * most
        return total

    @cached_property
    def copied(self) -> CopiedPages:
        """Pages of a copy of this chunk's latents; the same for every layer."""
        num_seqs = self.block_table_bp.shape[0]
        pages_b = (self.cu_seqlens_b1.diff() + (PAGE_SIZE - 1)) // PAGE_SIZE
        first_page_b1 = torch.nn.functional.pad(pages_b.cumsum(0, dtype=torch.int32), (1, 0))
        page_p = torch.arange(-(-self.longest // PAGE_SIZE), dtype=torch.int32, device=first_page_b1.device)
        # The last page of each sequence is filled up.
        most_pages = self.total_keys // PAGE_SIZE + num_seqs
        return CopiedPages(first_page_b1[:-1, None] + page_p, first_page_b1 * PAGE_SIZE, most_pages * PAGE_SIZE)


@dataclass(frozen=True)
class Decodes:
    """Query tokens whose index keys are scored where they lie, in the pages."""

    tokens: slice
    """Rows of the batch, in the order of `visible_bn`."""
    table_bp: torch.Tensor
    """[B, pages] int32."""
    visible_bn: torch.Tensor
    """[B, N] int32: the N tokens of a sequence share one read of its keys."""
    longest: int
    """No entry of `visible_bn` is ever larger, in no step that kernels compiled or captured for this one serve."""


@dataclass(frozen=True)
class Step:
    """Decodes, then prefills, as vLLM orders a batch, or prefills, then decodes, as SGLang does.

    T tokens of B sequences. Each token sees the positions 0 .. visible_t - 1 of its sequence, itself included.
    """

    slots_t: torch.Tensor
    """[T] int64: where this step's keys are written; -1 writes nothing."""
    block_table_bp: torch.Tensor
    """[B, pages] int32."""
    seq_t: torch.Tensor
    """[T] int32: row of the block table."""
    visible_t: torch.Tensor
    """[T] int32."""
    max_visible: int
    """No entry of `visible_t` is larger. Known on the host without synchronisation."""
    decodes: Decodes | None
    prefill_chunks: tuple[PrefillChunk, ...]


def parts_of(step: Step) -> list[tuple[slice, Step]]:
    """The decodes of a step and each of its prefill chunks: their rows, and a step of its own."""

    def part(rows: slice, **what: Any) -> tuple[slice, Step]:
        slots_t, seq_t, visible_t = (aligned(x[rows]) for x in (step.slots_t, step.seq_t, step.visible_t))
        return rows, replace(step, slots_t=slots_t, seq_t=seq_t, visible_t=visible_t, **what)

    found = []
    if step.decodes is not None:
        decodes = replace(step.decodes, tokens=_from_zero(step.decodes.tokens))
        found.append(part(step.decodes.tokens, decodes=decodes, prefill_chunks=()))
    for chunk in step.prefill_chunks:
        alone = replace(chunk, tokens=_from_zero(chunk.tokens))
        found.append(part(chunk.tokens, decodes=None, prefill_chunks=(alone,)))
    return found


def _from_zero(rows: slice) -> slice:
    return slice(0, rows.stop - rows.start)


@dataclass(frozen=True)
class LayerCaches:
    """One layer's paged caches, [pages, page size, width]; a layer that shares a selection has no index keys."""

    latents: torch.Tensor
    index_keys: torch.Tensor | None


class StepSource(Protocol):
    """What an engine tells the layers of a model while it runs."""

    def current(self, layer: int) -> tuple[Step, LayerCaches] | None:
        """The step that runs, and this layer's caches; None where there are none yet, as in a run for measuring."""

    def done(self, layer: int) -> None:
        """The layer has launched all that reads and writes its caches."""


def uniform_decodes(
    *,
    slots_t: torch.Tensor,
    block_table_bp: torch.Tensor,
    seq_t: torch.Tensor,
    visible_t: torch.Tensor,
    max_visible: int,
    queries: int,
    longest: int | None = None,
) -> Step:
    """Describe a step in which each sequence has `queries` tokens. It reads nothing but these tensors.

    So a graph captured with it serves every later step that leaves its values in the same tensors.
    """
    rows = slice(0, visible_t.shape[0])
    decodes = Decodes(rows, block_table_bp, visible_t.view(-1, queries), longest or max_visible)
    return Step(slots_t, block_table_bp, seq_t, visible_t, max_visible, decodes, ())


def mixed_batch(
    *,
    slots_t: torch.Tensor,
    block_table_bp: torch.Tensor,
    seq_lens_b: torch.Tensor,
    query_start_b1: torch.Tensor,
    seq_lens_cpu_b: torch.Tensor,
    query_start_cpu_b1: torch.Tensor,
    max_visible: int,
    num_decodes: int,
    decodes_last: bool = False,
    longest: int | None = None,
    max_gathered_keys: int = MAX_GATHERED_KEYS,
) -> Step:
    """Describe any step.

    Args:
        slots_t: [T] int64, on the device.
        block_table_bp: [B, pages] int32, on the device.
        seq_lens_b: [B] int32, on the device: tokens of each sequence after this step.
        query_start_b1: [B + 1] int32, on the device: first token of each sequence in the batch; those past the last are
            padding and see nothing.
        seq_lens_cpu_b: [B] int32, on the host; exact for prefills.
        query_start_cpu_b1: [B + 1] int32, on the host.
        max_visible: upper bound of seq_lens_b.
        num_decodes: sequences at the front of the batch that have few tokens each.
        decodes_last: they are at the end of it instead; there is no padding then.
        longest: upper bound of the lengths of decodes in all steps that the same compiled kernels are to serve; None:
            max_visible.
        max_gathered_keys: size of a prefill chunk, in index keys.
    """
    num_tokens = slots_t.shape[0]
    token_t = torch.arange(num_tokens, dtype=torch.int32, device=slots_t.device)
    query_end_b = query_start_b1[1:]
    seq_t = torch.searchsorted(query_end_b, token_t, right=True, out_int32=True).clamp_(max=len(query_end_b) - 1)
    tokens_after_t = query_end_b[seq_t] - 1 - token_t
    visible_t = torch.where(tokens_after_t < 0, 0, seq_lens_b[seq_t] - tokens_after_t).clamp_(min=0)
    query_start = query_start_cpu_b1.tolist()
    num_seqs = len(query_start) - 1
    decoding, prefilling = slice(0, num_decodes), slice(num_decodes, num_seqs)
    if decodes_last:
        prefilling, decoding = slice(0, num_seqs - num_decodes), slice(num_seqs - num_decodes, num_seqs)
    chunks = _prefill_chunks(
        block_table_bp,
        seq_lens_b,
        seq_t,
        visible_t,
        seq_lens_cpu_b.tolist(),
        query_start,
        prefilling,
        max_gathered_keys,
    )
    decodes = _decodes(block_table_bp, seq_t, visible_t, query_start, decoding, longest or max_visible)
    return Step(slots_t, block_table_bp, seq_t, visible_t, max_visible, decodes, chunks)


def _decodes(
    block_table_bp: torch.Tensor,
    seq_t: torch.Tensor,
    visible_t: torch.Tensor,
    query_start: list[int],
    seqs: slice,
    longest: int,
) -> Decodes | None:
    rows = slice(query_start[seqs.start], query_start[seqs.stop])
    num_tokens = rows.stop - rows.start
    if num_tokens == 0:
        return None
    visible_t = aligned(visible_t[rows])
    queries = max(1, query_start[seqs.start + 1] - rows.start)
    if query_start[seqs.start : seqs.stop + 1] == list(range(rows.start, rows.stop + 1, queries)):
        return Decodes(rows, aligned(block_table_bp[seqs]), visible_t.view(-1, queries), longest)
    # Some have drafted tokens and some have none: each token for itself.
    return Decodes(rows, block_table_bp[seq_t[rows]], visible_t[:, None], longest)


def _prefill_chunks(
    block_table_bp: torch.Tensor,
    seq_lens_b: torch.Tensor,
    seq_t: torch.Tensor,
    visible_t: torch.Tensor,
    seq_lens: list[int],
    query_start: list[int],
    seqs: slice,
    max_gathered_keys: int,
) -> tuple[PrefillChunk, ...]:
    chunks = []
    first_seq = seqs.start
    while first_seq < seqs.stop:
        last_seq, total_keys = first_seq + 1, seq_lens[first_seq]
        while last_seq < seqs.stop and total_keys + seq_lens[last_seq] <= max_gathered_keys:
            total_keys += seq_lens[last_seq]
            last_seq += 1
        tokens = slice(query_start[first_seq], query_start[last_seq])
        seqs_of_chunk = range(first_seq, last_seq)
        cu_seqlens_b1 = torch.nn.functional.pad(seq_lens_b[first_seq:last_seq].cumsum(0, dtype=torch.int32), (1, 0))
        chunk_seq_t = seq_t[tokens] - first_seq
        start_t = cu_seqlens_b1[chunk_seq_t]
        chunks.append(
            PrefillChunk(
                tokens=tokens,
                # A copy begins at a multiple of 16 bytes, which the compiled kernels rely on.
                block_table_bp=block_table_bp[first_seq:last_seq].clone(),
                cu_seqlens_b1=cu_seqlens_b1,
                total_keys=total_keys,
                longest=max(seq_lens[first_seq:last_seq]),
                seq_t=chunk_seq_t,
                start_t=start_t,
                end_t=start_t + visible_t[tokens],
                sizes=tuple((seq_lens[seq], query_start[seq + 1] - query_start[seq]) for seq in seqs_of_chunk),
            )
        )
        first_seq = last_seq
    return tuple(chunks)


def aligned(part: torch.Tensor) -> torch.Tensor:
    """The part, or a copy where it does not begin as the whole does: at a multiple of 16 bytes."""
    return part.clone() if part.storage_offset() else part
