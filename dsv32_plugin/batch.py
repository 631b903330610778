"""One scheduled step as the sparse attention sees it, whatever the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_GATHERED_KEYS = 1 << 18
"""Index keys that one prefill chunk gathers at most, unless one sequence is longer: 256 Ki keys are 33 MiB in fp8."""


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
    seq_t: torch.Tensor
    """[tokens] int32: row of `block_table_bp`."""
    start_t: torch.Tensor
    end_t: torch.Tensor
    """[tokens] int32: the gathered keys that each token may see."""


@dataclass(frozen=True)
class DsaBatch:
    """Decodes first, then prefills, as both engines order a batch.

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
    num_decodes: int
    queries_per_decode: int
    prefill_chunks: tuple[PrefillChunk, ...]

    @property
    def num_decode_tokens(self) -> int:
        return self.num_decodes * self.queries_per_decode


def build_batch(
    *,
    slots_t: torch.Tensor,
    block_table_bp: torch.Tensor,
    seq_lens_b: torch.Tensor,
    query_start_b1: torch.Tensor,
    seq_lens_cpu_b: torch.Tensor,
    query_start_cpu_b1: torch.Tensor,
    max_visible: int,
    num_decodes: int,
    queries_per_decode: int,
    max_gathered_keys: int = MAX_GATHERED_KEYS,
) -> DsaBatch:
    """Describe a step.

    Args:
        slots_t: [T] int64, on the device.
        block_table_bp: [B, pages] int32, on the device.
        seq_lens_b: [B] int32, on the device: tokens of each sequence after this step.
        query_start_b1: [B + 1] int32, on the device: first token of each sequence in the batch.
        seq_lens_cpu_b: [B] int32, on the host; exact for prefills.
        query_start_cpu_b1: [B + 1] int32, on the host.
        max_visible: upper bound of seq_lens_b.
        num_decodes: sequences at the front of the batch that have `queries_per_decode` tokens each.
        queries_per_decode: 1, or more with speculative decoding.
        max_gathered_keys: size of a prefill chunk, in index keys.
    """
    num_tokens = slots_t.shape[0]
    token_t = torch.arange(num_tokens, dtype=torch.int32, device=slots_t.device)
    seq_t = torch.searchsorted(query_start_b1[1:], token_t, right=True, out_int32=True)
    tokens_after_t = query_start_b1[1:][seq_t] - 1 - token_t
    visible_t = seq_lens_b[seq_t] - tokens_after_t
    chunks = _prefill_chunks(
        block_table_bp,
        seq_lens_b,
        seq_t,
        visible_t,
        seq_lens_cpu_b.tolist(),
        query_start_cpu_b1.tolist(),
        num_decodes,
        max_gathered_keys,
    )
    return DsaBatch(
        slots_t=slots_t,
        block_table_bp=block_table_bp,
        seq_t=seq_t,
        visible_t=visible_t,
        max_visible=max_visible,
        num_decodes=num_decodes,
        queries_per_decode=queries_per_decode,
        prefill_chunks=chunks,
    )


def _prefill_chunks(
    block_table_bp: torch.Tensor,
    seq_lens_b: torch.Tensor,
    seq_t: torch.Tensor,
    visible_t: torch.Tensor,
    seq_lens: list[int],
    query_start: list[int],
    first_seq: int,
    max_gathered_keys: int,
) -> tuple[PrefillChunk, ...]:
    chunks = []
    while first_seq < len(seq_lens):
        last_seq, total_keys = first_seq + 1, seq_lens[first_seq]
        while last_seq < len(seq_lens) and total_keys + seq_lens[last_seq] <= max_gathered_keys:
            total_keys += seq_lens[last_seq]
            last_seq += 1
        tokens = slice(query_start[first_seq], query_start[last_seq])
        cu_seqlens_b1 = torch.nn.functional.pad(seq_lens_b[first_seq:last_seq].cumsum(0, dtype=torch.int32), (1, 0))
        chunk_seq_t = seq_t[tokens] - first_seq
        start_t = cu_seqlens_b1[chunk_seq_t]
        chunks.append(
            PrefillChunk(
                tokens=tokens,
                block_table_bp=block_table_bp[first_seq:last_seq],
                cu_seqlens_b1=cu_seqlens_b1,
                total_keys=total_keys,
                seq_t=chunk_seq_t,
                start_t=start_t,
                end_t=start_t + visible_t[tokens],
            )
        )
        first_seq = last_seq
    return tuple(chunks)
